"""Visual prompts: what CLIP is shown of a region.

A visual prompt is a function `(image, boxes, masks) -> views` on the image's device: `image` [3, H, W] uint8, `boxes`
[N, 4] xywh in pixels, on the CPU (to read an edge back from a GPU would make it wait), `masks` [N, H, W] bool or None;
views are uint8 of any size. They are squashed to the model's square, as in ReCLIP: a centre crop would cut long regions.
Several threads call it at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

VisualPrompt = Callable[..., Tensor | list[Tensor]]
CLIP_MEAN = (123, 117, 104)  # the pixel that CLIP's normalization makes 0: nothing to see
LINE = 2 / 384  # thickness of circle and contour, as a share of the image's shorter side, as in FGVP's rerun
AT_ONCE = 2**27  # bytes of an image's views that exist at a time, before they are squashed


def pixel_edges(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return left, top, right, bottom [N, 4] of xywh boxes in whole pixels, rounded as PIL does, inside, never empty."""
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).round().long()
    limit = torch.tensor([width, height], device=boxes.device)
    start = torch.minimum(corners[:, :2].clamp(min=0), limit - 1)
    return torch.cat([start, torch.minimum(torch.maximum(corners[:, 2:], start + 1), limit)], 1)


def gaussian_blur(image: Tensor, sigma: float = 100.0) -> Tensor:
    """Blur [3, H, W] uint8 with standard deviation `sigma` in pixels, as PIL does and hence ReCLIP.

    PIL takes three box blurs, each of which repeats the edge pixel that it finds. A wide blur is worked out at six points
    to a σ and interpolated, within 1 grey level of PIL at σ = 100.
    """
    down, across = (_blur_matrix(length, sigma, image.device) for length in image.shape[-2:])
    small = down @ (image.float() @ across.T)
    blurred = functional.interpolate(small[None], image.shape[-2:], mode="bilinear", align_corners=True)[0]
    return blurred.round_().clamp_(0, 255).byte()


@lru_cache(64)  # pictures of a data set have few different sizes
def _blur_matrix(length: int, sigma: float, device: torch.device) -> Tensor:
    """Return three box blurs of a line of `length` pixels, at n evenly spaced points of it: [n, length] float32."""
    whole = math.floor((math.sqrt(4 * sigma**2 + 1) - 1) / 2)  # Gwosdek et al. (2011), section 4.1, as in PIL
    part = (2 * whole + 1) * (whole * (whole + 1) - sigma**2) / (6 * (sigma**2 / 3 - (whole + 1) ** 2))
    box = 2 * (whole + part) + 1  # pixels
    count = min(length, math.ceil(6 * (length - 1) / sigma) + 1)
    step = (length - 1) / max(count - 1, 1) or 1.0  # pixels from point to point
    first = _box_matrix(torch.linspace(0, length - 1, count), length, box)
    again = _box_matrix(torch.arange(count), count, box / step)
    return (again @ again @ first).to(device, non_blocking=True)


def _box_matrix(centres: Tensor, length: int, box: float) -> Tensor:
    """Return the mean over a box of that many pixels around each centre [n]: [n, length]; a line goes on as it ends."""
    beyond = math.ceil(box / 2)
    distance = (torch.arange(-beyond, length + beyond) - centres[:, None]).abs()
    weights = ((box + 1) / 2 - distance).clamp(0, 1)
    before, matrix, after = (weights / weights.sum(1, keepdim=True)).split([beyond, length, beyond], dim=1)
    matrix[:, 0] += before.sum(1)
    matrix[:, -1] += after.sum(1)
    return matrix


def _grid(image: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
    """Return left, top, right, bottom [N, 1, 1] of boxes, and x [1, W], y [H, 1] of the pixels' centres."""
    height, width = image.shape[-2:]
    edges = pixel_edges(boxes, height, width).float().to(image.device, non_blocking=True)
    x, y = (torch.arange(length, device=image.device) + 0.5 for length in (width, height))
    return *edges[:, :, None, None].unbind(1), x[None], y[:, None]


def box_masks(image: Tensor, boxes: Tensor, masks: Tensor | None = None) -> Tensor:
    """Return the pixels of an image inside of boxes: [N, H, W] bool."""
    left, top, right, bottom, x, y = _grid(image, boxes)
    return (x > left) & (x < right) & (y > top) & (y < bottom)


def ellipse_masks(image: Tensor, boxes: Tensor, masks: Tensor | None = None, grow: float = 0.0) -> Tensor:
    """Return the pixels inside of ellipses that touch the boxes' sides, `grow` pixels added to each radius: [N, H, W]."""
    left, top, right, bottom, x, y = _grid(image, boxes)
    a, b = ((right - left) / 2 + grow).clamp(min=0), ((bottom - top) / 2 + grow).clamp(min=0)
    x, y = x - (left + right) / 2, y - (top + bottom) / 2
    return ((x * b) ** 2 + (y * a) ** 2 <= (a * b) ** 2) & (a > 0) & (b > 0)


def ellipse_line(image: Tensor, boxes: Tensor, masks: Tensor | None = None, thickness: float = LINE) -> Tensor:
    """Return the pixels of a line along the ellipses, at least one pixel thick: [N, H, W]."""
    line = max(1.0, thickness * min(image.shape[-2:]))
    return ellipse_masks(image, boxes, grow=line / 2) & ~ellipse_masks(image, boxes, grow=-line / 2)


def mask_line(image: Tensor, boxes: Tensor, masks: Tensor, thickness: float = LINE) -> Tensor:
    """Return the pixels of a line along the masks' edges, as thick inside as outside: [N, H, W]."""
    inside = masks.float()
    reach = max(1, round(thickness * min(image.shape[-2:]) / 2))
    outside = functional.pad(1 - inside, [reach] * 4, value=1.0)  # a line where the image ends too
    dilated = functional.max_pool2d(inside, 2 * reach + 1, stride=1, padding=reach) > 0
    return dilated & (functional.max_pool2d(outside, 2 * reach + 1, stride=1) > 0)  # what erosion takes away


def tint(image: Tensor) -> Tensor:
    """Return the image under a translucent red, that of "CPT-adapted" in ReCLIP's code."""
    return (image + 127 / 255 * (_pixel((240, 0, 30), image) - image.float())).round().byte()


def whole(region: Callable, inside: Callable | None = None, outside: Callable | None = None) -> VisualPrompt:
    """Return the prompt that shows the whole image, changed inside or outside of a region."""

    def prompt(image: Tensor, boxes: Tensor, masks: Tensor | None = None) -> Tensor:
        inner, outer = (image if change is None else change(image) for change in (inside, outside))
        return torch.where(region(image, boxes, masks)[:, None], inner, outer)

    return prompt


def crop(image: Tensor, boxes: Tensor, masks: Tensor | None = None) -> list[Tensor]:
    """Return the boxes cut out; with masks, with CLIP's mean pixel outside of them."""
    edges, images = pixel_edges(boxes, *image.shape[-2:]).tolist(), image.expand(len(boxes), -1, -1, -1)
    if masks is not None:
        images = torch.where(masks[:, None], image, _pixel(CLIP_MEAN, image))
    return [one[:, top:bottom, left:right] for one, (left, top, right, bottom) in zip(images, edges, strict=True)]


def _pixel(colour: Sequence[int], image: Tensor) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).to(image.device, non_blocking=True).view(3, 1, 1)


red, gray = partial(_pixel, (255, 0, 0)), partial(transforms.rgb_to_grayscale, num_output_channels=3)
# The codes are those of FGVP (Yang et al., NeurIPS 2023): P crop, B box, C circle, D mask; 1 line, 2 colour inside,
# 3 grey outside, 4 blur outside (σ = 100 pixels). Its circles touch the box's sides; C3 and C4 have no line.
VISUAL_PROMPTS: dict[str, VisualPrompt] = {
    "crop": crop,  # P (ReCLIP, Subramanian et al. 2022)
    "shade": whole(box_masks, inside=tint),  # B2 (CPT, Yao et al. 2021); the text then is "{} is in red color."
    "blur": whole(box_masks, outside=gaussian_blur),  # B4 (ReCLIP)
    "circle": whole(ellipse_line, inside=red),  # C1 (Red Circle, Shtedritski et al. 2023)
    "circle_gray": whole(ellipse_masks, outside=gray),  # C3
    "circle_blur": whole(ellipse_masks, outside=gaussian_blur),  # C4
    "mask_contour": whole(mask_line, inside=red),  # D1
    "mask_gray": whole(lambda image, boxes, masks: masks, outside=gray),  # D3
    "mask_blur": whole(lambda image, boxes, masks: masks, outside=gaussian_blur),  # D4, "blur reverse mask"
    "mask_crop": crop,  # Global-Local CLIP (Yu et al. 2023), which fills with ImageNet's mean: one grey level off
    "global_local": crop,  # its local half; the global one is no picture: ClipScorer.encode_regions mixes it in
}
OURS = frozenset(VISUAL_PROMPTS.values())
MASK_PROMPTS = frozenset({"mask_contour", "mask_gray", "mask_blur", "mask_crop", "global_local"})


def patch_masks(masks: Tensor, grid: Sequence[int]) -> Tensor:
    """Return the patches that masks [N, H, W] cover at least half as much as that which they cover most: [N, rows · columns].

    So a thin mask keeps what it has, an empty one all. `grid`: rows and columns of the vision transformer's patches.
    """
    coverage = functional.adaptive_avg_pool2d(masks.float(), (grid[0], grid[1])).flatten(1)
    return coverage >= coverage.amax(1, keepdim=True) / 2


def squash(images: Tensor | list[Tensor], size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """Resize [..., 3, H, W] uint8, or a list of such, to `size` (height, width), antialiased, whatever the shape."""
    if isinstance(images, list):
        return torch.stack([squash(image, size, interpolation) for image in images])
    return transforms.resize(images, list(size), InterpolationMode(interpolation), antialias=True)


def resampling_weights(lengths: Tensor, size: int, longest: int, interpolation: str = "bicubic") -> Tensor:
    """Return the matrices that resample lines of `lengths` [N] pixels to `size`, antialiased: [N, size, longest] float32.

    A triangle, or Keys' kernel (1981, a = -0.5), as wide as an output pixel where that is larger than an input pixel.
    """
    scale = (lengths / size)[:, None, None]
    here = torch.arange(longest, device=lengths.device) + 0.5
    centre = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * scale
    x = ((here - centre) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    keys, triangle = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)), (1 - x).clamp(min=0)
    weights = (triangle if interpolation == "bilinear" else keys) * (here < lengths[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def squash_together(views: Tensor | list[Tensor], size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """Do what `squash` does to views [3, h, w] of any sizes, in two matrix products: a GPU would wait for a resize a crop."""
    if isinstance(views, Tensor):
        sizes, padded = torch.tensor([views.shape[-2:]]), views.float()
    else:
        sizes = torch.tensor([view.shape[-2:] for view in views])
        padded = torch.zeros(len(views), 3, *sizes.amax(0).tolist(), device=views[0].device)
        for place, view in zip(padded, views, strict=True):
            place[:, : view.shape[1], : view.shape[2]] = view
    sizes = sizes.to(padded.device, non_blocking=True)
    weights = (resampling_weights(sizes[:, i], size[i], padded.shape[2 + i], interpolation) for i in (0, 1))
    rows, columns = (matrix[:, None] for matrix in weights)
    across = (padded @ columns.mT).round_().clamp_(0, 255)  # PIL too holds whole grey levels between the two passes
    return (rows @ across).round_().clamp_(0, 255).byte()


def show_regions(
    image: Tensor, boxes: Tensor, name: str, size: Sequence[int], masks: Tensor | None = None, kind: str = "bicubic"
) -> Tensor:
    """Return the views of N regions of one image under a visual prompt: [N, 3, *size] uint8.

    `image` [3, H, W] uint8 on any device, `boxes` [N, 4] xywh in pixels on the CPU, `masks` [N, H, W] bool on the image's
    device for the prompts of MASK_PROMPTS, `kind` of interpolation. KeyError for a prompt that is not in VISUAL_PROMPTS.
    """
    resize = squash if image.device.type == "cpu" else squash_together
    step = max(1, AT_ONCE // image.numel())
    parts = [slice(start, start + step) for start in range(0, len(boxes), step)]
    own = masks if name in MASK_PROMPTS else None
    shown = (VISUAL_PROMPTS[name](image, boxes[part], own if own is None else own[part]) for part in parts)
    return torch.cat([resize(views, size, kind) for views in shown])
