"""Global-Local CLIP (Yu et al., CVPR 2023), the baseline of referring image segmentation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import open_clip
import torch


def encode_masked(visual: Any, pixels: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Encode one image [1, 3, S, S] for N regions, the patches outside of each region hidden: [N, D], not normalized.

    `visual` has patch tokens (`has_patch_tokens`), `keep` [N, patches] bool is what `visual_prompts.patch_masks` gives.
    In the last quarter of the blocks, the paper's 9 to 12, no token attends to a hidden patch, as if it had been dropped;
    its code zeroes hidden tokens instead, which leaves them a share of the attention.
    """
    blocks = visual.transformer.resblocks
    last = blocks[len(blocks) * 3 // 4 :]
    hidden = torch.cat([torch.zeros_like(keep[:, :1]), ~keep], 1)  # the class token comes first and is never hidden

    def hide(attention: Any, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, "key_padding_mask": hidden}

    hooks = [last[0].register_forward_pre_hook(lambda block, args: (args[0].expand(len(keep), -1, -1), *args[1:]))]
    hooks += [block.attn.register_forward_pre_hook(hide, with_kwargs=True) for block in last]
    try:
        features = visual(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return features[0] if isinstance(features, tuple) else features


def has_patch_tokens(visual: Any) -> bool:
    """Tell whether an image tower is open_clip's VisionTransformer, whose feature is the class token."""
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        return False
    attentions = [type(block.attn) for block in visual.transformer.resblocks]
    return visual.pool_type == "tok" and visual.attn_pool is None and set(attentions) == {torch.nn.MultiheadAttention}


def english_parser() -> tuple[Any, str]:
    """Return the best English model of spaCy that is here, and its name; None and the reason where there is none."""
    with contextlib.suppress(ImportError):
        import spacy

        for name in filter(spacy.util.is_package, [f"en_core_web_{size}" for size in ("lg", "trf", "md", "sm")]):
            parser = spacy.load(name)
            return parser, f"spaCy {name} {parser.meta['version']}"
    return None, "none: spaCy is not installed, or no English model for it"


def noun_phrases(texts: Sequence[str]) -> tuple[list[str], str]:
    """Return the head noun phrase of each expression, "the man" of "the man left of a car", and what found them.

    That is, as in the paper, the noun chunk of the sentence's root or of the root's first child, else the whole expression.
    Without `english_parser` the expressions come back as they are.
    """
    parser, name = english_parser()
    return [_noun_phrase(parsed) for parsed in parser.pipe(texts)] if parser else list(texts), name


def _noun_phrase(parsed: Any) -> str:
    chunk_of = {token.i: chunk for chunk in parsed.noun_chunks for token in chunk}
    root = [token for token in parsed if token.head.i == token.i][-1:]
    heads = [token for token in root + [child for token in root for child in token.children][:1] if token.i in chunk_of]
    return chunk_of[heads[0].i].text if heads else parsed.text
