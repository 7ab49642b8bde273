"""Masks for those who have none: felzenszwalb, which needs no weights, and Segment Anything for those who have its."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage
from skimage import color, measure, segmentation
from tqdm.auto import tqdm

from .datasets import ReferDataset, write_file

SCALES, LONGEST = (50, 100, 200, 400, 800), 400  # from parts to things, in an image of at most so many pixels a side


def felzenszwalb(image: Image.Image, top_k: int = 40) -> tuple[list[dict], np.ndarray]:
    """Segment an image by colour: masks (compressed RLE, [N]) and scores in 0..1 [N], best first.

    Felzenszwalb and Huttenlocher's (IJCV 2004), at several scales. The score is the contrast with a ring around, less for
    small segments and those that touch a side of the image. Of two with IoU > 0.8 the better stays.
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
                ring = ndimage.binary_dilation(mask, iterations=max(2, round(0.08 * one.area_filled**0.5))) & ~mask
                distance = np.linalg.norm(lab[mask].mean(0) - lab[ring].mean(0))
                spread = np.mean([np.linalg.norm(lab[part].std(0)) for part in (mask, ring)])
                place = 0.6 if np.equal(one.bbox, (0, 0, *labels.shape)).any() else 1.0  # at a side of the image
                found.append((distance / (distance + spread + 1e-9) * min(1, share**0.5 / 0.12) * place, mask))
    masks, scores = list[dict](), list[float]()
    for score, mask in sorted(found, key=lambda one: -one[0]):
        sized = Image.fromarray(mask).resize(image.size)  # of black and white: the nearest pixel
        rle = coco.encode(np.asfortranarray(sized, dtype=np.uint8))
        if len(masks) < top_k and np.max(coco.iou([rle], masks, [0] * len(masks)), initial=0) <= 0.8:
            masks.append(rle)
            scores.append(score)
    return masks, np.array(scores)


def sam(model: str = "facebook/sam-vit-base", **options: Any) -> Callable:
    """Return Segment Anything (Kirillov et al. 2023): a model of the hub or a folder, options of transformers' pipeline."""
    try:
        from transformers import pipeline

        generate = pipeline("mask-generation", model=model, **options)
    except Exception as error:  # ImportError, or whatever the hub and damaged files lead to
        raise RuntimeError(f"No SAM in {model!r} ({error}): install bsap-utils[sam], or pass its folder.") from error

    def segment(image: Image.Image) -> tuple[list[dict], np.ndarray]:
        found = generate(image.convert("RGB"))
        masks = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in found["masks"]]
        return masks, np.array([float(score) for score in found["scores"]])  # best first

    return segment


def write_masks(ds: ReferDataset, segment: Callable, path: str | Path) -> int:
    """Segment every image of `ds` into a file of COCO results; return how many masks."""
    entries = []
    for image_id in tqdm(ds.images.index, desc="Segmenting images", unit="image"):
        for mask, score in zip(*segment(ds.load_image(image_id)), strict=True):
            rle = mask | {"counts": mask["counts"].decode()}
            entries.append({"image_id": int(image_id), "segmentation": rle, "score": round(float(score), 4)})
    write_file(path, json.dumps(entries, separators=(",", ":")).encode())
    return len(entries)
