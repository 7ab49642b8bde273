"""Candidate regions, and the table of pairs that everything later stands on.

A frame of candidates has one row a candidate, in the order of `ds.images`, each of which has at least one: image_id, x, y, w, h
(pixels) and, where known, ann_id, score, segmentation (a mask in every row); `frame.attrs["counts"]` says what was changed.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco

from . import datasets
from .datasets import XYWH, DatasetError, ReferDataset, reading


def ground_truth(ds: ReferDataset) -> pd.DataFrame:
    """Return every annotation that is no crowd, with ann_id (-1: a whole image) and, unless all are unknown, its mask."""
    crowd = ds.annotations["iscrowd"] != 0
    frame = ds.annotations[~crowd].reset_index(names="ann_id").drop(columns="category")
    targets = int(ds.expressions["ann_id"].isin(ds.annotations.index[crowd]).sum())
    counts = {"crowd regions left out": int(crowd.sum()), "expressions that mean a crowd region": targets}
    return _complete(frame, ds, counts)


def whole_images(ds: ReferDataset) -> pd.DataFrame:
    """Return each image as its only candidate."""
    return _complete(ds.annotations.iloc[:0][["image_id", *XYWH]], ds, {})


def from_boxes(ds: ReferDataset, path: str | Path) -> pd.DataFrame:
    """Return the boxes of a detector as candidates: clipped to their image, left out where nothing remains.

    `path` is a JSON file: {image id: [[x, y, w, h], …]} in pixels, as ReCLIP has it (Subramanian et al., ACL 2022), or
    COCO results, [{image_id, bbox, score}, …]; an image may be named by its file name. DatasetError where it is wrong: also
    as `check_boxes`, and if over 80 % of ten or more targets have no box that fits.
    """
    frame, counts = _read_results(ds, path, XYWH)
    datasets.check_boxes(frame, ds.images, path)
    frame, clipped = datasets.clip_boxes(frame, ds.images)
    truth = ds.annotations.loc[ds.expressions["ann_id"].unique(), ["image_id", *XYWH]].reset_index()
    both = truth.merge(frame, on="image_id", suffixes=("_", ""))
    overlaps = box_iou(both[[f"{side}_" for side in XYWH]].to_numpy(), both[XYWH].to_numpy())
    fitted = pd.Series(overlaps > 0.5).groupby(both["ann_id"]).any()
    if len(fitted) >= 10 and fitted.mean() < 0.2:
        raise DatasetError(f"{path}: {fitted.mean():.0%} of the targets have a box that fits. Write [x, y, w, h] in pixels of "
                           "these pictures in this size, not corners or centres.")  # fmt: skip
    return _complete(frame, ds, counts | clipped)


def from_masks(ds: ReferDataset, path: str | Path) -> pd.DataFrame:
    """Return the masks of a segmenter as candidates, compressed RLE, each with its tight box; empty ones are left out.

    `path` is a JSON file of COCO results, [{image_id, segmentation, score}, …]; a segmentation is what `to_rle` takes.
    """
    frame, counts = _read_results(ds, path, object)
    rles = _all_rles(ds, frame, f"{path}: entry")
    frame[XYWH] = coco.toBbox(rles)
    frame["segmentation"], empty = pd.Series(rles, frame.index, object), frame["w"] == 0
    return _complete(frame[~empty], ds, counts | {"empty masks left out": int(empty.sum())})


def load_candidates(ds: ReferDataset, source: str, root: str | Path) -> pd.DataFrame:
    """Return the candidates that `source` names.

    "gt", "whole" (the image itself), "detections", "rpn", "masks" (`root/<dataset>_dets_dict.json`, `_rpn_dict.json`,
    `_masks.json`), or a JSON file: COCO results that have a segmentation are masks, all else is boxes.
    """
    if source in ("gt", "whole"):
        return ground_truth(ds) if source == "gt" else whole_images(ds)
    named = {"detections": "dets_dict", "rpn": "rpn_dict", "masks": "masks"}.get(source)
    path = Path(root) / f"{ds.name}_{named}.json" if named else Path(source)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file. Take other candidates, as PROPOSALS gt, or put {source} there.")
    content = [] if named else datasets.read_json(path)  # of boxes by image, a dict: its keys are no dicts
    masked = source == "masks" or any(isinstance(one, dict) and one.get("segmentation") for one in content)
    return (from_masks if masked else from_boxes)(ds, path)


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
    if absent := {*truth["image_id"]} - {*candidates["image_id"]}:
        raise DatasetError(f"Image {min(absent)} has expressions but no candidate. Pass candidates of all images.")
    sides = (frame[["image_id"]].assign(row=np.arange(len(frame))) for frame in (truth, candidates))
    both = pd.merge(*sides, on="image_id").sort_values(["row_x", "row_y"])
    expression, candidate = both["row_x"].to_numpy(), both["row_y"].to_numpy()
    image = ds.images.index.get_indexer(both["image_id"])
    left, right = truth.iloc[expression], candidates.reset_index(drop=True).iloc[candidate]
    ious = _mask_overlaps(ds, left, right) if masks else (box_iou(left[XYWH].to_numpy(), right[XYWH].to_numpy()),)
    return Pairs(*map(torch.tensor, (expression, candidate, image, *ious)))


def _mask_overlaps(ds: ReferDataset, *sides: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return IoU [P], intersection and union in pixels [P] of the masks of targets and candidates, row by row, from RLE."""
    if unknown := sides[0].index[sides[0]["segmentation"].isna()].nunique():
        raise DatasetError(f"{unknown} targets have no mask (segmentation null or []): add them, or use REC, not RIS.")
    if "segmentation" not in sides[1]:
        raise DatasetError("The candidates are boxes, but RIS needs masks: use ground_truth or from_masks.")
    columns, areas = [], 0
    for side in sides:
        once = side[~side.index.duplicated()]
        rles, row = _all_rles(ds, once, "mask"), once.index.get_indexer(side.index)
        columns.append([rles[i] for i in row])
        areas = areas + np.array([coco.area(rle) for rle in rles], np.int64)[row]  # over 255 at once pycocotools fails
    iou = np.array([coco.iou([ours], [theirs], [0]).item() for theirs, ours in zip(*columns, strict=True)])
    shared = np.rint(iou * areas / (1 + iou)).astype(np.int64)  # IoU = I / (areas - I), I whole pixels
    return iou, shared, areas - shared


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of boxes `a` and `b` [..., 4] (xywh), row by row: [...]; 0 where none has an area."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    far = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(far - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0).clip(0, 1)


def to_rle(segmentation: Any, height: int, width: int) -> dict:
    """Return COCO's compressed RLE of polygons or of RLE of either kind. Raises ValueError, TypeError, OverflowError, …"""
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], [int(height), int(width)]
        if isinstance(counts, bytes):
            return segmentation  # pycocotools made it: JSON holds text
        text = isinstance(counts, str)
        if list(segmentation["size"]) != size or (text and not re.fullmatch("[0-o]*[0-O]", counts)):
            raise ValueError(f"RLE of another size than {size}, or damaged: pycocotools would read on beyond its end")
        rle = {"size": size, "counts": counts.encode()} if text else coco.frPyObjects(segmentation, *size)
        whole = coco.encode(coco.decode(rle))  # without runs of 0
        if whole != rle if text else sum(counts) != height * width:
            raise ValueError("runs that do not fill the picture")
        return whole
    polygons = [np.reshape(polygon, (-1, 2)) for polygon in datasets.clean_mask(segmentation)[0]]
    points = np.concatenate(polygons)
    if points.dtype.kind not in "if" or not 1 < np.abs(points).max() <= 10 * (height + width):  # shares of 1, or NaN
        raise ValueError("polygons that are no numbers, or not in pixels of the picture")
    return coco.merge(coco.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Return the masks of regions of one image: [N, H, W] bool, from segmentations that `to_rle` takes, or DatasetError."""
    with reading("A mask", f"RLE or polygons for a picture of {height} × {width} (height × width)"):
        masks = coco.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return np.ascontiguousarray(masks.transpose(2, 0, 1)).astype(bool)


def _all_rles(ds: ReferDataset, frame: pd.DataFrame, source: str) -> list[dict]:
    """Return the masks of a frame's rows as compressed RLE. Raises DatasetError that names `source` and the row."""
    rles, sizes = [], ds.images.loc[frame["image_id"], ["height", "width"]].to_numpy()
    for row, mask, size in zip(frame.index, frame["segmentation"], sizes, strict=True):
        with reading(f"{source} [{row}]", "RLE or polygons of its picture"):
            rles.append(to_rle(mask, *size))
    return rles


def _read_results(ds: ReferDataset, path: str | Path, bbox: Any) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return image_id, box, score and segmentation (null where the file has none) of the images of `ds`; and counts."""
    content, ids = datasets.read_json(path), dict(zip(ds.images["file_name"], ds.images.index, strict=True))
    with reading(path, "{image id or file name: [[x, y, w, h], …]} or [{image_id, bbox or segmentation, score}, …]"):
        if isinstance(content, dict):
            content = [{"image_id": key, "bbox": box} for key, boxes in content.items() for box in boxes]
        known = lambda key: ids.get(key, -1 if isinstance(key, str) and Path(key).suffix else key)  # noqa: E731
        content = [{**entry, "image_id": known(entry["image_id"])} for entry in content]
        kinds = {"image_id": int, "bbox": bbox, "score": object, "segmentation": object}
        frame = datasets.read_table(content, f"{path}: entries", **kinds).astype({"score": float})
    outside = ~frame["image_id"].isin(ds.images.index)
    another = outside & outside.all()  # a file for another data set
    datasets.refuse(another, f"{path}: entry", f"'image_id' is none of {ds.name}'s, e.g. {ds.images.index[0]}")
    return frame[~outside].copy(), {"entries of images outside the data set ignored": int(outside.sum())}


def _complete(frame: pd.DataFrame, ds: ReferDataset, counts: dict[str, int]) -> pd.DataFrame:
    """Give images without a candidate the whole image, and all rows a mask or none; in the order of ds's images."""
    optional = [name for name in ("ann_id", "score", "segmentation") if name in frame and frame[name].notna().any()]
    frame = ds.images.reset_index().merge(frame[["image_id", *XYWH, *optional]], how="left", on="image_id")
    empty = int(frame["x"].isna().sum())
    frame = frame.fillna({"x": 0, "y": 0, "w": frame["width"], "h": frame["height"], "ann_id": -1})
    frame = frame.astype({"ann_id": np.int64} if "ann_id" in frame else {})
    if "segmentation" in frame:
        for row in frame[frame["segmentation"].isna()].itertuples():
            box = np.array([[row.x, row.y, row.w, row.h]])
            frame.at[row.Index, "segmentation"] = coco.frPyObjects(box, row.height, row.width)[0]
    frame = frame[["image_id", *XYWH, *optional]]
    frame.attrs["counts"] = counts | {"images without a candidate, given the whole image as one": empty}
    return frame
