"""Global-Local CLIP (Yu et al., CVPR 2023), the baseline of referring image segmentation."""

import contextlib
from typing import Any

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
    with contextlib.ExitStack() as until:
        for hook in hooks:
            until.enter_context(hook)
        features = visual(pixels)
    return features[0] if isinstance(features, tuple) else features


def has_patch_tokens(visual: Any) -> bool:
    """Tell whether an image tower is open_clip's VisionTransformer, whose feature is the class token."""
    if getattr(visual, "pool_type", "") != "tok" or visual.attn_pool is not None:
        return False
    return all(isinstance(block.attn, torch.nn.MultiheadAttention) for block in visual.transformer.resblocks)


def english_parser() -> tuple[Any, str]:
    """Return the best English model of spaCy that is here, and its name; None and the reason where there is none."""
    with contextlib.suppress(ImportError):
        import spacy

        for name in filter(spacy.util.is_package, [f"en_core_web_{size}" for size in ("lg", "trf", "md", "sm")]):
            parser = spacy.load(name)
            return parser, f"spaCy {name} {parser.meta['version']}"
    return None, "none: spaCy is not installed, or no English model for it"
