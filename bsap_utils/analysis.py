"""Why the wrong region is picked, and what changes that: the measures of notebooks 01, 02 and 05.

Ranges and variance of the logits, hubness, what a right region says on its own; the family of corrections over
temperature and weight; ablations with paired intervals.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .datasets import XYWH, ReferDataset
from .evaluation import cluster_bootstrap, expression_kind, mcnemar_p, pick_regions
from .normalization import METHODS, family, region_bias
from .proposals import box_iou
from .visual_prompts import pixel_edges

if TYPE_CHECKING:
    from .scoring import ReferLogits


def right_regions(ds: ReferDataset, regions: pd.DataFrame, logits: ReferLogits, threshold: float = 0.5) -> Tensor:
    """Return which candidates are right for the expressions of their image, in the slots of `logits.query`: [R, Q] bool.

    Right is IoU > `threshold` with the region meant, as in `rec_correct`. A slot without an expression is False.
    """
    referred = np.zeros((int(logits.group.max()) + 1, logits.query.shape[1], 4))
    referred[logits.expression_group, logits.expression_slot] = ds.regions.loc[ds.expressions["ann_id"], XYWH]
    return torch.from_numpy(box_iou(regions[XYWH].to_numpy()[:, None], referred[logits.group]) > threshold)


def hits(scores: Tensor, right: Tensor, logits: ReferLogits) -> np.ndarray:
    """Return whether the top-1 region of each expression is right, bool: [R, Q] -> [E], or K settings, [R, Q, K] -> [E, K].

    `right` [R, Q] is that of `right_regions`. No pick (a slot whose scores are NaN) counts as wrong.
    """
    picked = pick_regions(scores.flatten(1), logits.group).unflatten(1, scores.shape[1:])
    picked = picked[logits.expression_group, logits.expression_slot]
    slot = logits.expression_slot.view(-1, *[1] * (picked.ndim - 1))
    return (right[picked, slot] & (picked >= 0)).numpy()


def _pool(aux: Tensor, temperature: float) -> Tensor:
    """The pool of `normalization.family` over auxiliary logits, [R, M] -> [R], exact at any temperature."""
    return -family(torch.zeros_like(aux[:, :1]), aux, temperature=temperature)[:, 0]


def family_hits(
    logits: ReferLogits, right: Tensor, temperatures: Sequence[float], weights: Sequence[float]
) -> np.ndarray:
    """Return `hits` of query − w · pool at every temperature and weight, [E, T, W]: its mean over E is the accuracy.

    T = math.inf is the mean, weight 0 is CLIP. Nothing is encoded again: a setting costs one pass over the logits.
    """
    weight = torch.tensor(weights, dtype=logits.query.dtype)
    pools = (_pool(logits.aux, temperature) for temperature in temperatures)
    return np.stack([hits(logits.query[:, :, None] - pool[:, None, None] * weight, right, logits) for pool in pools], 1)


def matching_temperature(
    aux: Tensor, group: Tensor, nearest: int, temperatures: Sequence[float]
) -> tuple[float, float]:
    """Return the temperature whose pool is most like the mean of the `nearest` largest of `aux` [R, M], and what is left.

    That is where a top-k mean (NNN) belongs on a map of temperatures. Like means by the mean squared difference within
    images (`group` [R]): what all regions of an image share decides nothing. What is left is that of the top-k mean's
    own variance within images, from 0 (the same ranking of regions' biases) on.

    >>> matching_temperature(torch.eye(4), torch.tensor([0, 0, 1, 1]), 1, [0.01, 1.0, float("inf")])[0]
    0.01
    """

    def within(values: Tensor) -> Tensor:
        means = values.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, values, "mean", include_self=False)
        return values - means[group]

    top = within(aux.topk(min(nearest, aux.shape[1]), 1).values.mean(1))
    left = [float((within(_pool(aux, t)) - top).square().mean() / top.square().mean()) for t in temperatures]
    best = int(np.argmin(left))
    return temperatures[best], left[best]


def subset_hits(
    logits: ReferLogits, right: Tensor, sizes: Sequence[int], draws: int = 20, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return `hits` of BSAP with random subsets of the auxiliary prompts: [E, sizes, draws].

    Each draw is a random order of the prompts, of which a size takes the first; so the sizes of a draw are nested.
    """
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(logits.aux.shape[1]), (draws, 1)), axis=1)
    found = []
    for size in sizes:
        pools = torch.stack([_pool(logits.aux[:, chosen], temperature) for chosen in order[:, :size]], 1)
        found.append(hits(logits.query[:, :, None] - pools[:, None], right, logits))
    return np.stack(found, 1)


def named_prompts(texts: pd.Series, prompts: Sequence[str]) -> np.ndarray:
    """Return which auxiliary prompts stand, word for word, in each expression: [E, M] bool.

    >>> named_prompts(pd.Series(["small red key", "keyhole"]), ["key", "star"]).tolist()
    [[True, False], [False, False]]
    """
    patterns = [rf"\b{re.escape(prompt)}\b" for prompt in prompts]
    return np.stack([texts.str.contains(pattern, case=False).to_numpy(bool) for pattern in patterns], 1)


def unnamed_hits(logits: ReferLogits, right: Tensor, named: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return `hits` of BSAP where an expression's pool leaves out the prompts that it names (`named_prompts`): [E].

    An expression that names every prompt keeps them all.
    """
    hidden = torch.zeros(int(logits.group.max()) + 1, logits.query.shape[1], named.shape[1], dtype=torch.bool)
    hidden[logits.expression_group, logits.expression_slot] = torch.from_numpy(named)
    hidden &= ~hidden.all(2, keepdim=True)
    scores = logits.query.clone()
    for slot in range(scores.shape[1]):  # as many are left out for all regions of an image: no log M is needed
        kept = logits.aux.masked_fill(hidden[logits.group, slot], -torch.inf)
        scores[:, slot] -= temperature * (kept / temperature).logsumexp(1)
    return hits(scores, right, logits)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down rule (1979), [K] -> [K]; NaN is no test and stays.

    >>> holm([0.01, 0.04, 0.03]).round(2)
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def worked_scene(
    ds: ReferDataset, regions: pd.DataFrame, logits: ReferLogits, right: Tensor, count: int = 5, seed: int = 0
) -> dict[str, Any] | None:
    """Return an expression that CLIP gets wrong and BSAP right, drawn by `seed`, with `count` regions; None if there is none.

    `right` [R, Q] is that of `right_regions`. Expressions of attributes only, in images of enough candidates, are
    preferred. Keys: image_id, text, slot (column of `logits.query`) and rows [≤ count]: the rows of `regions` that CLIP
    and BSAP pick, and others that are wrong.
    """
    scores = torch.stack([METHODS[name](logits.query, logits.aux, logits.group) for name in ("clip", "bsap")], 2)
    correct = hits(scores, right, logits)
    wins = ~correct[:, 0] & correct[:, 1]
    enough = torch.bincount(logits.group)[logits.expression_group].numpy() >= count
    plain = (expression_kind(ds.expressions["text"]) == "attributes").to_numpy()
    found = next((f for f in map(np.flatnonzero, (wins & enough & plain, wins & enough, wins)) if len(f)), None)
    if found is None:
        return None
    generator = np.random.default_rng(seed)
    row = int(generator.choice(found))
    group, slot = int(logits.expression_group[row]), int(logits.expression_slot[row])
    picked = pick_regions(scores[:, slot], logits.group)[group]
    others = torch.nonzero((logits.group == group) & ~right[:, slot])[:, 0].numpy()
    others = generator.permutation(np.setdiff1d(others, picked.numpy()))[: count - 2]
    expression = ds.expressions.iloc[row]
    rows = torch.from_numpy(np.sort(np.concatenate([picked.numpy(), others])))
    return {"image_id": expression["image_id"], "text": expression["text"], "slot": slot, "rows": rows}


def typical_scenes(
    ds: ReferDataset, logits: ReferLogits, predictions: pd.DataFrame, temperature: float = 1.0
) -> list[dict[str, Any]]:
    """Return a typical expression that only BSAP gets right, and one that only CLIP does, with all candidates' scores.

    Typical: the one whose two picks differ in bias by the median of those expressions; to be seen in a picture: of those
    (where there are such) that speak of attributes only and whose two picks do not overlap. `predictions` is
    `rec_predictions` of clip and bsap. Keys: image_id, text, outcome ("win", "loss"), truth (xywh), clip and bsap (the rows
    of `regions` picked), and candidates: their logit and bias, one row of `regions` each.
    """
    wide = predictions.pivot(index="sent_id", columns="method", values=["region", "correct"])
    wide = wide.loc[ds.expressions.index]
    picked = wide["region"].astype(int)
    correct = wide["correct"].astype(bool)
    bias = region_bias(logits.aux, temperature).numpy()
    taken_off = bias[picked["clip"]] - bias[picked["bsap"]]
    boxes = predictions.pivot(index="sent_id", columns="method", values=XYWH).loc[ds.expressions.index]
    apart = box_iou(*(boxes.xs(name, axis=1, level="method").to_numpy() for name in ("clip", "bsap"))) == 0
    plain = (expression_kind(ds.expressions["text"]) == "attributes").to_numpy() & apart
    scenes = []
    for outcome, right, wrong in (("win", "bsap", "clip"), ("loss", "clip", "bsap")):
        only = (correct[right] & ~correct[wrong]).to_numpy()
        found = np.flatnonzero(only & plain if (only & plain).any() else only)
        if len(found):
            row = found[np.argsort(taken_off[found], kind="stable")[(len(found) - 1) // 2]]
            expression, picks = ds.expressions.iloc[row], picked.iloc[row]
            rows = torch.nonzero(logits.group == logits.expression_group[row])[:, 0].numpy()
            of_query = logits.query[rows, int(logits.expression_slot[row])].numpy()
            scenes.append(
                {"outcome": outcome, "image_id": expression["image_id"], "text": expression["text"],
                 "truth": tuple(ds.regions.loc[expression["ann_id"], XYWH]), "clip": picks["clip"], "bsap": picks["bsap"],
                 "candidates": pd.DataFrame({"logit": of_query, "bias": bias[rows]}, rows)}
            )  # fmt: skip
    return scenes


def best_setting(accuracy: pd.DataFrame) -> tuple[float, float]:
    """Return weight (index) and temperature (columns) of the highest accuracy; of equal ones the smallest weight, then T.

    >>> best_setting(pd.DataFrame([[60.0, 62.0], [62.0, 61.0]], index=[0.5, 1.0], columns=[1.0, 5.0]))
    (0.5, 5.0)
    """
    row, column = np.unravel_index(accuracy.to_numpy().argmax(), accuracy.shape)
    return float(accuracy.index[row]), float(accuracy.columns[column])


def ablation_table(
    levels: Sequence[object], correct: np.ndarray, clip: np.ndarray, images: np.ndarray, default: int = 0, seed: int = 0
) -> pd.DataFrame:
    """Return one row for each level of what is varied: accuracy, CLIP's at the same level, and the paired differences.

    `correct` and `clip` [E, K] hold hits (or, of random draws, their mean), `images` [E]; `default` is the column that
    delta_vs_default compares with. Percent, two decimals; all intervals (95 %) share their resamples of images. p_value
    is McNemar's against CLIP, p_holm the same after Holm's correction for the K levels; both NaN where hits are no 0 or
    1.

    >>> hits_of_clip, images = np.array([0, 1, 0, 1]), np.array([1, 1, 2, 3])
    >>> table = ablation_table([1, 5], np.array([[0, 1], [1, 1], [1, 1], [0, 1]]), hits_of_clip[:, None].repeat(2, 1), images)
    >>> table[["level", "accuracy", "clip_accuracy", "delta_vs_clip", "delta_vs_default"]]
      level  accuracy  clip_accuracy  delta_vs_clip  delta_vs_default
    0     1      50.0           50.0            0.0               0.0
    1     5     100.0           50.0           50.0              50.0
    """
    correct, clip = (np.asarray(part, dtype=np.float64) for part in (correct, clip))
    parts = np.stack([clip, correct, correct - clip, correct - correct[:, [default]]], 1)
    bounds = cluster_bootstrap(parts.reshape(len(parts), -1), images, seed=seed)
    shown = [np.round(100 * part.reshape(4, -1), 2) + 0.0 for part in (parts.mean(0), *bounds)]
    table = pd.DataFrame({"level": [str(level) for level in levels], "n": len(correct)})
    names = dict(clip_accuracy="clip_ci", accuracy="ci", delta_vs_clip="delta_ci", delta_vs_default="default_ci")
    for row, (name, interval) in enumerate(names.items()):
        table[[name, f"{interval}_low", f"{interval}_high"]] = np.stack([values[row] for values in shown], 1)
    columns = zip(correct.T, clip.T, strict=True)
    p = [mcnemar_p(a, b) if np.isin([a, b], [0, 1]).all() else np.nan for a, b in columns]
    return table.assign(p_value=[float(f"{one:.4g}") for one in p], p_holm=[float(f"{one:.4g}") for one in holm(p)])


def best_level(table: pd.DataFrame, default: int = 0) -> int:
    """Return the row of an `ablation_table` with the highest accuracy: the default if it is among the equals.

    >>> best_level(pd.DataFrame({"accuracy": [60.0, 62.0, 62.0]}), default=2)
    2
    """
    best = table["accuracy"] == table["accuracy"].max()
    return default if best.iloc[default] else int(best.argmax())


def range_statistics(logits: Tensor) -> pd.DataFrame:
    """Return each region's range of logits over many texts, [R, T] -> a row a region: mean, std, minimum, maximum.

    NaN marks a text that is not asked of a region, for instance one of its own image. The standard deviation is that
    of the texts at hand (divided by their number). Raises ValueError for a region that no text is asked of.

    >>> range_statistics(torch.tensor([[1.0, 3.0, torch.nan], [5.0, 5.0, 8.0]])).round(2)
       mean   std  minimum  maximum
    0   2.0  1.00      1.0      3.0
    1   6.0  1.41      5.0      8.0
    """
    if logits.ndim != 2 or not len(logits) or logits.isnan().all(1).any():
        raise ValueError(f"logits {list(logits.shape)}: [regions, texts] are needed, with a text for every region.")
    frame = pd.DataFrame(logits.double().cpu().numpy())
    measures = {"mean": frame.mean(axis=1), "std": frame.std(axis=1, ddof=0)}
    return pd.DataFrame(measures | {"minimum": frame.min(axis=1), "maximum": frame.max(axis=1)})


def sums_of_squares(scores: Tensor, group: Tensor | None = None) -> pd.DataFrame:
    """Return the two-way decomposition of the variance of `scores` [R, T], a row a region: region, text, interaction.

    score = mean + text effect + region effect + interaction (and noise: a cell has one score), the classical analysis
    of variance without replication (Scheffé, The Analysis of Variance, 1959, §4.2). The columns, summed over all rows,
    add up to the sum of squares about the grand mean; their shares of it are what region, text and interaction explain.
    With `group` [R], the image of each region, text effects are those of the text *in that image* and region effects
    are taken about the image's mean: text then is what cannot change which region of an image is picked, and
    region / (region + interaction) the part of what does that has nothing to do with the text. Row sums and
    `cluster_bootstrap` give intervals that resample images and keep the effects as they are. Raises ValueError for NaN,
    infinity and what is no matrix.

    >>> sums_of_squares(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
       region  text  interaction
    0     4.5   2.0          0.5
    1     4.5   2.0          0.5
    """
    if scores.ndim != 2 or not scores.numel() or not scores.isfinite().all():
        raise ValueError(f"scores {list(scores.shape)}: a full matrix [regions, texts] is needed, no NaN or infinity.")
    scores = scores.double()
    group = scores.new_zeros(len(scores), dtype=torch.long) if group is None else group.long()
    count = torch.bincount(group)[:, None]
    text = scores.new_zeros(len(count), scores.shape[1]).index_add(0, group, scores) / count.clamp(min=1)
    grand = scores.mean()
    region = scores.mean(1) - text.mean(1)[group]
    interaction = (scores - text[group] - region[:, None]).square().sum(1)
    squares = {"region": scores.shape[1] * region.square(), "text": (text - grand).square().sum(1)[group]}
    return pd.DataFrame({name: part.cpu().numpy() for name, part in (squares | {"interaction": interaction}).items()})


def k_occurrence(scores: Tensor, k: int = 1, group: Tensor | None = None, block: int = 2**23) -> Tensor:
    """Return for how many texts a region is among the `k` highest, [R, T] -> [R] (N_k of Radovanović et al., JMLR 2010).

    Without `group` all regions compete (a gallery); with it, [R], only those of one image do. NaN: the text is not
    asked of that region. Among equal scores the first row wins. `block` scores are sorted at a time. Raises ValueError
    for shapes that do not fit and k < 1.

    >>> k_occurrence(torch.tensor([[3.0, 3.0, 1.0], [2.0, 1.0, 2.0], [1.0, 2.0, torch.nan]]))
    tensor([2, 1, 0])
    """
    if scores.ndim != 2 or k < 1 or (group is not None and group.shape != scores.shape[:1]):
        raise ValueError(f"scores {list(scores.shape)}, k {k}: [regions, texts], k ≥ 1, one image a region are needed.")
    rows, times = len(scores), torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    place = torch.arange(rows, device=scores.device)
    if group is not None:  # after sorting by group, the place of a row in its own group is the same in every column
        size = torch.bincount(group.long())
        place = place - (size.cumsum(0) - size)[group.long().sort().values]
    for columns in scores.split(max(block // max(rows, 1), 1), 1):
        order = (-columns).argsort(dim=0, stable=True)  # NaN comes last
        if group is not None:
            order = order.gather(0, group[order].argsort(dim=0, stable=True))
        top = order[place < k]
        times += torch.bincount(top[~columns.gather(0, top).isnan()], minlength=rows)
    return times


def _resampled_weights(cluster: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each row counts: once each (the sample as it is), then as whole clusters are resampled, [B, R]."""
    codes, names = pd.factorize(np.asarray(cluster))
    yield np.ones((1, len(codes)))
    generator, block = np.random.default_rng(seed), max(2**17 // max(len(codes), 1), 1)
    share = np.full(len(names), 1 / len(names))
    for start in range(0, resamples if len(names) > 1 else 0, block):
        yield generator.multinomial(len(names), share, min(block, resamples - start))[:, codes].astype(np.float64)


def _interval(values: np.ndarray, level: float) -> np.ndarray:
    """Return value, low and high of a statistic, [1 + B] -> [3]: first the sample's own, then the resamples'."""
    usual = values[1:][np.isfinite(values[1:])]  # a resample may lack all that varies
    bounds = np.quantile(usual, [(1 - level) / 2, (1 + level) / 2]) if len(usual) else [np.nan, np.nan]
    return np.array([values[0], *bounds])


def _hubness(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return skewness, Gini index and share of zeros of counts [R], row i taken weights[b, i] times: [B, 3]."""
    number, middle = weights.sum(1), counts.mean()
    first, square, cube = (weights @ (counts - middle) ** power / number for power in (1, 2, 3))
    variance = square - first**2
    variance[variance < 1e-12 * middle**2] = np.nan  # nothing but rounding: the counts are equal
    third = cube - 3 * first * square + 2 * first**3
    order = np.argsort(counts, kind="stable")
    sorted_weights = np.take(weights, order, axis=1)
    before = sorted_weights.cumsum(1) - sorted_weights
    ranks = sorted_weights * (2 * before + sorted_weights - number[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        gini = ranks @ counts[order] / (number**2 * (middle + first))
        return np.stack([third / variance**1.5, gini, weights @ (counts == 0) / number], 1)


def hubness_table(
    counts: pd.DataFrame, cluster: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Return how unevenly regions are retrieved, from `counts`: a row a region, a column a method (`k_occurrence`, ≥ 0).

    One row a method and measure: skewness, the standardized third moment of N_k (Radovanović et al., JMLR 2010, §2; a
    hub-free gallery has about 0); gini, Σ|N_i − N_j| / (2 R² mean N) (0: all alike, 1: one region takes all); never,
    the share of regions with N = 0. Columns method, measure, value, ci_low, ci_high, delta_vs_clip, delta_ci_low,
    delta_ci_high; intervals resample images, `cluster` [R], and keep the counts. Measures are fractions, not percent;
    NaN where a measure has no meaning (the skewness of equal counts) or there is no column "clip". Raises
    ValueError for negative or NaN counts, none at all, and a `cluster` that does not fit.

    >>> table = hubness_table(pd.DataFrame({"clip": [0, 0, 0, 4]}), np.array([1, 1, 2, 2]))
    >>> table[["method", "measure", "value"]].round(2)
      method   measure  value
    0   clip  skewness   1.15
    1   clip      gini   0.75
    2   clip     never   0.75
    """
    values = counts.to_numpy(dtype=np.float64)
    if not len(values) or len(cluster) != len(values) or not (values >= 0).all():
        raise ValueError(f"counts {values.shape} must be ≥ 0, with one image a row ({len(cluster)} were given).")
    draws = _resampled_weights(cluster, resamples, seed)
    drawn = [np.stack([_hubness(column, weights) for column in values.T], 1) for weights in draws]
    statistics = np.concatenate(drawn)  # [1 + resamples, methods, measures]
    rows = []
    clip = statistics[:, list(counts).index("clip")] if "clip" in counts else np.full_like(statistics[:, 0], np.nan)
    for j, method in enumerate(counts):
        for m, measure in enumerate(("skewness", "gini", "never")):
            one = statistics[:, j, m]
            rows.append([method, measure, *_interval(one, level), *_interval(one - clip[:, m], level)])
    delta = ["delta_vs_clip", "delta_ci_low", "delta_ci_high"]
    return pd.DataFrame(rows, columns=["method", "measure", "value", "ci_low", "ci_high", *delta])


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the ranks of values [R], row i taken weights[b, i] times, ties sharing one, less their mean: [B, R]."""
    order = np.argsort(values, kind="stable")
    new = np.r_[True, np.diff(values[order]) != 0]
    code = np.empty(len(values), dtype=np.int64)
    code[order] = new.cumsum() - 1
    total = np.add.reduceat(np.take(weights, order, axis=1), np.flatnonzero(new), axis=1)
    # the mean rank of rows that count n in all is n / 2 here, whatever the ties
    return np.take(total.cumsum(1) - total / 2 - weights.sum(1, keepdims=True) / 2, code, axis=1)


def _spearman(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation of a and b [R], row i taken weights[k, i] times (ties share a rank): [B]."""
    x, y = _ranks(a, weights), _ranks(b, weights)
    xx, yy, xy = (np.einsum("bi,bi,bi->b", p, q, weights) for p, q in ((x, x), (y, y), (x, y)))
    floor = 1e-9 * weights.sum(1) ** 3  # below it a variance of ranks is rounding: all values are equal
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((xx > floor) & (yy > floor), xy / np.sqrt(xx * yy), np.nan)


def spearman_table(outcome: np.ndarray, traits: pd.DataFrame, cluster: np.ndarray, resamples: int = 1000,
                   level: float = 0.95, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """Return Spearman's rank correlation of `outcome` [R] with each column of `traits`, resampling images (`cluster` [R]).

    Columns trait, n, spearman, ci_low, ci_high. Rows where a trait is NaN are left out of its correlation (n counts the
    rest); a trait that is the same in all regions has NaN. Ranks are taken anew in each resample. Raises ValueError for
    shapes that do not fit and an `outcome` with NaN.

    >>> traits = pd.DataFrame({"size": [1, 2, 4, 9], "background": [True, True, False, True]})
    >>> spearman_table(np.array([0.1, 0.2, 0.3, 0.4]), traits, np.array([1, 2, 3, 4]))[["trait", "n", "spearman"]].round(2)
            trait  n  spearman
    0        size  4      1.00
    1  background  4     -0.26
    """
    outcome, cluster = np.asarray(outcome, dtype=np.float64), np.asarray(cluster)
    if not (outcome.shape == cluster.shape == (len(traits),)) or np.isnan(outcome).any():
        shapes = f"outcome {outcome.shape}, cluster {cluster.shape} and traits {traits.shape}"
        raise ValueError(f"{shapes} do not fit, or have NaN.")
    rows = []
    for name in traits:
        trait = traits[name].to_numpy(dtype=np.float64)
        known = ~np.isnan(trait)
        draws = _resampled_weights(cluster[known], resamples, seed) if known.any() else ()
        drawn = [_spearman(outcome[known], trait[known], weights) for weights in draws] or [np.array([np.nan])]
        rows.append([name, int(known.sum()), *_interval(np.concatenate(drawn), level)])
    return pd.DataFrame(rows, columns=["trait", "n", "spearman", "ci_low", "ci_high"])


def _overlaps(ds: ReferDataset, regions: pd.DataFrame) -> pd.DataFrame:
    """Return all pairs of a candidate and an annotation (no crowd) of one image: row (of `regions`), ann_id, iou."""
    annotated = ds.regions.loc[ds.regions["iscrowd"] == 0, ["image_id", *XYWH]].reset_index(names="ann_id")
    candidates = regions[["image_id", *XYWH]].assign(row=np.arange(len(regions)))
    pairs = candidates.merge(annotated, on="image_id", suffixes=("", "_meant"))
    iou = box_iou(pairs[XYWH].to_numpy(), pairs[[f"{side}_meant" for side in XYWH]].to_numpy())
    return pairs[["row", "ann_id"]].assign(iou=iou)


def best_candidates(ds: ReferDataset, regions: pd.DataFrame, threshold: float = 0.5) -> np.ndarray:
    """Return, for each expression, the row of the candidate with the highest IoU with the region meant: [E].

    -1 where none has IoU > `threshold`, so that no method can be right.

    >>> from bsap_utils.datasets import load_refer
    >>> from bsap_utils.proposals import ground_truth
    >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
    >>> candidates = ground_truth(val)
    >>> bool((candidates["ann_id"].loc[best_candidates(val, candidates)].to_numpy() == val.expressions["ann_id"]).all())
    True
    """
    pairs = _overlaps(ds, regions)
    best = pairs[pairs["iou"] > threshold].sort_values("iou", ascending=False, kind="stable").drop_duplicates("ann_id")
    return ds.expressions["ann_id"].map(best.set_index("ann_id")["row"]).fillna(-1).to_numpy(np.int64)


def prefers_query(
    logits: ReferLogits, rows: Tensor | np.ndarray, same: Tensor | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tell whether a region, asked on its own, takes the expression rather than an auxiliary prompt, by two criteria.

    `rows` [E] is a row of the logits for each expression, of its own image; -1 (no such region) is False. The first
    answer, bool [E]: the query's logit is greater than *every* auxiliary one, as a classifier decides. The second:
    BSAP's b (arXiv 2402.18400) > 0.5 at temperature 1, greater than their logsumexp, so that the query has more weight
    than all of them *together*; stricter, and ever more so as prompts are added. `same` [E, M] marks auxiliary prompts
    with the words of the expression itself: they are left out for it, for nothing is preferred to itself. Raises
    ValueError for rows of other images, or not one for each expression.
    """
    rows = torch.as_tensor(np.array(rows)).long()
    if rows.shape != logits.expression_group.shape:
        raise ValueError(f"rows {list(rows.shape)}: one region for each of {len(logits.expression_group)} expressions.")
    some = rows >= 0
    if (logits.group[rows[some]] != logits.expression_group[some]).any():
        raise ValueError("rows holds regions of other images than those of the expressions.")
    query, aux = logits.query[rows, logits.expression_slot], logits.aux[rows]
    if same is not None:
        aux = aux.masked_fill(torch.as_tensor(same), -torch.inf)
    return tuple((some & (query > bound)).numpy() for bound in (aux.amax(1), aux.logsumexp(1)))  # type: ignore[return-value]


_CLIP_ERRORS = (
    "only the right region prefers it",
    "both prefer it",
    "the right region does not",
    "no candidate is right",
)


def classifier_retriever_tables(answers: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return how often CLIP is right as a classifier and wrong as a retriever, and what CLIP's errors are made of.

    `answers` has one row an expression: image_id; reachable (a candidate is right); clip and bsap (the arg max over the
    image's regions is right); and for each criterion c ("every", "half": `prefers_query`) right_c, the right region
    prefers the expression, and picked_c, the region that CLIP picks does. First table, of the reachable expressions:
    criterion, classifier, retriever (bool), n, share, ci_low, ci_high. Second, of the expressions CLIP gets wrong:
    criterion, error (four kinds), n, share, ci_low, ci_high, mended (share of them that BSAP gets right; NaN for none).
    Fractions; intervals resample images, NaN where there are less than two.

    >>> columns = {"image_id": [1, 1, 2, 2], "reachable": [True, True, True, False], "clip": [True, False, False, False]}
    >>> criteria = {f"{who}_{c}": [True, True, False, False] for who in ("right", "picked") for c in ("every", "half")}
    >>> answers = pd.DataFrame(columns | {"bsap": [True, True, False, False]} | criteria)
    >>> classifier_retriever_tables(answers)[1][["criterion", "error", "n", "mended"]].head(4)
      criterion                             error  n  mended
    0     every  only the right region prefers it  0     NaN
    1     every                    both prefer it  1     1.0
    2     every         the right region does not  1     0.0
    3     every             no candidate is right  1     0.0
    """
    cells, errors = [], []
    reachable, wrong = answers[answers["reachable"]], answers[~answers["clip"]]
    for criterion in ("every", "half"):
        right = reachable[f"right_{criterion}"]
        for classifier, retriever in itertools.product((True, False), repeat=2):
            member = (right == classifier) & (reachable["clip"] == retriever)
            cells.append([criterion, classifier, retriever, *_share(member, reachable["image_id"], seed)])
        right, picked = wrong[f"right_{criterion}"], wrong[f"picked_{criterion}"]
        members = (right & ~picked, right & picked, wrong["reachable"] & ~right, ~wrong["reachable"])
        for name, member in zip(_CLIP_ERRORS, members, strict=True):
            errors.append([criterion, name, *_share(member, wrong["image_id"], seed), wrong.loc[member, "bsap"].mean()])
    shared = ["n", "share", "ci_low", "ci_high"]
    return (pd.DataFrame(cells, columns=["criterion", "classifier", "retriever", *shared]),
            pd.DataFrame(errors, columns=["criterion", "error", *shared, "mended"]))  # fmt: skip


def _share(member: pd.Series, images: pd.Series, seed: int) -> list[float]:
    """Return number, share and its interval (images resampled) of the rows that are True."""
    hits = member.to_numpy(np.float64)
    low, high = cluster_bootstrap(hits, images.to_numpy(), seed=seed) if len(hits) else (np.nan, np.nan)
    return [int(hits.sum()), hits.mean() if len(hits) else np.nan, float(low), float(high)]


def region_traits(ds: ReferDataset, regions: pd.DataFrame, train: ReferDataset | None = None) -> pd.DataFrame:
    """Return what might make a region a hub, one row a candidate.

    category  of the annotation it frames best, None where none has IoU > 0.5 (background, or a badly framed object)
    background  True there
    size  its share of the image's area
    off_centre  distance of its centre from the image's, in half diagonals: 0 in the middle, 1 in a corner
    height  of its centre in the image: 0 at the bottom, 1 at the top
    contrast  standard deviation of the grey values in it, 0..0.5 (0..255 scaled to 0..1)
    framing  highest IoU with an annotation
    frequency  share of the regions of `train` that are of its category; NaN for background and without `train`

    Each image is decoded once. Raises DatasetError for images that are missing or damaged.
    """
    best = _overlaps(ds, regions).sort_values("iou", ascending=False, kind="stable").drop_duplicates("row")
    best = best.set_index("row").reindex(np.arange(len(regions)))
    framing = best["iou"].fillna(0).to_numpy()
    category = best["ann_id"].map(ds.regions["category"]).where(framing > 0.5, None).to_numpy()
    image = ds.images.loc[regions["image_id"], ["width", "height"]].to_numpy(float)
    boxes = regions[XYWH].to_numpy(float)
    centre = (boxes[:, :2] + boxes[:, 2:] / 2) / image
    frequency = pd.Series(dtype=float) if train is None else train.regions["category"].value_counts(normalize=True)
    return pd.DataFrame({
        "category": category,
        "background": framing <= 0.5,
        "size": boxes[:, 2:].prod(1) / image.prod(1),
        "off_centre": np.linalg.norm((centre - 0.5) * image, axis=1) / np.linalg.norm(image / 2, axis=1),
        "height": 1 - centre[:, 1],
        "contrast": _contrast(ds, regions),
        "framing": framing,
        "frequency": pd.Series(category).map(frequency.to_dict()).to_numpy(dtype=float),
    })  # fmt: skip


def _contrast(ds: ReferDataset, regions: pd.DataFrame) -> np.ndarray:
    """Return the standard deviation of grey values (0..1) inside each box: [R]."""
    contrast = np.empty(len(regions))
    for image_id, rows in regions.groupby("image_id", sort=False).indices.items():
        grey = np.asarray(ds.load_image(image_id).convert("L"), dtype=np.float64) / 255
        edges = pixel_edges(torch.tensor(regions[XYWH].to_numpy(np.float32)[rows]), *grey.shape).tolist()
        contrast[rows] = [grey[top:bottom, left:right].std() for left, top, right, bottom in edges]
    return contrast
