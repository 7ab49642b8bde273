"""Masks for those who have none: felzenszwalb, which needs no weights, and Segment Anything for those who have its."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage
from skimage import color, measure, segmentation
from tqdm.auto import tqdm

from .datasets import ReferDataset, write_file
from .regions import suppress

Segmenter = Callable[[Image.Image], "tuple[Sequence[dict], np.ndarray]"]
SCALES, LONGEST = (50, 100, 200, 400, 800), 400  # from parts to things, in an image of at most so many pixels a side


def felzenszwalb(image: Image.Image, top_k: int = 40) -> tuple[list[dict], np.ndarray]:
    """Segment an image by colour: masks (compressed RLE, [N]) and scores in 0..1 [N], best first.

    Felzenszwalb and Huttenlocher's (IJCV 2004), at several scales. The score is the contrast with a ring around, less for
    small segments and those that touch sides of the image. Of two with IoU > 0.8 the better stays.
    """
    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    lab, found = color.rgb2lab(np.asarray(small)), []
    for scale in SCALES:
        labels = segmentation.felzenszwalb(np.asarray(small), scale=scale, sigma=0.8, min_size=50)
        for one in measure.regionprops(labels + 1):
            if 0.001 <= (share := one.area_filled / labels.size) <= 0.6:
                mask = np.zeros(labels.shape, dtype=bool)
                mask[one.slice] = one.image_filled
                sides = mask[0].any() + mask[-1].any() + mask[:, 0].any() + mask[:, -1].any()
                found.append((_contrast(mask, lab) * min(1.0, share**0.5 / 0.12) * 0.6**sides, mask))
    found.sort(key=lambda one: -one[0])
    sized = (Image.fromarray(mask).resize(image.size) for _, mask in found)  # of black and white: the nearest pixel
    masks = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in sized]
    stays = np.flatnonzero(suppress(masks, 0.8))[:top_k]
    return [masks[i] for i in stays], np.array([found[i][0] for i in stays])


def _contrast(mask: np.ndarray, lab: np.ndarray) -> float:
    reach = max(2, round(0.08 * mask.sum() ** 0.5))
    inside, outside = lab[mask], lab[ndimage.binary_dilation(mask, iterations=reach) & ~mask]
    distance = np.linalg.norm(inside.mean(0) - outside.mean(0))
    spread = (np.linalg.norm(inside.std(0)) + np.linalg.norm(outside.std(0))) / 2
    return float(distance / (distance + spread + 1e-9))


def sam(model: str = "facebook/sam-vit-base", **options: Any) -> Segmenter:
    """Return Segment Anything (Kirillov et al. 2023): a model of the hub or a folder, options of transformers' pipeline."""
    try:
        from transformers import pipeline

        generate = pipeline("mask-generation", model=model, **options)
    except Exception as error:  # ImportError, or whatever the hub and damaged files lead to
        advice = "install bsap-utils[sam], pass a folder with its files, or use felzenszwalb"
        raise RuntimeError(
            f"SAM cannot be loaded from {model!r} ({' '.join(str(error).split())}): {advice}."
        ) from error

    def segment(image: Image.Image) -> tuple[list[dict], np.ndarray]:
        found = generate(image.convert("RGB"))
        masks = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in found["masks"]]
        return masks, np.array([float(score) for score in found["scores"]])  # best first

    return segment


def write_masks(ds: ReferDataset, segment: Segmenter, path: str | Path) -> int:
    """Segment every image of `ds` into a file of COCO results; return how many masks."""
    entries = []
    for image_id in tqdm(ds.images.index, desc="Segmenting images", unit="image"):
        for mask, score in zip(*segment(ds.load_image(image_id)), strict=True):
            rle = mask | {"counts": mask["counts"].decode()}
            entries.append({"image_id": int(image_id), "segmentation": rle, "score": round(float(score), 4)})
    write_file(path, json.dumps(entries, separators=(",", ":")).encode())
    return len(entries)
