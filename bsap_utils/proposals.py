"""Candidate regions: ground truth, boxes of a detector, or masks of a segmenter.

A frame of candidates has one row a candidate, rows of one image together, and columns image_id, x, y, w, h (pixels)
and, where known, ann_id, score, segmentation. Every image of the data set has at least one candidate. What was clipped,
left out or added is in `frame.attrs["counts"]`, by plain-English key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools import mask as coco

from .datasets import CLIPPED, NO_AREA, XYWH, DatasetError, ReferDataset, box_array, clip_boxes, column, read_json

_WHOLE = "images without a candidate, given the whole image as one"
_ENTRY = "entry [{}]".format
_REMEDY = "Pass a JSON file {image id: [[x, y, w, h], …]} or [{'image_id': …, 'bbox': [x, y, w, h], 'score': …}]."
_MASK_REMEDY = "Pass JSON as COCO has it: [{'image_id': …, 'segmentation': {'size': [h, w], 'counts': …}, 'score': …}]."


def ground_truth(ds: ReferDataset) -> pd.DataFrame:
    """Return every annotation that is no crowd as a candidate, with its ann_id and segmentation.

    An image with none gets the whole image, ann_id -1. `attrs["counts"]` tells how many crowds stayed out, and how many
    expressions mean one, so that no method can be right about them.

    >>> from bsap_utils.datasets import load_refer
    >>> list(ground_truth(load_refer("data/refshapes", "refshapes")).columns)
    ['image_id', 'x', 'y', 'w', 'h', 'ann_id', 'segmentation']
    """
    crowd = ds.regions["iscrowd"] != 0
    frame = ds.regions[~crowd].reset_index(names="ann_id")[["image_id", *XYWH, "ann_id", "segmentation"]]
    counts = {
        "crowd regions left out": int(crowd.sum()),
        "expressions that mean a crowd region": int(ds.expressions["ann_id"].isin(ds.regions.index[crowd]).sum()),
    }
    return _complete(frame, ds, counts)


def from_boxes(
    ds: ReferDataset, path: str | Path, score_threshold: float | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """Return the boxes of a detector as candidates.

    `path` is a JSON file of either kind, told apart by its content: ReCLIP's (Subramanian et al., ACL 2022), image id →
    list of [x, y, w, h] in pixels, or COCO results, a list of {image_id, bbox, score} and perhaps segmentation. Where
    there are scores, `score_threshold` keeps those at or above it, and `top_k` then the best of each image. Boxes of
    one image stay in the order of the file.

    Boxes are clipped to their image, and left out where nothing remains. Boxes of images that `ds` does not have are
    ignored; an image of `ds` without a box gets the whole image. `attrs["counts"]` has the number of each. Raises
    DatasetError for a file that is of neither kind, has a wrong entry, or has no scores when they are asked for,
    and ValueError for `top_k` < 1.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> list(from_boxes(val, "data/refshapes/refshapes_dets_dict.json").columns)
    ['image_id', 'x', 'y', 'w', 'h']
    """
    path = Path(path)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: each image needs at least one candidate.")
    frame = _read_boxes(read_json(path), path)
    if "score" not in frame and (score_threshold is not None or top_k is not None):
        raise DatasetError(f"{path}: has no scores (image id → boxes), so score_threshold and top_k cannot choose. Leave "
                           "them out, or pass COCO results with 'score'.")  # fmt: skip
    read, image = len(frame), ds.images.index.get_indexer(frame["image_id"])
    frame, image = frame[image >= 0], image[image >= 0]
    if read and not len(frame):
        raise DatasetError(
            f"{path}: none of its {read} boxes is of an image of {ds.name}. Pass this data set's own file."
        )
    counts = {"boxes of images outside the data set ignored": read - len(frame)}
    boxes, has_area, clipped = clip_boxes(frame[XYWH].to_numpy(), ds.images[["width", "height"]].to_numpy()[image])
    frame = frame.assign(**dict(zip(XYWH, boxes.T, strict=True)))[has_area]
    counts |= {CLIPPED: int(clipped.sum()), NO_AREA: int((~has_area).sum())}
    if score_threshold is not None:
        kept = frame["score"] >= score_threshold
        frame, counts["boxes below the score threshold left out"] = frame[kept], int((~kept).sum())
    return _complete(_best(frame, top_k, counts, "boxes"), ds, counts)


def from_masks(ds: ReferDataset, path: str | Path, top_k: int | None = None, min_area: int | None = None,
               nms_iou: float | None = None) -> pd.DataFrame:  # fmt: skip
    """Return the masks of a segmenter as candidates, each with the tight box of its mask.

    `path` is a JSON file of COCO results, a list of {image_id, segmentation, score}: RLE, compressed or not, or
    polygons; `score` may lack in all of them. `min_area` keeps masks of at least that many pixels; `nms_iou` is
    non-maximum suppression, which keeps a mask when no better one that is kept has a larger IoU with it; `top_k` then
    keeps the best of each image (of equals the first in the file). Masks of one image stay in the order of the file.
    The column segmentation holds compressed RLE; nothing is decoded.

    Empty masks, and masks of images that `ds` does not have, are left out; an image of `ds` without a mask gets the
    whole image (segmentation None). `attrs["counts"]` has the number of each. Raises DatasetError for a file that is
    no such list, has a wrong entry (a damaged RLE, one of another size than its image), or has no scores when `top_k`
    or `nms_iou` asks for them, and ValueError for `top_k` < 1 or `nms_iou` outside 0 … 1.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> list(from_masks(val, "data/refshapes/refshapes_masks.json", top_k=10).columns)
    ['image_id', 'x', 'y', 'w', 'h', 'score', 'segmentation']
    """
    path = Path(path)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: each image needs at least one candidate.")
    if nms_iou is not None and not 0 <= nms_iou <= 1:
        raise ValueError(f"nms_iou is {nms_iou}: an IoU between 0 and 1 is needed.")
    frame = _read_masks(read_json(path), path, ds.images)
    if "score" not in frame and (top_k is not None or nms_iou is not None):
        raise DatasetError(
            f"{path}: has no scores, so top_k and nms_iou cannot choose. Leave them out, or add 'score'."
        )
    rles, area = frame["segmentation"].tolist(), frame.pop("area")
    boxes = coco.toBbox(rles).reshape(-1, 4) if rles else np.zeros((0, 4))
    columns = ["image_id", *XYWH, "score", "segmentation"]
    frame = frame.assign(**dict(zip(XYWH, boxes.T, strict=True)))[[name for name in columns if name in [*frame, *XYWH]]]
    counts = {"masks of images outside the data set ignored": frame.attrs.pop("ignored")}
    keep = area > 0
    counts["empty masks left out"] = int((~keep).sum())
    if min_area is not None:
        small = keep & (area < min_area)
        keep, counts[f"masks of less than {min_area} pixels left out"] = keep & ~small, int(small.sum())
    frame = frame[keep]
    if nms_iou is not None:
        best_first = frame.sort_values("score", ascending=False, kind="stable")
        kept = best_first.groupby("image_id")["segmentation"].transform(lambda masks: suppress(masks.tolist(), nms_iou))
        kept = kept.astype(bool).reindex(frame.index)
        frame, counts[f"masks with IoU > {nms_iou:g} with a better one left out"] = frame[kept], int((~kept).sum())
    return _complete(_best(frame, top_k, counts, "masks"), ds, counts)


def _best(frame: pd.DataFrame, top_k: int | None, counts: dict[str, int], what: str) -> pd.DataFrame:
    """Return the `top_k` candidates of each image with the highest scores, of equals the first; count the others."""
    if top_k is None:
        return frame
    kept = frame.groupby("image_id")["score"].rank(method="first", ascending=False) <= top_k
    counts[f"{what} beyond the best {top_k} of their image left out"] = int((~kept).sum())
    return frame[kept]


def mask_areas(masks: Sequence[dict]) -> np.ndarray:
    """Return the number of pixels of each of `masks` (compressed RLE): int64 [N].

    >>> mask_areas([to_rle(None, 3, 4)] * 300).sum()
    np.int64(3600)
    """
    blocks = [coco.area(masks[i : i + 128]) for i in range(0, len(masks), 128)]  # pycocotools 2.0 fails on over 255
    return np.concatenate([np.zeros(0, dtype=np.int64), *blocks]).astype(np.int64)


def suppress(masks: Sequence[dict], threshold: float) -> np.ndarray:
    """Return which of `masks` (RLE of one image, best first) stay after non-maximum suppression: bool [N].

    One stays when no better one that stays has an IoU above `threshold` with it.

    >>> masks = [to_rle({"size": [1, 4], "counts": counts}, 1, 4) for counts in ([0, 3, 1], [0, 4], [3, 1])]
    >>> suppress(masks, 0.5)
    array([ True, False,  True])
    """
    overlaps = np.reshape(coco.iou(masks, masks, [0] * len(masks)), (len(masks), len(masks))) > threshold
    stays = np.ones(len(masks), dtype=bool)
    for i in range(len(masks)):
        if stays[i]:
            stays[i + 1 :] &= ~overlaps[i, i + 1 :]
    return stays


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes `a` and `b` [N, 4] (xywh), row by row: [N]; 0 where neither has an area.

    >>> box_iou(np.array([[0, 0, 10, 10], [0, 0, 1, 1]]), np.array([[5, 0, 10, 10], [2, 2, 1, 1]])).round(3)
    array([0.333, 0.   ])
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    far = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(far - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0).clip(0, 1)


def load_proposals(ds: ReferDataset, source: str, root: str | Path, **options: Any) -> pd.DataFrame:
    """Return the frame of candidates that `source` names.

    "gt", "detections" (`root/<dataset>_dets_dict.json`), "masks" (`root/<dataset>_masks.json`), or a JSON file: COCO
    results that have a segmentation are masks, all else is boxes. `options` go to `from_boxes` or `from_masks`.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> len(load_proposals(val, "detections", "data/refshapes")) > 1000
    True
    """
    if source == "gt":
        return ground_truth(ds)
    if source in ("detections", "masks"):
        file = Path(root) / f"{ds.name}_{'dets_dict' if source == 'detections' else 'masks'}.json"
        return (from_boxes if source == "detections" else from_masks)(ds, file, **options)
    content = read_json(Path(source))
    has_masks = isinstance(content, list) and any(isinstance(one, dict) and one.get("segmentation") for one in content)
    return (from_masks if has_masks else from_boxes)(ds, source, **options)


def share_right(ds: ReferDataset, regions: pd.DataFrame, threshold: float = 0.5) -> pd.Series:
    """Return, for each expression, the share of its image's candidates that have IoU > `threshold` with the region meant.

    Its mean is the accuracy of a random choice; the share of expressions where it is above 0 is the ceiling of any method.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> float((share_right(val, ground_truth(val)) > 0).mean())
    1.0
    """
    meant = ds.regions.loc[ds.expressions["ann_id"].unique(), ["image_id", *XYWH]].reset_index(names="meant")
    pairs = meant.merge(regions[["image_id", *XYWH]], on="image_id", suffixes=("", "_candidate"))
    iou = box_iou(pairs[XYWH].to_numpy(), pairs[[f"{side}_candidate" for side in XYWH]].to_numpy())
    share = pd.Series(iou > threshold).groupby(pairs["meant"].to_numpy()).mean()
    return ds.expressions["ann_id"].map(share).fillna(0.0)


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Return COCO's compressed RLE of a region, from polygons or from an RLE of either kind; None is the whole image.

    Raises DatasetError for anything else: an RLE of another size, one whose runs do not fill the image exactly, a
    polygon of less than three points.

    >>> to_rle([[0, 0, 3, 0, 3, 2, 0, 2]], 2, 4)["size"]
    [2, 4]
    """
    if segmentation is None:
        segmentation = {"size": [height, width], "counts": [0, height * width]}
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size not in ([height, width], (height, width)):
            raise DatasetError(f"RLE of size {size}, but its image has {[height, width]} (height, width)")
        try:
            runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else _runs(counts)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise DatasetError("RLE whose counts cannot be read") from error
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:  # pycocotools would show stray memory
            raise DatasetError(f"RLE whose runs fill {runs.sum()} pixels, but its image has {height}×{width}")
        return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    try:
        polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    except (ValueError, TypeError) as error:
        raise DatasetError("segmentation that is neither RLE nor polygons") from error
    if not polygons or any(polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise DatasetError("polygon that is no list [x, y, x, y, …] of three points or more")
    if not all((np.abs(polygon) <= 10 * (height + width)).all() for polygon in polygons):  # no NaN either
        raise DatasetError("polygon with a point far outside of its image")
    return coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], height, width))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Return the masks of regions of one image: [N, H, W] bool, from `segmentations` that `to_rle` takes.

    An image at a time: the masks of RefCOCO val all at once would be 5 GB. Raises DatasetError.

    >>> decode_masks([None, {"size": [2, 3], "counts": [1, 2, 3]}], 2, 3).sum((1, 2))
    array([6, 2])
    """
    masks = coco.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


def _runs(counts: Any) -> np.ndarray:
    """Return the lengths of the runs of COCO's compressed RLE.

    Each number has five bits a character, low ones first, 32 marks that more follow, and 16 in the last that it is
    negative; from the fourth number on it is the difference to the number two before.
    """
    code = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, dtype=np.uint8).astype(np.int64) - 48
    end = np.flatnonzero((code & 32) == 0)
    start = np.r_[0, end[:-1] + 1]
    if not len(end) or end[-1] != len(code) - 1 or (code < 0).any() or (code > 63).any() or (end - start > 6).any():
        raise ValueError("damaged counts")
    place = np.arange(len(code)) - np.repeat(start, end - start + 1)
    runs = np.add.reduceat((code & 31) << 5 * place, start) - np.where(code[end] & 16, 32 << 5 * (end - start), 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def _read_boxes(content: Any, path: Path) -> pd.DataFrame:
    """Return image_id, x, y, w, h and, from COCO results, score and perhaps segmentation, one row a box of the file."""
    if type(content) is dict:
        for key, boxes in content.items():
            if type(boxes) is not list or not re.fullmatch("-?[0-9]{1,18}", key):
                raise DatasetError(f"{path}: entry {key!r} is no image id with a list of boxes. {_REMEDY}")
        keys = np.repeat(np.array(list(content), dtype=object), np.array(list(map(len, content.values())), dtype=int))
        boxes = box_array(list(chain.from_iterable(content.values())), path, lambda i: f"entry '{keys[i]}'")
        return pd.DataFrame({"image_id": keys.astype(np.int64), **dict(zip(XYWH, boxes.T, strict=True))})
    if type(content) is not list:
        raise DatasetError(f"{path}: is neither image id → boxes nor a list of COCO results. {_REMEDY}")
    boxes = box_array(column(content, "bbox", {list}, path, _ENTRY), path, lambda i: f"{_ENTRY(i)}, key 'bbox'")
    image_ids = np.array(column(content, "image_id", {int}, path, _ENTRY), dtype=np.int64)
    frame = pd.DataFrame({"image_id": image_ids, **dict(zip(XYWH, boxes.T, strict=True))})
    frame["score"] = _read_scores(content, path, _REMEDY)
    segmentation = pd.Series([entry.get("segmentation") for entry in content], dtype=object)
    return frame.assign(segmentation=segmentation) if segmentation.notna().any() else frame


def _read_masks(content: Any, path: Path, images: pd.DataFrame) -> pd.DataFrame:
    """Return image_id, segmentation (compressed RLE), area and perhaps score, one row a mask of an image of `images`.

    attrs["ignored"] is how many masks were of others.
    """
    if type(content) is not list:
        raise DatasetError(f"{path}: is no list of COCO results. {_MASK_REMEDY}")
    image_ids = np.array(column(content, "image_id", {int}, path, _ENTRY), dtype=np.int64)
    segmentations = column(content, "segmentation", {dict, list}, path, _ENTRY)
    scores = _read_scores(content, path, _MASK_REMEDY) if any("score" in entry for entry in content) else None
    image = images.index.get_indexer(image_ids)
    rows = np.flatnonzero(image >= 0)
    if len(content) and not len(rows):
        raise DatasetError(
            f"{path}: none of its {len(content)} masks is of an image of this data set. Pass its own file."
        )
    rles = []
    for row, (height, width) in zip(rows, images[["height", "width"]].to_numpy()[image[rows]].tolist(), strict=True):
        try:
            rles.append(to_rle(segmentations[row], height, width))
        except DatasetError as error:
            message = f"{path}: {_ENTRY(row)}, key 'segmentation' (image {image_ids[row]}): {error}. {_MASK_REMEDY}"
            raise DatasetError(message) from error
    frame = pd.DataFrame({"image_id": image_ids[rows], "segmentation": pd.Series(rles, dtype=object)})
    frame["area"] = mask_areas(rles)
    frame.attrs["ignored"] = len(content) - len(rows)
    return frame if scores is None else frame.assign(score=scores[rows])


def _read_scores(content: list, path: Path, remedy: str) -> np.ndarray:
    scores = np.array(column(content, "score", {int, float}, path, _ENTRY), dtype=np.float64)
    if np.isnan(scores).any():
        raise DatasetError(f"{path}: {_ENTRY(np.isnan(scores).argmax())}, key 'score': NaN is no score. {remedy}")
    return scores


def _complete(frame: pd.DataFrame, ds: ReferDataset, counts: dict[str, int]) -> pd.DataFrame:
    """Give images without a candidate the whole image, put the rows of an image together, and attach the counts."""
    images = ds.images[~ds.images.index.isin(frame["image_id"])]
    whole = pd.DataFrame({"image_id": images.index, "x": 0.0, "y": 0.0, "w": images["width"], "h": images["height"]})
    unknown = {"ann_id": -1, "score": np.nan, "segmentation": None}
    whole = whole.assign(**{key: value for key, value in unknown.items() if key in frame})[list(frame.columns)]
    frame = pd.concat([frame, whole.astype(frame.dtypes)]) if len(whole) else frame
    frame = frame.sort_values("image_id", kind="stable", ignore_index=True)
    frame.attrs["counts"] = counts | {_WHOLE: len(images)}
    return frame
