"""Candidate regions, and the table of pairs that everything later stands on.

A frame of candidates has one row a candidate, the rows of an image together and in the order of `ds.images`, and columns
image_id, x, y, w, h (pixels) and, where known, ann_id, score, segmentation (a mask in every row). Every image has at least
one. What was clipped, left out or added is in `frame.attrs["counts"]`, in words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco

from .datasets import (CLIPPED, NO_AREA, XYWH, DatasetError, ReferDataset, box_array, clip_boxes, drop_degenerate, is_matrix,
                       read_json, read_table, refuse)  # fmt: skip

MAX_OUTLINE = 2_000_000  # pixels along the polygons of one mask: COCO's code takes about 300 bytes for each


def ground_truth(ds: ReferDataset) -> pd.DataFrame:
    """Return every annotation that is no crowd as a candidate, with its ann_id and, unless all are unknown, its mask.

    An image with none gets the whole image, ann_id -1.

    >>> from bsap_utils.datasets import load_refer
    >>> list(ground_truth(load_refer("data/refshapes", "refshapes")).columns)
    ['image_id', 'x', 'y', 'w', 'h', 'ann_id', 'segmentation']
    """
    crowd = ds.annotations["iscrowd"] != 0
    frame = ds.annotations[~crowd].reset_index(names="ann_id")[["image_id", *XYWH, "ann_id", "segmentation"]]
    mean_crowds = int(ds.expressions["ann_id"].isin(ds.annotations.index[crowd]).sum())
    counts = {"crowd regions left out": int(crowd.sum()), "expressions that mean a crowd region": mean_crowds}
    return _complete(frame, ds, counts)


def whole_images(ds: ReferDataset) -> pd.DataFrame:
    """Return each image as its only candidate."""
    sides = {"x": 0.0, "y": 0.0, "w": ds.images["width"].astype(float), "h": ds.images["height"].astype(float)}
    return ds.images.assign(**sides).reset_index(names="image_id")[["image_id", *XYWH]]


def from_boxes(
    ds: ReferDataset, path: str | Path, score_threshold: float | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """Return the boxes of a detector as candidates.

    `path` is a JSON file of either kind, told apart by its content: ReCLIP's (Subramanian et al., ACL 2022), image id →
    list of [x, y, w, h] in pixels, or COCO results, a list of {image_id, bbox, score} and perhaps segmentation; an image
    is named by its id or its file name. `score_threshold` keeps scores at or above it, `top_k` then the best of each image.

    Boxes are clipped to their image and left out where nothing remains; those of other images are ignored; an image
    without a box gets the whole image. Raises DatasetError for a file that is wrong, or whose boxes seem to be of another
    form (`check_boxes`), and ValueError for `top_k` < 1.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> list(from_boxes(val, "data/refshapes/refshapes_dets_dict.json").columns)
    ['image_id', 'x', 'y', 'w', 'h']
    """
    frame, counts = _of_images(_read_boxes(read_json(Path(path)), Path(path), ds), ds, path, "boxes")
    check_boxes(ds, frame, path)
    sizes = ds.images.loc[frame["image_id"], ["width", "height"]].to_numpy()
    boxes, has_area, clipped = clip_boxes(frame[XYWH].to_numpy(), sizes)
    frame = frame.assign(**dict(zip(XYWH, boxes.T, strict=True)))[has_area]
    counts |= {CLIPPED: int(clipped.sum()), NO_AREA: int((~has_area).sum())}
    if score_threshold is not None:
        _need_scores(frame, path)
        kept = frame["score"] >= score_threshold
        frame, counts["boxes below the score threshold left out"] = frame[kept], int((~kept).sum())
    return _complete(_best(frame, top_k, counts, path), ds, counts)


def from_masks(ds: ReferDataset, path: str | Path, top_k: int | None = None, min_area: int | None = None,
               nms_iou: float | None = None) -> pd.DataFrame:  # fmt: skip
    """Return the masks of a segmenter as candidates, each with the tight box of its mask.

    `path` is a JSON file of COCO results, a list of {image_id, segmentation, score}: all that `to_rle` takes, or null
    beside a bbox, which then is the mask. `min_area` keeps masks of at least that many pixels; `nms_iou` is non-maximum
    suppression; `top_k` then keeps the best of each image. The column segmentation holds compressed RLE.

    Empty masks and masks of other images are left out, an image without a mask gets the whole image. Raises DatasetError
    for a wrong entry, ValueError for `top_k` < 1 or `nms_iou` outside 0 … 1.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> list(from_masks(val, "data/refshapes/refshapes_masks.json", top_k=10).columns)
    ['image_id', 'x', 'y', 'w', 'h', 'score', 'segmentation']
    """
    if nms_iou is not None and not 0 <= nms_iou <= 1:
        raise ValueError(f"nms_iou is {nms_iou}: an IoU between 0 and 1 is needed.")
    content = read_json(Path(path))
    kinds = {"image_id": object, "segmentation": object} | ({"score": float} if _scored(content) else {})
    frame = read_table(content, f"{path}: entry ", **{**kinds, "image_id": int})
    frame["bbox"] = [entry.get("bbox") for entry in content]
    frame, counts = _of_images(frame, ds, path, "masks")
    rles = []
    for entry, row in zip(frame.index, frame.itertuples(), strict=True):
        height, width = ds.images.loc[row.image_id, ["height", "width"]]
        try:
            segmentation = drop_degenerate(row.segmentation, height, width)[0]
            rles.append(
                to_rle(segmentation, height, width) if segmentation else _box_rles([row.bbox], height, width)[0]
            )
        except (DatasetError, TypeError, ValueError, IndexError) as error:
            raise DatasetError(f"{path}: entry [{entry}], key 'segmentation': {error}. Correct this entry.") from error
    boxes, area = np.reshape(coco.toBbox(rles) if rles else [], (-1, 4)), mask_areas(rles)
    frame = frame.drop(columns=["bbox", "segmentation"]).assign(**dict(zip(XYWH, boxes.T, strict=True)))
    frame["segmentation"] = pd.Series(rles, dtype=object, index=frame.index)
    frame = frame[["image_id", *XYWH, *(["score"] if "score" in frame else []), "segmentation"]]
    small = (area > 0) & (area < (min_area or 0))
    counts |= {"empty masks left out": int((area == 0).sum())}
    counts |= {f"masks of less than {min_area} pixels left out": int(small.sum())} if min_area else {}
    frame = frame[(area > 0) & ~small]
    if nms_iou is not None:
        _need_scores(frame, path)
        ranked = frame.sort_values("score", ascending=False, kind="stable").groupby("image_id")["segmentation"]
        kept = ranked.transform(lambda masks: suppress(masks.tolist(), nms_iou)).astype(bool).reindex(frame.index)
        frame, counts[f"masks with IoU > {nms_iou:g} with a better one left out"] = frame[kept], int((~kept).sum())
    return _complete(_best(frame, top_k, counts, path), ds, counts)


def load_candidates(ds: ReferDataset, source: str, root: str | Path, **options: Any) -> pd.DataFrame:
    """Return the candidates that `source` names.

    "gt", "whole" (the image itself), "detections", "rpn" and "masks" (`root/<dataset>_dets_dict.json`, `_rpn_dict.json`,
    `_masks.json`), or a JSON file: COCO results that have a segmentation are masks, all else is boxes. `options` go to
    `from_boxes` or `from_masks`.
    """
    if source in ("gt", "whole"):
        return ground_truth(ds) if source == "gt" else whole_images(ds)
    named = {"detections": "dets_dict", "rpn": "rpn_dict", "masks": "masks"}.get(source)
    path = Path(root) / f"{ds.name}_{named}.json" if named else Path(source)
    content = read_json(path) if not named else None
    has_masks = isinstance(content, list) and any(type(one) is dict and one.get("segmentation") for one in content)
    return (from_masks if source == "masks" or has_masks else from_boxes)(ds, path, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """One row for each expression and candidate of its image, by expression, then candidate: 1-D tensors [P].

    expression, candidate, image   row numbers in ds.expressions, the candidates, ds.images: int64
    iou                            of the candidate with the target: float64
    intersection, union            of the two masks in pixels, where masks were asked for: int64
    """

    expression: torch.Tensor
    candidate: torch.Tensor
    image: torch.Tensor
    iou: torch.Tensor
    intersection: torch.Tensor | None = None
    union: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.expression)

    def frame(self) -> pd.DataFrame:
        """Return the table as a DataFrame, one column a tensor."""
        return pd.DataFrame({name: tensor.numpy() for name, tensor in vars(self).items() if tensor is not None})


def pair_up(ds: ReferDataset, candidates: pd.DataFrame, masks: bool = False) -> Pairs:
    """Return the pairs of every expression and every candidate of its image, with the IoU of candidate and target.

    The IoU is of boxes, or with `masks` of masks; each distinct (target, candidate) is computed once, from COCO's RLE. An
    empty mask has IoU 0 even with another. Raises DatasetError for an image without a candidate and, with `masks`, for
    candidates without and for a target whose mask is unknown.

    >>> from bsap_utils.datasets import load_refer
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> pairs = pair_up(val, ground_truth(val))
    >>> len(val.expressions), int((pairs.iou == 1).sum()) >= 960
    (960, True)
    """
    targets, target_of = np.unique(ds.annotations.index.get_indexer(ds.expressions["ann_id"]), return_inverse=True)
    truth = ds.annotations.iloc[targets]
    target, candidate, start = _of_same_image(truth["image_id"], candidates["image_id"], ds)
    if masks:
        iou, intersection, union = _mask_overlaps(ds, truth, candidates, start, len(candidate))
    else:
        iou = box_iou(truth[XYWH].to_numpy()[target], candidates[XYWH].to_numpy()[candidate])
    count = np.diff(start)[target_of]
    first = np.repeat(np.cumsum(count) - count, count)
    row = np.repeat(start[:-1][target_of], count) + np.arange(count.sum()) - first
    expression = np.repeat(np.arange(len(ds.expressions)), count)
    image = ds.images.index.get_indexer(ds.expressions["image_id"])[expression]
    columns = [expression, candidate[row], image, iou[row]]
    columns += [intersection[row], union[row]] if masks else []
    return Pairs(*map(torch.from_numpy, columns))


def _of_same_image(
    targets: pd.Series, candidates: pd.Series, ds: ReferDataset
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of targets and candidates [N] of one image, target by target, and where each target's begin [T + 1]."""
    image, of = ds.images.index.get_indexer(targets), ds.images.index.get_indexer(candidates)
    order = np.argsort(of, kind="stable")
    low, high = np.searchsorted(of[order], image), np.searchsorted(of[order], image, side="right")
    refuse(low == high, "image ", "has expressions but no candidate", targets.to_numpy())
    start = np.r_[0, np.cumsum(high - low)]
    target = np.repeat(np.arange(len(targets)), high - low)
    return target, order[np.arange(start[-1]) - start[target] + low[target]], start


def _mask_overlaps(
    ds: ReferDataset, truth: pd.DataFrame, candidates: pd.DataFrame, start: np.ndarray, total: int
) -> tuple:
    """Return IoU, intersection and union (pixels) of each target's mask with the candidates of its image: [N] each."""
    if "segmentation" not in candidates:
        raise DatasetError("The candidates are boxes, but segmentation needs masks: use ground_truth or from_masks.")
    unknown = int(truth["segmentation"].isna().sum())
    if unknown:
        raise DatasetError(f"{unknown} of the {len(truth)} targets have no mask (segmentation null or []), which RIS needs: add "
                           "them to the annotations, or use REC.")  # fmt: skip
    iou, intersection, union = np.zeros(total), np.zeros(total, np.int64), np.zeros(total, np.int64)
    rows_of, position = candidates.groupby("image_id").indices, truth.groupby("image_id").indices
    for image_id, targets in position.items():
        height, width = (int(side) for side in ds.images.loc[image_id, ["height", "width"]])
        try:
            ours, theirs = ([to_rle(one, height, width) for one in frame["segmentation"].iloc[rows]]
                            for frame, rows in ((candidates, rows_of[image_id]), (truth, targets)))  # fmt: skip
        except DatasetError as error:
            raise DatasetError(f"Image {image_id}: a mask cannot be used: {error}.") from error
        overlap = np.reshape(coco.iou(ours, theirs, [0] * len(theirs)), (len(ours), len(theirs)))
        both = np.add.outer(mask_areas(ours), mask_areas(theirs))
        shared = np.rint(overlap * both / (1 + overlap)).astype(
            np.int64
        )  # IoU = I / (A + B - I), and I is whole pixels
        place = (start[targets] + np.arange(len(ours))[:, None]).T
        iou[place], intersection[place], union[place] = overlap.T, shared.T, (both - shared).T
    return iou, intersection, union


def check_boxes(ds: ReferDataset, boxes: pd.DataFrame, source: str | Path) -> None:
    """Raise DatasetError where `boxes`, as they stand in a file, seem not to be [x, y, w, h] in pixels of these pictures.

    That is: all numbers are at most 1, over 20 % leave their picture by a pixel or have no area, or fewer than 20 % of at
    least ten targets have a box with IoU > 0.5. The message says which other reading fits the targets.
    """
    array, sizes = boxes[XYWH].to_numpy(), ds.images.loc[boxes["image_id"], ["width", "height"]].to_numpy()
    if not len(array):
        return
    outside = (array[:, :2] < -1).any(1) | (array[:, :2] + array[:, 2:] > sizes + 1).any(1) | ~(array[:, 2:] > 0).all(1)
    truth = ds.annotations.loc[ds.expressions["ann_id"].unique()]
    truth = truth[truth["image_id"].isin(boxes["image_id"])]
    target, box, start = _of_same_image(truth["image_id"], boxes["image_id"], ds)

    def ceiling(array: np.ndarray) -> float:
        fits = box_iou(truth[XYWH].to_numpy()[target], array[box]) > 0.5
        return float(np.logical_or.reduceat(fits, start[:-1]).mean()) if len(truth) else 0.0

    reached, shares = ceiling(array), bool((np.abs(array) <= 1).all())
    if not shares and outside.mean() <= 0.2 and (reached >= 0.2 or len(truth) < 10):
        return
    scale, (near, far) = np.hstack([sizes, sizes]), (array[:, :2], array[:, 2:])
    forms = {
        "corners [x1, y1, x2, y2]": np.hstack([near, far - near]),
        "centres [cx, cy, w, h]": np.hstack([near - far / 2, far]),
    }
    forms |= {
        f"{name} as shares of the picture": form * scale for name, form in {**forms, "[x, y, w, h]": array}.items()
    }
    best = max(forms, key=lambda name: ceiling(forms[name]))
    looks = (
        f"They look like {best}"
        if ceiling(forms[best]) > max(reached, 0.2)
        else (
            "They look like shares of the picture"
            if shares
            else "They look like boxes of other pictures or of another size"
        )
    )
    raise DatasetError(f"{source}: {outside.mean():.0%} of the boxes leave their picture or have no area, and {reached:.0%} of the "
                       f"targets have a box that fits. {looks}; write them as [x, y, w, h] in pixels.")  # fmt: skip


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes `a` and `b` [..., 4] (xywh), row by row: [...]; 0 where neither has an area.

    >>> box_iou(np.array([[0, 0, 10, 10], [0, 0, 1, 1]]), np.array([[5, 0, 10, 10], [2, 2, 1, 1]])).round(3)
    array([0.333, 0.   ])
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    far = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(far - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0).clip(0, 1)


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Return COCO's compressed RLE of a mask: from polygons, an RLE of either kind, or a matrix of true and false or 0 and 1.

    Raises DatasetError for anything else: an RLE of another size or whose runs do not fill the image exactly, a polygon of
    less than three points, an outline too long.

    >>> to_rle([[0, 0, 3, 0, 3, 2, 0, 2]], 2, 4)["size"]
    [2, 4]
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size not in ([height, width], (height, width)):
            raise DatasetError(f"RLE of size {size}, but its image has {[height, width]} (height, width)")
        try:
            runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else _runs(counts)
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise DatasetError("RLE whose counts cannot be read") from error
        if runs.ndim != 1 or ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
            raise DatasetError(
                f"RLE whose runs do not fill its image of {height}×{width}"
            )  # pycocotools would show stray memory
        return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    if is_matrix(segmentation, height, width):
        return coco.encode(np.asfortranarray(segmentation, dtype=np.uint8))
    try:
        polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
    except (ValueError, TypeError) as error:
        raise DatasetError("segmentation that is neither RLE, polygons nor a matrix of the picture's size") from error
    if not polygons or any(polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise DatasetError("polygon that is no list [x, y, x, y, …] of three points or more")
    if type(segmentation[0][0]) is bool:
        raise DatasetError(
            f"matrix of true and false of another size than its image, which has {height} rows of {width}"
        )
    if not all((np.abs(polygon) <= 10 * (height + width)).all() for polygon in polygons):  # no NaN either
        raise DatasetError("polygon with a point far outside of its image")
    if sum(np.abs(np.diff(polygon.reshape(-1, 2), axis=0)).sum() for polygon in polygons) > MAX_OUTLINE:
        raise DatasetError(f"polygon whose outline is longer than {MAX_OUTLINE:,} pixels")
    return coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], height, width))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Return the masks of regions of one image: [N, H, W] bool, from segmentations that `to_rle` takes.

    >>> decode_masks([{"size": [2, 3], "counts": [1, 2, 3]}], 2, 3).sum((1, 2))
    array([2])
    """
    masks = coco.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


def mask_areas(masks: Sequence[dict]) -> np.ndarray:
    """Return the number of pixels of each of `masks` (compressed RLE): int64 [N]."""
    blocks = [coco.area(masks[i : i + 128]) for i in range(0, len(masks), 128)]  # pycocotools 2.0 fails on over 255
    return np.concatenate([np.zeros(0, dtype=np.int64), *blocks]).astype(np.int64)


def suppress(masks: Sequence[dict], threshold: float) -> np.ndarray:
    """Return which of `masks` (RLE of one image, best first) stay: bool [N].

    One stays when no better one that stays has an IoU above `threshold` with it.
    """
    overlaps = np.reshape(coco.iou(masks, masks, [0] * len(masks)), (len(masks), len(masks))) > threshold
    stays = np.ones(len(masks), dtype=bool)
    for i in range(len(masks)):
        stays[i + 1 :] &= ~(stays[i] & overlaps[i, i + 1 :])
    return stays


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


def _box_rles(boxes: Any, height: int, width: int) -> list[dict]:
    return coco.frPyObjects(np.array(boxes, dtype=np.float64).reshape(-1, 4), height, width)


def _scored(content: Any) -> bool:
    return isinstance(content, list) and any(type(entry) is dict and "score" in entry for entry in content)


def _read_boxes(content: Any, path: Path, ds: ReferDataset) -> pd.DataFrame:
    """Return image_id, x, y, w, h and, from COCO results, score and perhaps segmentation, one row a box of the file."""
    ids = dict(zip(ds.images["file_name"], ds.images.index, strict=True))
    if type(content) is dict:
        for key, boxes in content.items():
            if type(boxes) is not list or not (key in ids or re.fullmatch("-?[0-9]{1,18}", key)):
                raise DatasetError(
                    f"{path}: entry {key!r} is no image id or file name of {ds.name} with a list of boxes."
                )
        keys = list(chain.from_iterable([key] * len(boxes) for key, boxes in content.items()))
        array = box_array(chain.from_iterable(content.values()), f"{path}: entry ", keys)
        numbers = np.array([ids[key] if key in ids else int(key) for key in keys], dtype=np.int64)
        return pd.DataFrame({"image_id": numbers, **dict(zip(XYWH, array.T, strict=True))})
    if isinstance(content, list):
        content = [{**one, "image_id": ids.get(one.get("image_id"), one.get("image_id"))} if type(one) is dict
                   and type(one.get("image_id")) is str else one for one in content]  # fmt: skip
    kinds = {"image_id": int, "bbox": list, **({"score": float} if _scored(content) else {}), "segmentation": object}
    frame = read_table(content, f"{path}: entry ", **kinds)
    if "score" in frame:
        refuse(frame["score"].isna(), f"{path}: entry ", "'score' is NaN")
    frame[XYWH] = box_array(frame.pop("bbox"), f"{path}: entry ")
    masked = ["segmentation"] if frame["segmentation"].notna().any() else []
    return frame[["image_id", *XYWH, *(["score"] if "score" in frame else []), *masked]]


def _of_images(
    frame: pd.DataFrame, ds: ReferDataset, path: str | Path, what: str
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the rows of images of `ds`, in their order, and how many others there were."""
    image = ds.images.index.get_indexer(frame["image_id"])
    if len(image) and (image < 0).all():
        raise DatasetError(f"{path}: none of its {len(frame)} {what} is of an image of {ds.name}: image ids such as "
                           f"{frame['image_id'].iloc[0]}, not {ds.images.index[0]}. Key them by image id.")  # fmt: skip
    order = np.argsort(image, kind="stable")
    return frame.iloc[order[image[order] >= 0]], {
        f"{what} of images outside the data set ignored": int((image < 0).sum())
    }


def _need_scores(frame: pd.DataFrame, path: str | Path) -> None:
    if "score" not in frame:
        raise DatasetError(
            f"{path}: has no scores, so score_threshold, top_k and nms_iou cannot choose. Leave them out."
        )


def _best(frame: pd.DataFrame, top_k: int | None, counts: dict[str, int], path: str | Path) -> pd.DataFrame:
    """Return the `top_k` candidates of each image with the highest scores, of equals the first; count the others."""
    if top_k is None:
        return frame
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}: each image needs at least one candidate.")
    _need_scores(frame, path)
    kept = frame.groupby("image_id")["score"].rank(method="first", ascending=False) <= top_k
    counts[f"candidates beyond the best {top_k} of their image left out"] = int((~kept).sum())
    return frame[kept]


def _complete(frame: pd.DataFrame, ds: ReferDataset, counts: dict[str, int]) -> pd.DataFrame:
    """Give images without a candidate the whole image, put the rows of an image together, a mask in each row or in none."""
    whole = whole_images(ds)
    whole = whole[~whole["image_id"].isin(frame["image_id"])]
    added = {key: value for key, value in {"ann_id": -1, "score": np.nan, "segmentation": None}.items() if key in frame}
    frame = pd.concat([frame, whole.assign(**added)[list(frame.columns)].astype(frame.dtypes)]) if len(whole) else frame
    frame = frame.iloc[np.argsort(ds.images.index.get_indexer(frame["image_id"]), kind="stable")].reset_index(drop=True)
    if "segmentation" in frame:
        unknown = frame["segmentation"].isna().to_numpy()
        sizes = ds.images.loc[frame.loc[unknown, "image_id"], ["height", "width"]].to_numpy().tolist()
        boxes = frame.loc[unknown, XYWH].to_numpy()
        masks = [_box_rles(box, *size)[0] for box, size in zip(boxes, sizes, strict=True)]
        frame.loc[unknown, "segmentation"] = pd.Series(masks, index=frame.index[unknown], dtype=object)
        frame = frame.drop(columns="segmentation") if unknown.all() else frame
    frame.attrs["counts"] = counts | {"images without a candidate, given the whole image as one": len(whole)}
    return frame
