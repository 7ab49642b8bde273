"""Who was picked, was it right, and how sure are we: REC and RIS with honest intervals.

Expressions of one image are not independent, so intervals resample *images* (a cluster bootstrap); two methods are
compared on the same expressions (paired differences, McNemar's exact test). Functions return fractions in 0..1; only
tables hold percentages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco
from scipy.stats import binomtest
from torch import Tensor

from .datasets import XYWH, DatasetError, ReferDataset
from .normalization import METHODS
from .proposals import box_iou, mask_areas, to_rle

if TYPE_CHECKING:
    from .scoring import ReferLogits

Options = Mapping[str, Mapping[str, float]]  # keyword arguments by method


def pick_regions(scores: Tensor, group: Tensor) -> Tensor:
    """Return the row of the highest score per image and column, [R, Q] and [R] -> [G, Q]; -1 where a slot is NaN.

    `group` [R] is the image (0..G-1) of each region. Among equal scores the first row wins; an image without regions
    has -1 in all columns. Raises ValueError for shapes that do not fit.

    >>> pick_regions(torch.tensor([[0.1, 7.0], [0.2, 7.0], [0.3, torch.nan]]), torch.tensor([0, 0, 1]))
    tensor([[ 1,  0],
            [ 2, -1]])
    """
    if scores.ndim != 2 or group.shape != scores.shape[:1]:
        shapes = f"scores {list(scores.shape)} and group {list(group.shape)}"
        raise ValueError(f"{shapes} do not fit: [regions, texts] and one image a region are needed.")
    index = group.long()[:, None].expand_as(scores)
    groups = int(group.max()) + 1 if len(group) else 0
    top = scores.new_zeros(groups, scores.shape[1]).scatter_reduce(0, index, scores, "amax", include_self=False)
    row = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    row = row.where(scores == top.gather(0, index), len(scores))  # NaN equals nothing: no row is left
    first = row.new_full(top.shape, len(scores)).scatter_reduce(0, index, row, "amin")
    return first.where(first < len(scores), -1)


def rec_correct(
    picked: Tensor | np.ndarray, boxes: np.ndarray, referred: np.ndarray, threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each expression's top-1 region is right, bool [E], and its IoU [E]: right is IoU > `threshold`.

    `picked` [E] holds rows of the candidate `boxes` [R, 4]; `referred` [E, 4] is the box meant (all xywh, pixels). The
    comparison is strict, as in ReCLIP's code. No region picked (-1) counts as wrong, with IoU 0. Raises
    ValueError for shapes that do not fit and rows that there are not.

    >>> rec_correct(np.array([0, 1]), np.array([[0, 0, 9, 9], [0, 0, 5, 10]]), np.array([[0, 0, 10, 10]] * 2))
    (array([ True, False]), array([0.81, 0.5 ]))
    """
    picked, boxes, referred = np.asarray(picked), np.asarray(boxes), np.asarray(referred)
    if picked.ndim != 1 or referred.shape != (len(picked), 4):
        raise ValueError(f"picked {picked.shape} and referred {referred.shape} do not fit: [E] and [E, 4] are needed.")
    if len(picked) and not -1 <= picked.min() <= picked.max() < len(boxes):
        raise ValueError(f"picked holds {picked.min()} … {picked.max()}: -1 or rows of {len(boxes)} boxes are needed.")
    iou = np.zeros(len(picked))
    some = picked >= 0
    iou[some] = box_iou(boxes[picked[some]], referred[some])
    return iou > threshold, iou


def cluster_bootstrap(values: np.ndarray, cluster: np.ndarray, denominator: np.ndarray | None = None,
                      resamples: int = 10_000, level: float = 0.95, seed: int = 0,
                      reference: int | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the percentile interval (low, high) of Σ values / Σ denominator, resampling whole clusters (images).

    `values` [E] or [E, K]; `cluster` [E] is the image of each row. Without `denominator` the ratio is the mean; with it
    ([E], or as `values`; ≥ 0) it is for instance oIoU, from intersections and unions. The K columns share their
    resamples, so a column may be a paired difference of two methods; `reference` is the column whose ratio is taken
    from the others' in each resample, for differences of ratios. The bounds are numbers, or [K]; the same seed gives the
    same ones. One cluster says nothing about the spread between clusters: the bounds are NaN. Raises
    ValueError on no rows, NaN or infinite values, shapes that do not fit, and denominators that are negative or add up
    to 0 in a resample. (Davison and Hinkley, Bootstrap Methods and Their Application, 1997, §3.8.)

    >>> low, high = cluster_bootstrap(np.array([1, 1, 0, 1, 0, 0]), np.array([7, 7, 7, 8, 8, 9]))
    >>> print(f"{low:.3f} to {high:.3f}")
    0.000 to 0.667
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(values.shape[:1]) if denominator is None else np.asarray(denominator, dtype=np.float64)
    codes, names = pd.factorize(np.asarray(cluster))
    fit = weights.shape in (values.shape, values.shape[:1]) and codes.shape == values.shape[:1]
    if values.ndim not in (1, 2) or not fit:
        shapes = f"values {values.shape}, denominator {weights.shape} and cluster {codes.shape}"
        raise ValueError(f"{shapes} do not fit: [E] or [E, K], the same, and [E] are needed.")
    if not len(values):
        raise ValueError("There are no values to resample.")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights >= 0).all() and (codes >= 0).all()):
        raise ValueError(
            "values, denominator or cluster has NaN or infinite entries, or the denominator negative ones."
        )
    if not (resamples >= 1 and 0 < level < 1):
        raise ValueError(
            f"resamples is {resamples}, level {level}: at least 1, and a share between 0 and 1, are needed."
        )
    if len(names) == 1:
        low, high = np.full((2, *values.shape[1:]), np.nan)
        return low, high
    # a resample's sums are those of its clusters, so rows are added up once and clusters counted after that
    clusters, tables = len(names), [x.reshape(len(x), -1) for x in (values, weights)]
    numerators, denominators = (pd.DataFrame(x).groupby(codes).sum().to_numpy() for x in tables)
    ratios = np.empty((resamples, numerators.shape[1]))
    generator = np.random.default_rng(seed)
    block = max(2**20 // clusters, 1)  # resamples at a time: about 30 MB
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(clusters, size=(rows, clusters)) + np.arange(rows)[:, None] * clusters
        times = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
        below = times @ denominators
        if not below.all():
            raise ValueError("The denominators of a resample add up to 0: too few clusters have any.")
        ratios[start : start + rows] = times @ numerators / below
    if reference is not None:
        ratios -= ratios[:, [reference]]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], axis=0).reshape(2, *values.shape[1:])
    return low, high


def mcnemar_p(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact test: do two methods err equally often on the same expressions?

    `correct_a` and `correct_b` [E] are True or False; anything else raises ValueError. Only the expressions on which
    they differ count: under the null hypothesis each is a fair coin (McNemar 1947, in its exact binomial form). 1.0
    when they never differ. It takes expressions for independent, which those of one image are not quite: read it beside
    the interval of the difference, which does not.

    >>> mcnemar_p(np.array([1, 1, 1, 1, 1, 0]), np.array([0, 0, 0, 0, 0, 0]))
    0.0625
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"correct_a {a.shape} and correct_b {b.shape}: two lists of the same length are needed.")
    if not (np.isin(a, [0, 1]).all() and np.isin(b, [0, 1]).all()):
        raise ValueError("correct_a and correct_b must hold only True and False (or 1 and 0).")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


SETTING = ("dataset", "split", "proposals", "model", "pretrained", "visual_prompts", "aux_bank")  # of a table's rows


def _setting(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first columns of a table; several visual prompts are joined by +."""
    if wrong := set(SETTING) ^ set(given):
        raise TypeError(f"A table's setting is {', '.join(SETTING)}; missing or unknown: {', '.join(sorted(wrong))}.")
    shown = given["visual_prompts"] if isinstance(given["visual_prompts"], str) else "+".join(given["visual_prompts"])
    return {name: given[name] for name in SETTING} | {"visual_prompts": shown}


def rec_table(
    predictions: pd.DataFrame, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0, **setting: Any
) -> pd.DataFrame:
    """Return `table_rec.csv` from predictions, one row a method in the order of their first appearance.

    `predictions` has a row per expression and method: sent_id, image_id, method, correct (others are ignored). Columns:
    the setting, method, n, accuracy, ci_low, ci_high, delta_vs_clip, p_value (McNemar, four digits), delta_ci_low,
    delta_ci_high; percentages and percentage points with two decimals. The delta and p-value are NaN without "clip".
    `setting` is what all of SETTING was, else TypeError. Raises ValueError when a method lacks an expression that
    another has, or has one twice.

    >>> frame = pd.DataFrame({"sent_id": [1, 2, 3] * 2, "image_id": [1, 1, 2] * 2})
    >>> frame = frame.assign(method=["clip"] * 3 + ["bsap"] * 3, correct=[True, False, False, True, True, False])
    >>> setting = dict(dataset="refcoco", split="val", proposals="detections", model="ViT-B-32", pretrained="openai")
    >>> table = rec_table(frame, **setting, visual_prompts=("crop", "blur"), aux_bank="categories")
    >>> table[["visual_prompts", "method", "n", "accuracy", "delta_vs_clip", "p_value"]]
      visual_prompts method  n  accuracy  delta_vs_clip  p_value
    0      crop+blur   clip  3     33.33           0.00      1.0
    1      crop+blur   bsap  3     66.67          33.33      1.0
    """
    correct, images = _by_method(predictions)
    hits = correct.to_numpy(dtype=np.float64)
    delta, p_value = np.full_like(hits, np.nan), [np.nan] * hits.shape[1]
    delta_low, delta_high = np.full((2, hits.shape[1]), np.nan)
    low, high = cluster_bootstrap(hits, images, None, resamples, level, seed)
    if "clip" in correct:
        clip = correct["clip"].to_numpy()
        delta = hits - clip[:, None]
        delta_low, delta_high = cluster_bootstrap(delta, images, None, resamples, level, seed)
        p_value = [float(f"{mcnemar_p(correct[method].to_numpy(), clip):.4g}") for method in correct]

    intervals = {"ci_low": percent(low), "ci_high": percent(high), "delta_vs_clip": percent(delta.mean(0))}
    deltas = {"p_value": p_value, "delta_ci_low": percent(delta_low), "delta_ci_high": percent(delta_high)}
    counted = {"method": list(correct), "n": len(hits), "accuracy": percent(hits.mean(0))}
    return pd.DataFrame(_setting(setting) | counted | intervals | deltas)


def percent(fractions: np.ndarray) -> np.ndarray:
    """Return fractions [K] as the tables print them: percent with two decimals, and no "-0.0".

    >>> percent(np.array([0.12346, -0.00001]))
    array([12.35,  0.  ])
    """
    return np.round(100 * fractions, 2) + 0.0


def _by_method(predictions: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Return correctness as a frame [E, methods], bool, and the image of each expression; refuse what is incomplete."""
    missing = [name for name in ("sent_id", "image_id", "method", "correct") if name not in predictions]
    if missing:
        raise ValueError(f"The predictions have no column {', '.join(missing)}.")
    if not len(predictions):
        raise ValueError("There are no predictions to tabulate.")
    key = ["sent_id", "method"]
    holes = predictions[["image_id", "correct", *key]].isna().any(axis=1)
    if holes.any() or not predictions["correct"].isin([0, 1]).all():
        raise ValueError("The predictions have missing entries, or values of correct that are not True or False.")
    twice = predictions.duplicated(key)
    if twice.any():
        sent_id, method = predictions.loc[twice, key].iloc[0]
        raise ValueError(f"{twice.sum()} predictions come twice, e.g. method {method} on expression {sent_id}.")
    images = predictions.drop_duplicates(["sent_id", "image_id"]).set_index("sent_id")["image_id"]
    if images.index.has_duplicates:
        raise ValueError(f"Expression {images.index[images.index.duplicated()][0]} stands in more than one image.")
    wide = predictions.pivot(index="sent_id", columns="method", values="correct")[predictions["method"].unique()]
    if wide.isna().any(axis=None):
        lacking = wide.isna().sum()
        said = ", ".join(f"{method} lacks {count}" for method, count in lacking[lacking > 0].items())
        raise ValueError(f"Of {len(wide)} expressions {said}: methods must be compared on the same ones. Rerun them.")
    return wide.astype(bool), images.loc[wide.index].to_numpy()


def rec_predictions(
    ds: ReferDataset, regions: pd.DataFrame, logits: ReferLogits, methods: Sequence[str], options: Options | None = None
) -> pd.DataFrame:
    """Return the region that each method picks for each expression: one row an expression and method, expressions in order.

    Columns: sent_id, image_id, ann_id, text, method, region (row of `regions`, -1 for none), x, y, w, h (pixels, of
    that region), score (as METHODS gives it), iou with the referred box, correct (IoU > 0.5). `options` holds keyword
    arguments by method. Raises ValueError for a method that METHODS does not have.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"Unknown method {unknown}; there are: {', '.join(METHODS)}.")
    boxes = regions[XYWH].to_numpy()
    expressions = ds.expressions.reset_index()[["sent_id", "image_id", "ann_id", "text"]]
    referred = ds.regions.loc[expressions["ann_id"], XYWH].to_numpy()
    parts = []
    for method in methods:
        scores = METHODS[method](logits.query, logits.aux, logits.group, **(options or {}).get(method, {}))
        picked = pick_regions(scores, logits.group)[logits.expression_group, logits.expression_slot]
        correct, iou = rec_correct(picked, boxes, referred)
        part = expressions.assign(method=method, region=picked.numpy(), **dict(zip(XYWH, boxes[picked].T, strict=True)))
        parts.append(part.assign(score=scores[picked, logits.expression_slot].numpy(), iou=iou, correct=correct))
    return pd.concat(parts, ignore_index=True)


RIS_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
ORACLE = "oracle"


def mask_overlaps(ds: ReferDataset, regions: pd.DataFrame) -> pd.DataFrame:
    """Return how the mask of every region that an expression means overlaps with each candidate of its image.

    One row a pair: ann_id, region (row of `regions`), intersection and union (pixels), iou. Nothing is decoded: COCO's
    RLE gives the IoU of an image's pairs at once, and with the areas that gives the intersection. An empty mask has IoU
    0 even with another empty one, as the published code counts it. Raises DatasetError for candidates without masks and
    for masks that are damaged or of another size than their image.
    """
    if "segmentation" not in regions:
        raise DatasetError("The candidates are boxes, but segmentation needs masks: use ground_truth or from_masks.")
    size = ds.images.loc[regions["image_id"], ["width", "height"]].to_numpy()
    boxes = regions["segmentation"].isna().to_numpy() & (regions[["w", "h"]].to_numpy() < size).any(1)
    if boxes.any():
        raise DatasetError(f"{boxes.sum()} of {len(regions)} candidates are boxes without a mask. Leave them out.")
    meant = ds.regions.loc[ds.expressions["ann_id"].unique(), ["image_id", "segmentation"]]
    candidates, parts = regions.groupby("image_id").indices, [[np.zeros(0, dtype=np.int64)] * 4 + [np.zeros(0)]]
    for image_id, truth in meant.groupby("image_id"):
        rows = candidates.get(image_id, np.zeros(0, dtype=np.int64))
        width, height = ds.images.loc[image_id, ["width", "height"]]
        try:
            pair = [[to_rle(one, int(height), int(width)) for one in masks]
                    for masks in (regions["segmentation"].iloc[rows], truth["segmentation"])]  # fmt: skip
        except DatasetError as error:
            raise DatasetError(f"Image {image_id}: a mask cannot be used: {error}.") from error
        iou = np.reshape(coco.iou(*pair, [0] * len(truth)), (len(rows), len(truth)))
        both = np.add.outer(*map(mask_areas, pair))
        shared = np.rint(iou * both / (1 + iou)).astype(np.int64)  # IoU = I / (A + B - I), and I is whole pixels
        counted = [shared.ravel(), (both - shared).ravel(), iou.ravel()]
        parts.append([np.tile(truth.index, len(rows)), np.repeat(rows, len(truth)), *counted])
    names = ["ann_id", "region", "intersection", "union", "iou"]
    return pd.DataFrame(dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True)))


def ris_predictions(
    ds: ReferDataset, regions: pd.DataFrame, logits: ReferLogits, methods: Sequence[str], options: Options | None = None
) -> pd.DataFrame:
    """Return the mask that each method picks for each expression, and as method "oracle" the best candidate.

    One row an expression and method: sent_id, image_id, ann_id, text, method, region (row of `regions`), score (as
    METHODS gives it, NaN for the oracle), intersection, union (pixels), iou, correct (IoU ≥ 0.5). The oracle is the
    candidate with the highest IoU: the ceiling of mIoU and precision, and for oIoU nearly so. Raises ValueError for an
    unknown method, DatasetError for candidates without masks.
    """
    overlaps = mask_overlaps(ds, regions)
    columns = ["sent_id", "image_id", "ann_id", "text", "method", "region", "score"]
    picks = rec_predictions(ds, regions, logits, methods, options)[columns]
    best = overlaps.sort_values("iou", ascending=False, kind="stable").drop_duplicates("ann_id")
    oracle = picks[picks["method"] == methods[0]].drop(columns="region").assign(method=ORACLE, score=np.nan)
    oracle = oracle.merge(best[["ann_id", "region"]], on="ann_id", how="left")[columns]
    # a region can be meant by several expressions, but a pair stands in `overlaps` once
    picks = pd.concat([picks, oracle], ignore_index=True)
    picks = picks.merge(overlaps, on=["ann_id", "region"], how="left", validate="m:1")
    if picks["iou"].isna().any():
        raise DatasetError(f"{picks['iou'].isna().sum()} picks are of no candidate of their image.")
    return picks.astype({"intersection": np.int64, "union": np.int64}).assign(correct=picks["iou"] >= RIS_THRESHOLDS[0])


def ris_table(
    predictions: pd.DataFrame, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0, **setting: Any
) -> pd.DataFrame:
    """Return `table_ris.csv` from `ris_predictions`, one row a method in the order of their first appearance.

    Columns: the setting, method, n, and in percent, two decimals: oiou (Σ intersection / Σ union), miou (mean IoU), p50
    … p90 (share of expressions with IoU ≥ 0.5 … 0.9), each with _low and _high; then delta_oiou_vs_clip and
    delta_miou_vs_clip in percentage points, each with its interval (delta_oiou_low …); NaN without "clip". Intervals
    resample images. Large objects weigh more in oIoU; the measures are those of LAVT (Yang et al., CVPR 2022). Raises
    ValueError and TypeError as `rec_table`.

    >>> frame = pd.DataFrame({"sent_id": [1, 2] * 2, "image_id": [1, 2] * 2, "method": ["clip"] * 2 + ["oracle"] * 2})
    >>> frame = frame.assign(intersection=[0, 30, 8, 30], union=[20, 40, 12, 40], iou=[0, 0.75, 2 / 3, 0.75], correct=True)
    >>> setting = dict(dataset="refcoco", split="val", proposals="masks", model="ViT-B-32", pretrained="openai")
    >>> table = ris_table(frame, **setting, visual_prompts="mask_crop", aux_bank="categories")
    >>> table[["method", "n", "oiou", "miou", "p60", "delta_oiou_vs_clip", "delta_miou_vs_clip"]]
       method  n   oiou   miou    p60  delta_oiou_vs_clip  delta_miou_vs_clip
    0    clip  2  50.00  37.50   50.0                0.00                0.00
    1  oracle  2  73.08  70.83  100.0               23.08               33.33
    """
    correct, images = _by_method(predictions)
    names = ["intersection", "union", "iou"]
    wide = predictions.pivot(index="sent_id", columns="method", values=names).loc[correct.index]
    intersection, union, iou = (wide[name][correct.columns].to_numpy(np.float64) for name in names)
    if not np.isfinite([intersection, union, iou]).all():
        raise ValueError("The predictions have missing entries in intersection, union or iou.")
    union = np.maximum(union, 1e-9)  # lets a resample of nothing but empty masks have oIoU 0
    measures: dict[str, tuple[np.ndarray, np.ndarray | None]] = {"oiou": (intersection, union), "miou": (iou, None)}
    measures |= {f"p{round(100 * t)}": ((iou >= t).astype(np.float64), None) for t in RIS_THRESHOLDS}
    clip = correct.columns.get_loc("clip") if "clip" in correct else None

    columns = _setting(setting) | {"method": list(correct), "n": len(correct)}
    deltas: dict[str, np.ndarray] = {}
    for name, (above, below) in measures.items():
        value = above.sum(0) / (len(above) if below is None else below.sum(0))
        low, high = cluster_bootstrap(above, images, below, resamples, level, seed)
        columns |= {name: percent(value), f"{name}_low": percent(low), f"{name}_high": percent(high)}
        if name in ("oiou", "miou"):
            delta, bounds = np.full(len(value), np.nan), np.full((2, len(value)), np.nan)
            if clip is not None:
                delta = value - value[clip]
                bounds = np.stack(cluster_bootstrap(above, images, below, resamples, level, seed, reference=clip))
            named = {f"delta_{name}_vs_clip": delta, f"delta_{name}_low": bounds[0], f"delta_{name}_high": bounds[1]}
            deltas |= {key: percent(value) for key, value in named.items()}
    return pd.DataFrame(columns | deltas)


def precision_curve(predictions: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return the share of expressions whose mask has at least each IoU from 0.01 to 1.

    Columns threshold, method, precision (percent).

    >>> curve = precision_curve(pd.DataFrame({"method": "bsap", "iou": [0.2, 0.7, 1.0]}), ["bsap"])
    >>> curve.iloc[[0, 49, 99]]
        threshold method  precision
    0        0.01   bsap     100.00
    49       0.50   bsap      66.67
    99       1.00   bsap      33.33
    """
    thresholds = np.arange(1, 101) / 100
    parts = []
    for method in methods:
        iou = np.sort(predictions.loc[predictions["method"] == method, "iou"].to_numpy())
        share = 1 - np.searchsorted(iou, thresholds) / len(iou)
        parts.append(pd.DataFrame({"threshold": thresholds, "method": method, "precision": np.round(100 * share, 2)}))
    return pd.concat(parts, ignore_index=True)


def ris_scenes(
    ds: ReferDataset, regions: pd.DataFrame, predictions: pd.DataFrame, method: str, each: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Return up to `each` expressions where only `method` has IoU ≥ 0.5, then as many where only CLIP has, drawn by `seed`.

    Columns image_id, text, outcome ("win" or "loss"), the segmentations truth, clip and `method`, and the IoU of the
    last two in clip_iou and `method`_iou.
    """
    wide = predictions.pivot(index="sent_id", columns="method", values=["correct", "region", "iou"])
    generator, rows = np.random.default_rng(seed), []
    for outcome, right, wrong in (("win", method, "clip"), ("loss", "clip", method)):
        found = wide.index[wide["correct"][right].astype(bool) & ~wide["correct"][wrong].astype(bool)]
        for sent_id in generator.permutation(found)[:each]:
            expression, row = ds.expressions.loc[sent_id], wide.loc[sent_id]
            scene = {"image_id": expression["image_id"], "text": expression["text"], "outcome": outcome}
            scene["truth"] = ds.regions.at[expression["ann_id"], "segmentation"]
            for name in ("clip", method):
                mask = regions["segmentation"].iat[int(row["region", name])]
                scene |= {name: mask, f"{name}_iou": float(row["iou", name])}
            rows.append(scene)
    return pd.DataFrame(rows)


_RELATION = (r"\b(?:above|below|under|underneath|beneath|behind|beside|near|nearest|closest|next to|in front of|on top of|"
             r"between|(?:left|right) (?:side )?of)\b")  # fmt: skip
_PLACE = r"\b(?:left|right|top|bottom|middle|center|centre|upper|lower|front|back|corner|far|first|second|third|last)\b"


def expression_kind(texts: pd.Series) -> pd.Series:
    """Tell from its words whether an expression relates two things, names a place in the picture, or only attributes.

    >>> expression_kind(pd.Series(["key above the red house", "left mug", "striped fish"])).tolist()
    ['relation', 'place', 'attributes']
    """
    relation, place = (texts.str.contains(pattern, case=False) for pattern in (_RELATION, _PLACE))
    return pd.Series(np.select([relation, place], ["relation", "place"], "attributes"), texts.index)


def _thirds(values: pd.Series, label: Callable[[pd.Series], str] | None = None) -> pd.Series:
    """Cut values into thirds, as far as ties allow, labelled by their range or as small, medium, large."""
    codes = pd.qcut(values.rank(method="average"), 3, labels=False, duplicates="drop").fillna(0).astype(int)
    codes = codes.rank(method="dense").astype(int) - 1
    sizes = ("small", "medium", "large")
    names = [label(values[codes == code]) if label else sizes[code] for code in sorted(codes.unique())]
    return pd.Series(pd.Categorical.from_codes(codes, names), values.index)


def rec_slices(
    ds: ReferDataset, regions: pd.DataFrame, predictions: pd.DataFrame, methods: Sequence[str], seed: int = 0
) -> pd.DataFrame:
    """Return accuracy by kind of expression, number of candidates in the image and size of the referred region.

    Columns aspect, slice, method, n, accuracy, ci_low, ci_high (percent; the interval resamples images, NaN where a
    slice has one image only). Candidates and sizes are cut into thirds of the expressions.
    """
    expressions = ds.expressions
    area = ds.regions[["w", "h"]].prod(axis=1).loc[expressions["ann_id"]].to_numpy()
    candidates = expressions["image_id"].map(regions.groupby("image_id").size())
    kinds = pd.CategoricalDtype(["attributes", "place", "relation"])
    aspects = {
        "kind of expression": expression_kind(expressions["text"]).astype(kinds),
        "candidates in the image": _thirds(candidates, lambda part: f"{part.min()}–{part.max()}"),
        "size of the region": _thirds(pd.Series(area, expressions.index)),
    }
    rows = []
    for aspect, slices in aspects.items():
        for name in slices.cat.categories:
            for method in methods:
                inside = predictions["sent_id"].isin(slices.index[slices == name])
                part = predictions[inside & (predictions["method"] == method)]
                if len(part):
                    hits = part["correct"].to_numpy(float)
                    bounds = cluster_bootstrap(hits, part["image_id"].to_numpy(), seed=seed)
                    rows.append([aspect, name, method, len(part), *percent(np.array([hits.mean(), *bounds]))])
    return pd.DataFrame(rows, columns=["aspect", "slice", "method", "n", "accuracy", "ci_low", "ci_high"])


def example_scenes(
    ds: ReferDataset, predictions: pd.DataFrame, method: str, each: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Return `each` expressions that only `method` gets right and as many that only CLIP does, drawn by `seed`.

    Where there are fewer, expressions on which both are right or wrong fill up to twice `each`. Columns image_id, text,
    outcome ("win", "loss", "both right", "both wrong"), and the boxes (xywh, pixels) truth, clip and `method`.
    """
    pair = list(dict.fromkeys(["clip", method]))
    wide = predictions.pivot(index="sent_id", columns="method", values="correct")[pair].astype(bool)
    names = {(False, True): "win", (True, False): "loss", (True, True): "both right", (False, False): "both wrong"}
    outcome = pd.Series([names[pair] for pair in zip(wide["clip"], wide[method], strict=True)], wide.index)
    outcome = outcome.sample(frac=1, random_state=seed)
    chosen = pd.concat([outcome[outcome == "win"].head(each), outcome[outcome == "loss"].head(each)])
    same = outcome[outcome.str.startswith("both")].head(2 * each - len(chosen))
    chosen = pd.concat([chosen, same]).rename("outcome")
    scenes = ds.expressions.loc[chosen.index, ["image_id", "text", "ann_id"]].join(chosen)
    scenes["truth"] = list(map(tuple, ds.regions.loc[scenes["ann_id"], XYWH].to_numpy()))
    for name in pair:
        boxes = predictions[predictions["method"] == name].set_index("sent_id")
        scenes[name] = list(map(tuple, boxes.loc[scenes.index, XYWH].to_numpy()))
    return scenes.reset_index(drop=True)


def retrieval_ranks(scores: Tensor, relevant: Tensor) -> np.ndarray:
    """Return the rank of the first relevant image for each text, from 1: [N, T] and [N, T] bool -> [T].

    Of equal scores the lower row ranks first, as in `BalancedIndex`. Raises ValueError where a text has no relevant image.

    >>> retrieval_ranks(torch.tensor([[3.0], [2.0], [2.0]]), torch.tensor([[False], [False], [True]]))
    array([3])
    """
    without = int((~relevant.any(0)).sum())
    if without:
        raise ValueError(f"{without} of {relevant.shape[1]} texts have no relevant image.")
    best = scores.masked_fill(~relevant, -torch.inf).amax(0)
    equal = scores == best
    row = (equal & relevant).int().argmax(0)  # the first: argmax takes the lowest of equals only if they are counted
    before = torch.arange(len(scores), device=scores.device)[:, None] < row
    return (1 + (scores > best).sum(0) + (equal & before).sum(0)).cpu().numpy()


def retrieval_table(
    ranks: Mapping[str, np.ndarray], images: np.ndarray, at: Sequence[int] = (1, 5, 10), seed: int = 0
) -> pd.DataFrame:
    """Return recall@k (percent) and median rank of each method, one row each, from the ranks [E] of `retrieval_ranks`.

    Columns method, n; for each k of `at` recall_k with recall_k_low and recall_k_high, and delta_k, delta_k_low, delta_k_high
    against "clip" in percentage points; median_rank, median_low, median_high. Intervals (95 %) resample `images` [E]. That of
    the median comes from those of the share of ranks up to m: it holds the m whose intervals have 50 % in them.

    >>> table = retrieval_table({"clip": np.array([1, 4, 30])}, np.array([1, 2, 3]))
    >>> table[["recall_1", "recall_5", "median_rank"]].round(1)
       recall_1  recall_5  median_rank
    0      33.3      66.7          4.0
    """
    rows = []
    for method, rank in ranks.items():
        steps = np.unique(np.quantile(rank, np.linspace(0, 1, 201), method="lower"))
        hit, clip = (of[:, None] <= np.array(at) for of in (rank, ranks["clip"]))
        parts = np.concatenate([hit, hit * 1.0 - clip, rank[:, None] <= steps], 1)
        low, high = cluster_bootstrap(parts, images, seed=seed)
        values = percent(np.stack([parts.mean(0), low, high], 1))
        row: dict[str, Any] = {"method": method, "n": len(rank)}
        for name, of_name in zip([f"{kind}_{k}" for kind in ("recall", "delta") for k in at], values, strict=False):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), of_name, strict=True))
        shares = (high[-len(steps) :], low[-len(steps) :])
        bounds = [steps[(share >= 0.5).argmax()] if np.isfinite(share).all() else np.nan for share in shares]
        rows.append({**row, "median_rank": np.median(rank), "median_low": bounds[0], "median_high": bounds[1]})
    return pd.DataFrame(rows)
