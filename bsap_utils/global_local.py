"""Global-Local CLIP (Yu et al., CVPR 2023), the baseline of referring image segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch


def encode_masked(visual: Any, pixels: torch.Tensor, keep: torch.Tensor, from_block: int | None = None) -> torch.Tensor:
    """Encode one image for N regions, the patches outside of each region hidden: [N, D], not normalized.

    `visual` is an image tower with patch tokens (`has_patch_tokens`), `pixels` [1, 3, S, S] its input, and `keep`
    [N, patches] bool what `visual_prompts.patch_masks` gives. From block `from_block` on (0 is the first) no token
    attends to a hidden patch, as if it had been dropped; the blocks before run once for all regions. The default is the
    last quarter of the blocks, the paper's 9 of 12; its code zeroes hidden tokens instead, which leaves them a share of
    the attention. Raises ValueError for a block that the tower does not have.
    """
    blocks = visual.transformer.resblocks
    from_block = len(blocks) * 3 // 4 if from_block is None else from_block
    if not 0 <= from_block < len(blocks):
        raise ValueError(f"from_block is {from_block}; the image tower has the blocks 0 to {len(blocks) - 1}.")
    hidden = torch.cat([torch.zeros_like(keep[:, :1]), ~keep], 1)  # the class token comes first and is never hidden

    def for_each_region(block: Any, args: tuple) -> tuple:
        return args[0].expand(len(keep), -1, -1), *args[1:]

    def hide(attention: Any, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, "key_padding_mask": hidden}

    hooks = [blocks[from_block].register_forward_pre_hook(for_each_region)]
    hooks += [block.attn.register_forward_pre_hook(hide, with_kwargs=True) for block in blocks[from_block:]]
    try:
        features = visual(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return features[0] if isinstance(features, tuple) else features


def has_patch_tokens(visual: Any) -> bool:
    """Tell whether an image tower is open_clip's VisionTransformer, whose feature is the class token."""
    return (
        isinstance(visual, open_clip.transformer.VisionTransformer)
        and visual.pool_type == "tok"
        and visual.attn_pool is None
        and all(isinstance(block.attn, torch.nn.MultiheadAttention) for block in visual.transformer.resblocks)
    )


def noun_phrases(texts: Sequence[str]) -> tuple[list[str], str]:
    """Return the head noun phrase of each expression, "the man" of "the man left of a car", and what found them.

    The rule is the paper's: the noun chunk of the sentence's root or, where that is in none, of the root's first child;
    else the whole expression. The parser is the best English model that spaCy has on this machine. Without one the
    expressions come back as they are, and the second value says so.

    >>> noun_phrases(["mug"])[0]
    ['mug']
    """
    try:
        import spacy
    except ImportError:
        return list(texts), "none: spaCy is not installed"
    for name in ("en_core_web_lg", "en_core_web_trf", "en_core_web_md", "en_core_web_sm"):
        if spacy.util.is_package(name):
            parser = spacy.load(name)
            return [_noun_phrase(parsed) for parsed in parser.pipe(texts)], f"spaCy {name} {parser.meta['version']}"
    return list(texts), "none: spaCy has no English model here (python -m spacy download en_core_web_lg)"


def _noun_phrase(parsed: Any) -> str:
    chunk_of = {token.i: chunk for chunk in parsed.noun_chunks for token in chunk}
    root = [token for token in parsed if token.head.i == token.i][-1:]
    heads = [token for token in root + [child for token in root for child in token.children][:1] if token.i in chunk_of]
    return chunk_of[heads[0].i].text if heads else parsed.text
