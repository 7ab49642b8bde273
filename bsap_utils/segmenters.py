"""Masks for those who have none: a classical segmenter that needs no weights, and SAM for those who have its weights.

Both turn an image into class-agnostic masks (compressed RLE) and a score each, best first; `write_masks` makes of them
the file that `proposals.from_masks` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage
from skimage import color, measure, segmentation
from tqdm.auto import tqdm

from .datasets import ReferDataset
from .proposals import suppress

Segmenter = Callable[[Image.Image], "tuple[list[dict], np.ndarray]"]
SCALES = (50, 100, 200, 400, 800)  # of Felzenszwalb's segmentation: from parts to things
MERGED = 100  # the one of them whose segments are also joined with their neighbours
LONGEST = 400  # pixels at which it works: what SCALES mean, and the time, must not depend on the camera
SAM = "facebook/sam-vit-base"


def felzenszwalb(image: Image.Image, top_k: int = 40) -> tuple[list[dict], np.ndarray]:
    """Segment an image by colour: masks (compressed RLE, [N]) and scores in 0..1 [N], best first.

    The graph-based segmentation of Felzenszwalb and Huttenlocher (IJCV 2004), scikit-image's, of the image at no more
    than 400 pixels, at several scales; the segments of all scales, and those of one scale joined with neighbours like
    them step by step, with their holes filled, from 0.1 % to 60 % of the image. The score is the contrast of a segment
    with its surroundings, less for segments smaller than 1.4 % of the image (parts and specks) and for each side of the
    image that one touches (background). Of two with an IoU above 0.8 the better stays, and `top_k` of all.

    >>> picture = Image.new("RGB", (90, 60), "navy")
    >>> picture.paste("orange", (20, 15, 50, 45))
    >>> masks, scores = felzenszwalb(picture)
    >>> coco.toBbox(masks)[0].tolist()
    [20.0, 15.0, 30.0, 30.0]
    """
    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    pixels = color.rgb2lab(np.asarray(small))
    height, width = pixels.shape[:2]
    masks, scores = [], []
    for scale in SCALES:
        labels = segmentation.felzenszwalb(np.asarray(small), scale=scale, sigma=0.8, min_size=50)
        for one in chain(measure.regionprops(labels + 1), _merged(labels, pixels) if scale == MERGED else ()):
            share = one.area_filled / labels.size
            if 0.001 <= share <= 0.6:
                top, left, bottom, right = one.bbox
                mask = np.zeros((height, width), dtype=np.uint8, order="F")
                mask[top:bottom, left:right] = one.image_filled
                sides = (top == 0) + (left == 0) + (bottom == height) + (right == width)
                masks.append(coco.encode(mask))
                scores.append(_contrast(mask, pixels, one.bbox) * min(1.0, share**0.5 / 0.12) * 0.6**sides)
    order = np.argsort(scores, kind="stable")[::-1]
    best, values = [masks[i] for i in order], np.array(scores)[order]
    stays = np.flatnonzero(suppress(best, 0.8))[:top_k]
    return [_resized(best[i], image.size) for i in stays], values[stays]


def sam(model: str = SAM, device: str | int | None = None, points_per_side: int = 32) -> Segmenter:
    """Return Segment Anything (Kirillov et al., ICCV 2023) as a segmenter: `transformers`' mask-generation pipeline.

    `model` is a name on the hub or a folder. The pipeline asks SAM about a grid of points, `points_per_side`², and keeps
    what SAM itself finds good and stable; the score is the IoU that SAM predicts. Raises RuntimeError with what to do
    when `transformers` is not installed or the weights cannot be got.
    """
    try:
        from transformers import pipeline
    except ImportError as error:
        raise RuntimeError("SAM needs transformers: pip install 'bsap-utils[sam]', or use felzenszwalb.") from error
    try:
        generate = pipeline("mask-generation", model=model, device=device)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"SAM's weights cannot be loaded from {model!r} ({str(error).splitlines()[0]}). Pass the folder of a model that "
            "you have (config.json, model.safetensors, preprocessor_config.json), or use felzenszwalb."
        ) from error

    def segment(image: Image.Image) -> tuple[list[dict], np.ndarray]:
        found = generate(image.convert("RGB"), points_per_crop=points_per_side, points_per_batch=64)
        scores = np.array([float(score) for score in found["scores"]])
        masks = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in found["masks"]]
        order = np.argsort(-scores, kind="stable")
        return [masks[i] for i in order], scores[order]

    return segment


def write_masks(ds: ReferDataset, segment: Segmenter, path: str | Path) -> int:
    """Segment every image of `ds` into `path`, COCO results {image_id, segmentation, score}; return how many masks.

    The file appears when it is whole. Raises DatasetError for an image that is missing or damaged.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("w", encoding="utf-8") as file:
            for image_id in tqdm(ds.images.index, desc="Segmenting images", unit="image"):
                for mask, score in zip(*segment(ds.load_image(image_id)), strict=True):
                    rle = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
                    entry = {"image_id": int(image_id), "segmentation": rle, "score": round(float(score), 4)}
                    file.write((",\n" if count else "[") + json.dumps(entry, separators=(",", ":")))
                    count += 1
            file.write("]\n" if count else "[]\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _contrast(mask: np.ndarray, pixels: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Return in 0..1 how a mask (in `box`: top, left, bottom, right) stands out of a ring around it, in CIELAB `pixels`.

    The distance of the mean colours as a share of that and the mean spread of the two.
    """
    top, left, bottom, right = box
    reach = max(2, round(0.08 * mask[top:bottom, left:right].sum() ** 0.5))
    window = np.s_[max(top - reach, 0) : bottom + reach, max(left - reach, 0) : right + reach]
    within, near = mask[window] > 0, pixels[window]
    ring = (ndimage.distance_transform_edt(~within) <= reach) & ~within
    if not ring.any():
        return 0.0
    inside, outside = near[within], near[ring]
    distance = np.linalg.norm(inside.mean(0) - outside.mean(0))
    spread = (np.linalg.norm(inside.std(0)) + np.linalg.norm(outside.std(0))) / 2
    return float(distance / (distance + spread + 1e-9))


def _merged(labels: np.ndarray, pixels: np.ndarray) -> Iterator[Any]:
    """Join the two neighbours that are most alike until one segment is left, and yield every joint one (a regionprops).

    Alike is Ward's criterion: the sum of squares of the colours that joining adds, so that small ones go first.
    """
    count = int(labels.max()) + 1
    size = np.bincount(labels.ravel(), minlength=count).astype(float)
    mean = np.stack([np.bincount(labels.ravel(), pixels[..., c].ravel(), count) for c in range(3)], 1) / size[:, None]
    touching = np.zeros((count, count), dtype=bool)
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        touching[one, other] = touching[other, one] = True
    np.fill_diagonal(touching, False)
    labels = labels.copy()
    for _ in range(count - 1):
        rows, columns = np.nonzero(np.triu(touching))
        added = size[rows] * size[columns] / (size[rows] + size[columns]) * ((mean[rows] - mean[columns]) ** 2).sum(1)
        i, j = rows[added.argmin()], columns[added.argmin()]
        mean[i] = (size[i] * mean[i] + size[j] * mean[j]) / (size[i] + size[j])
        size[i] += size[j]
        touching[i] |= touching[j]
        touching[:, i] |= touching[:, j]
        touching[j], touching[:, j], touching[i, i] = False, False, False
        labels[labels == j] = i
        if size[i] <= 0.6 * labels.size:
            yield measure.regionprops((labels == i).astype(np.uint8))[0]


def _resized(mask: dict, size: tuple[int, int]) -> dict:
    """Return an RLE mask at another `size` (width, height)."""
    if mask["size"] == [size[1], size[0]]:
        return mask
    full = Image.fromarray(coco.decode(mask)).resize(size, Image.Resampling.NEAREST)
    return coco.encode(np.asfortranarray(full))
