"""Candidate regions, and the table of pairs that everything later stands on.

A frame of candidates has one row a candidate, in the order of `ds.images`, each of which has at least one: image_id, x, y,
w, h (pixels) and, where known, ann_id, score, segmentation (a mask in every row). What was clipped, left out or added is in
`frame.attrs["counts"]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco

from . import datasets
from .datasets import XYWH, DatasetError, ReferDataset, reading

MAX_OUTLINE = 2_000_000  # pixels along the polygons of a mask: pycocotools takes about 300 bytes for each


def ground_truth(ds: ReferDataset) -> pd.DataFrame:
    """Return every annotation that is no crowd, with ann_id (-1: a whole image) and, unless all are unknown, its mask."""
    crowd = ds.annotations["iscrowd"] != 0
    frame = ds.annotations[~crowd].reset_index(names="ann_id")[["image_id", *XYWH, "ann_id", "segmentation"]]
    targets = int(ds.expressions["ann_id"].isin(ds.annotations.index[crowd]).sum())
    counts = {"crowd regions left out": int(crowd.sum()), "expressions that mean a crowd region": targets}
    frame = frame.drop(columns="segmentation") if frame["segmentation"].isna().all() else frame
    return _complete(frame, ds, counts)


def whole_images(ds: ReferDataset) -> pd.DataFrame:
    """Return each image as its only candidate."""
    frame = ds.images.rename(columns={"width": "w", "height": "h"}).assign(x=0, y=0).astype(dict.fromkeys(XYWH, float))
    frame = frame.reset_index(names="image_id")[["image_id", *XYWH]]
    frame.attrs["counts"] = {}
    return frame


def from_boxes(
    ds: ReferDataset, path: str | Path, score_threshold: float | None = None, top_k: int | None = None
) -> pd.DataFrame:
    """Return the boxes of a detector as candidates: clipped to their image, left out where nothing remains.

    `path` is a JSON file: {image id: [[x, y, w, h], …]} in pixels, as ReCLIP has it (Subramanian et al., ACL 2022), or
    COCO results, [{image_id, bbox, score}, …]; an image may be named by its file name. `score_threshold` keeps scores at
    or above it, `top_k` the best of each image. DatasetError for a wrong file, or boxes of another form (`check_boxes`).
    """
    frame, counts = _read_results(ds, path, XYWH, bool(score_threshold or top_k))
    check_boxes(ds, frame, path)
    boxes, has_area, clipped = datasets.clip_boxes(frame[XYWH].to_numpy(), _sizes(ds, frame))
    frame = frame.assign(**dict(zip(XYWH, boxes.T, strict=True)))[has_area]
    counts |= {datasets.CLIPPED: int(clipped.sum()), datasets.NO_AREA: int((~has_area).sum())}
    if score_threshold:
        kept = frame["score"] >= score_threshold
        frame, counts["boxes below the score threshold left out"] = frame[kept], int((~kept).sum())
    return _complete(frame, ds, counts, top_k)


def from_masks(ds: ReferDataset, path: str | Path, top_k: int | None = None, min_area: int | None = None,
               nms_iou: float | None = None) -> pd.DataFrame:  # fmt: skip
    """Return the masks of a segmenter as candidates, compressed RLE, each with its tight box; empty ones are left out.

    `path` is a JSON file of COCO results, [{image_id, segmentation, score}, …]; a segmentation is what `to_rle` takes, or
    null beside a bbox, which then is the mask. `min_area` keeps masks of at least that many pixels, `nms_iou` those that
    `suppress` keeps, `top_k` then the best of each image. DatasetError for a wrong file.
    """
    frame, counts = _read_results(ds, path, object, bool(nms_iou or top_k))
    rles = []
    entries = zip(frame.index, frame["segmentation"], frame["bbox"], _sizes(ds, frame).tolist(), strict=True)
    for entry, mask, box, (width, height) in entries:
        with reading(f"{path}: entry [{entry}]", "RLE, polygons, or null beside a bbox"):
            known = datasets.clean_mask(mask, height, width)[0]
            rles.append(to_rle(known, height, width) if known else _box_rle(box, height, width))
    frame[XYWH] = np.reshape(coco.toBbox(rles) if rles else [], (-1, 4))
    frame["segmentation"], area = pd.Series(rles, dtype=object, index=frame.index), mask_areas(rles)
    least = min_area or 1
    frame, counts[f"masks of less than {least} pixels left out"] = frame[area >= least], int((area < least).sum())
    if nms_iou:
        masks = frame.sort_values("score", ascending=False, kind="stable").groupby("image_id")["segmentation"]
        kept = masks.transform(lambda masks: suppress(masks.tolist(), nms_iou)).astype(bool).reindex(frame.index)
        frame, counts[f"masks with IoU > {nms_iou:g} with a better one left out"] = frame[kept], int((~kept).sum())
    return _complete(frame, ds, counts, top_k)


def load_candidates(ds: ReferDataset, source: str, root: str | Path, **options: Any) -> pd.DataFrame:
    """Return the candidates that `source` names; `options` go to `from_boxes` or `from_masks`.

    "gt", "whole" (the image itself), "detections", "rpn", "masks" (`root/<dataset>_dets_dict.json`, `_rpn_dict.json`,
    `_masks.json`), or a JSON file: COCO results that have a segmentation are masks, all else is boxes.
    """
    if source in ("gt", "whole"):
        return ground_truth(ds) if source == "gt" else whole_images(ds)
    named = {"detections": "dets_dict", "rpn": "rpn_dict", "masks": "masks"}.get(source)
    path = Path(root) / f"{ds.name}_{named}.json" if named else Path(source)
    content = [] if named else datasets.read_json(path)
    masked = isinstance(content, list) and any(isinstance(one, dict) and one.get("segmentation") for one in content)
    return (from_masks if masked or source == "masks" else from_boxes)(ds, path, **options)


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
    """Return all pairs of an expression and a candidate of its image, with the IoU (of masks with `masks`) to the target.

    Raises DatasetError for an image with expressions but no candidate, masks that are not there, targets of unknown mask.
    """
    truth = ds.annotations.loc[ds.expressions["ann_id"]]
    expression, candidate = _same_image(truth, candidates)
    if len(np.unique(expression)) < len(truth):
        image_id = np.setdiff1d(truth["image_id"], candidates["image_id"])[0]
        raise DatasetError(f"Image {image_id} has expressions but no candidate. Pass candidates of all images of ds.")
    image = ds.images.index.get_indexer(ds.expressions["image_id"])[expression]
    boxes = truth[XYWH].to_numpy()[expression], candidates[XYWH].to_numpy()[candidate]
    ious = _mask_overlaps(ds, truth, candidates, expression, candidate) if masks else (box_iou(*boxes),)
    return Pairs(*map(torch.tensor, (expression, candidate, image, *ious)))


def _same_image(left: pd.DataFrame, right: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of all pairs of rows with one image_id, by left, then right: two int64 [P]."""
    lines = (frame[["image_id"]].assign(row=np.arange(len(frame))) for frame in (left, right))
    pairs = pd.merge(*lines, on="image_id").sort_values(["row_x", "row_y"])
    return pairs["row_x"].to_numpy(), pairs["row_y"].to_numpy()


def _mask_overlaps(ds: ReferDataset, truth: pd.DataFrame, candidates: pd.DataFrame, left: Any, right: Any) -> tuple:
    """Return IoU [P], intersection and union in pixels [P] of rows `left` of truth with `right` of candidates, from RLE."""
    if "segmentation" not in candidates:
        raise DatasetError("The candidates are boxes, but RIS needs masks: use ground_truth or from_masks.")
    if unknown := int(truth.loc[~truth.index.duplicated(), "segmentation"].isna().sum()):
        raise DatasetError(f"{unknown} targets have no mask (segmentation null or []): add them, or use REC, not RIS.")
    iou, intersection, union = np.zeros(len(left)), np.zeros(len(left), np.int64), np.zeros(len(left), np.int64)
    for image_id, pairs in pd.Series(left).groupby(truth["image_id"].to_numpy()[left]).indices.items():
        width, height = ds.images.loc[image_id, ["width", "height"]]
        targets, target = np.unique(truth.index[left[pairs]], return_inverse=True)
        rows, row = np.unique(right[pairs], return_inverse=True)
        with reading(f"A mask of image {image_id}", "another one"):
            theirs, ours = ([to_rle(one, int(height), int(width)) for one in column] for column in (
                ds.annotations.loc[targets, "segmentation"], candidates["segmentation"].iloc[rows]))  # fmt: skip
        overlap = np.reshape(coco.iou(ours, theirs, [0] * len(theirs)), (len(ours), len(theirs)))[row, target]
        areas = mask_areas(ours)[row] + mask_areas(theirs)[target]
        shared = np.rint(overlap * areas / (1 + overlap)).astype(np.int64)  # IoU = I / (areas - I), I whole pixels
        iou[pairs], intersection[pairs], union[pairs] = overlap, shared, areas - shared
    return iou, intersection, union


@np.errstate(over="ignore", invalid="ignore")
def check_boxes(ds: ReferDataset, boxes: pd.DataFrame, source: str | Path) -> None:
    """Raise DatasetError where boxes, as they stand in a file, seem not to be [x, y, w, h] in pixels of ds's pictures.

    That is: all numbers are at most 1, over 20 % of the boxes leave their picture by a pixel or have no area, or fewer
    than 20 % of ten or more targets have a box with IoU > 0.5. The message says which reading would fit them.
    """
    truth = ds.annotations.loc[ds.expressions["ann_id"].unique()]
    target, row = _same_image(truth, boxes)
    array, sizes = boxes[XYWH].to_numpy(), _sizes(ds, boxes)

    def ceiling(array: np.ndarray) -> float:
        fits = target[box_iou(truth[XYWH].to_numpy()[target], array[row]) > 0.5]
        return len(np.unique(fits)) / max(len(np.unique(target)), 1)

    near, far, wide = array[:, :2], array[:, 2:], np.hstack([sizes, sizes])
    inside = (near >= -1).all(1) & (far > 0).all(1) & (near + far <= sizes + 1).all(1)
    shares, reached = bool(len(array)) and np.abs(array).max() <= 1, ceiling(array)
    poor = reached < 0.2 and len(np.unique(target)) >= 10
    if not len(array) or not (shares or inside.mean() < 0.8 or poor):
        return
    forms = {"corners": np.hstack([near, far - near]), "centres": np.hstack([near - far / 2, far])}
    forms |= {f"shares of 1 ({name})": form * wide for name, form in {**forms, "x, y, w, h": array}.items()}
    best = max(forms, key=lambda name: ceiling(forms[name]))
    seem = "shares of 1" if shares else "boxes of other pictures or of another size"
    seem = best if ceiling(forms[best]) > max(reached, 0.2) else seem
    raise DatasetError(f"{source}: {1 - inside.mean():.0%} of the boxes leave their picture or have no area, {reached:.0%} of "
                       f"the targets have one that fits. They look like {seem}: write [x, y, w, h] in pixels.")  # fmt: skip


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes `a` and `b` [..., 4] (xywh), row by row: [...]; 0 where none has an area."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    far = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(far - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0).clip(0, 1)


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Return COCO's compressed RLE of polygons, RLE of either kind, or rows of true and false or 0 and 1.

    Raises ValueError, TypeError or KeyError for all else, of which those who know the file make a DatasetError.
    """
    mask = datasets.clean_mask(segmentation, height, width)[0]
    if isinstance(mask, dict):
        if type(mask["counts"]) is bytes and list(mask["size"]) == [height, width]:
            return mask  # pycocotools made it: JSON holds text
        runs = np.array(mask["counts"]) if isinstance(mask["counts"], list) else _runs(mask["counts"])
        if list(mask["size"]) != [height, width] or runs.dtype.kind != "i" or runs.sum() != height * width:
            raise ValueError(f"RLE of size {mask['size']} for {height} × {width} pixels, or runs that do not fill it")
        return coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
    if type(mask[0][0]) is bool:
        raise ValueError(f"a matrix of another size than {height} × {width}")
    points = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in mask]
    length = sum(np.abs(np.diff(polygon, axis=0)).sum() for polygon in points)
    if not (length <= MAX_OUTLINE and np.abs(np.concatenate(points)).max() <= 10 * (height + width)):  # nor NaN
        raise ValueError(f"a polygon of {length:.0f} pixels, or with a point far outside")
    return coco.merge(coco.frPyObjects([polygon.ravel().tolist() for polygon in points], height, width))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Return the masks of regions of one image: [N, H, W] bool, from segmentations that `to_rle` takes, or DatasetError."""
    with reading("A mask", f"RLE, polygons or a matrix for a picture of {height} × {width} (height × width)"):
        masks = coco.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


def mask_areas(masks: Sequence[dict]) -> np.ndarray:
    """Return the number of pixels of each of `masks` (compressed RLE): int64 [N]."""
    blocks = [coco.area(masks[i : i + 128]) for i in range(0, len(masks), 128)]  # pycocotools fails on over 255
    return np.concatenate([np.zeros(0), *blocks]).astype(np.int64)


def suppress(masks: Sequence[dict], threshold: float) -> np.ndarray:
    """Return which of `masks` (RLE of one image, best first) have no better one that stays with IoU > threshold: [N]."""
    overlaps = np.reshape(coco.iou(masks, masks, [0] * len(masks)), (len(masks), len(masks))) > threshold
    stays = np.ones(len(masks), dtype=bool)
    for i in range(len(masks)):
        stays[i + 1 :] &= ~(stays[i] & overlaps[i, i + 1 :])
    return stays


def _runs(counts: str) -> np.ndarray:
    """Return the runs of compressed RLE; pycocotools would read on behind the end of damaged ones.

    Five bits a character, low first; 32: more follow; 16 in the last: negative; from the fourth on differences to two before.
    """
    code = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    end = np.flatnonzero((code & 32) == 0)
    start = np.r_[0, end[:-1] + 1]
    if code.min() < 0 or code.max() > 63:
        raise ValueError("damaged counts")
    place = np.arange(len(code)) - np.repeat(start, end - start + 1)
    runs = np.add.reduceat((code & 31) << 5 * place, start) - np.where(code[end] & 16, 32 << 5 * (end - start), 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def _box_rle(box: Any, height: int, width: int) -> dict:
    return coco.frPyObjects(np.array(box, dtype=np.float64).reshape(1, 4), height, width)[0]


def _sizes(ds: ReferDataset, frame: pd.DataFrame) -> np.ndarray:
    return ds.images.loc[frame["image_id"], ["width", "height"]].to_numpy()


def _read_results(ds: ReferDataset, path: str | Path, bbox: Any, scores: bool) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return image_id, the box and, where the file has them, score and segmentation of the images of `ds`; and counts."""
    content, ids = datasets.read_json(path), dict(zip(ds.images["file_name"], ds.images.index, strict=True))
    with reading(path, "{image id or file name: [[x, y, w, h], …]} or [{image_id, bbox or segmentation, score}, …]"):
        if isinstance(content, dict):
            content = [{"image_id": key, "bbox": box} for key, boxes in content.items() for box in boxes]
        content = [{**entry, "image_id": ids.get(entry["image_id"], entry["image_id"])} for entry in content]
        kinds = {"score": float} if scores or any("score" in entry for entry in content) else {}
        frame = datasets.read_table(content, f"{path}: entries", image_id=int, bbox=bbox, **kinds, segmentation=object)
    datasets.refuse(frame["score"].isna() if kinds else [], f"{path}: entry ", "'score' is NaN")
    if bbox is XYWH and frame["segmentation"].isna().all():
        frame = frame.drop(columns="segmentation")
    image = ds.images.index.get_indexer(frame["image_id"])
    if len(image) and image.max() < 0:
        raise DatasetError(f"{path}: none of its {len(frame)} entries is of an image of {ds.name}: it has ids such as "
                           f"{frame['image_id'][0]}, not {ds.images.index[0]}. Use the image ids of {ds.name}.")  # fmt: skip
    order = np.argsort(image, kind="stable")[(image < 0).sum() :]
    return frame.iloc[order], {"entries of images outside the data set ignored": len(frame) - len(order)}


def _complete(frame: pd.DataFrame, ds: ReferDataset, counts: dict[str, int], top_k: int | None = None) -> pd.DataFrame:
    """Keep the best of each image, give images without any the whole image, and all rows a mask or none; in ds's order."""
    if top_k:
        kept = frame.groupby("image_id")["score"].rank(method="first", ascending=False) <= top_k
        frame, counts[f"candidates beyond the best {top_k} of their image left out"] = frame[kept], int((~kept).sum())
    columns = [name for name in ["image_id", *XYWH, "ann_id", "score", "segmentation"] if name in frame]
    whole = whole_images(ds)[lambda whole: ~whole["image_id"].isin(frame["image_id"])]
    whole = whole.assign(ann_id=-1, score=np.nan, segmentation=None)[columns].astype(frame.dtypes[columns])
    frame = pd.concat([frame[columns], whole]) if len(whole) else frame[columns]
    frame = frame.iloc[np.argsort(ds.images.index.get_indexer(frame["image_id"]), kind="stable")].reset_index(drop=True)
    if "segmentation" in frame:
        boxes = zip(frame.pop("segmentation"), frame[XYWH].to_numpy(), _sizes(ds, frame), strict=True)
        masks = [mask or _box_rle(box, height, width) for mask, box, (width, height) in boxes]
        frame["segmentation"] = pd.Series(masks, dtype=object)
    frame.attrs["counts"] = counts | {"images without a candidate, given the whole image as one": len(whole)}
    return frame
