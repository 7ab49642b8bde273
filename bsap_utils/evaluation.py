"""Which candidate is picked, is it right, and how sure are we: REC, RIS and retrieval from scores alone.

`scores` maps any name to one number a pair (or, of a gallery, [N, T]); the first is the reference that differences are
taken to. Intervals and tests resample images. Tables hold percentages with two decimals, NaN where nothing can be said.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .datasets import ReferDataset
from .regions import Pairs
from .stats import cluster_bootstrap, holm, sign_flip_p

_RECALLS = ("recall_1", "recall_5", "recall_10", "delta_1", "delta_5", "delta_10")


def pick(pairs: Pairs, scores: Tensor) -> Tensor:
    """Return the row of `pairs` with the highest score of each expression, [P] -> [E]; of equal scores the first.

    Raises ValueError for scores that are NaN or not one a pair.
    """
    if scores.shape != pairs.expression.shape or scores.isnan().any():
        missing = int(scores.isnan().sum())
        raise ValueError(f"{len(pairs.expression)} pairs have {list(scores.shape)} scores, {missing} of them NaN: "
                         "one number a pair is needed.")  # fmt: skip
    count, rows = int(pairs.expression.max()) + 1, torch.arange(len(scores), device=scores.device)
    top = scores.new_zeros(count).scatter_reduce(0, pairs.expression, scores, "amax", include_self=False)
    rows = rows.where(scores == top[pairs.expression], len(rows))
    return rows.new_zeros(count).scatter_reduce(0, pairs.expression, rows, "amin", include_self=False)


def percent(fractions: np.ndarray) -> np.ndarray:
    """Return fractions [K] as the tables print them: percent with two decimals, and no "-0.0"."""
    return np.round(100 * np.asarray(fractions, np.float64), 2) + 0.0


def _picks(pairs: Pairs, scores: Mapping[str, Tensor]) -> tuple[Tensor, np.ndarray]:
    """Return the picked rows of each method, [K, E], and each expression's image, [E]."""
    rows = torch.stack([pick(pairs, torch.as_tensor(one)) for one in scores.values()])
    return rows, pairs.image[rows[0]].numpy()


def _start(setting: Mapping[str, Any], methods: Sequence[str], count: int) -> dict[str, Any]:
    """The first columns of a table; a list, as of visual prompts, is joined by +."""
    texts = {key: "+".join(value) if isinstance(value, (list, tuple)) else value for key, value in setting.items()}
    return {**texts, "method": list(methods), "n": count}


def _means(parts: dict[str, np.ndarray], images: np.ndarray, seed: int, draws: int = 10_000) -> dict[str, np.ndarray]:
    """Mean, low and high in percent, [3, K], of each part [E, K], from the same resamples of images."""
    values = np.concatenate([*parts.values()], 1)
    three = percent(np.stack([values.mean(0), *cluster_bootstrap(values, images, draws=draws, seed=seed)]))
    return dict(zip(parts, np.split(three, len(parts), axis=1), strict=True))


def rec_table(pairs: Pairs, scores: Mapping[str, Tensor], threshold: float = 0.5, seed: int = 0,
              by: pd.Series | None = None, **setting: Any) -> pd.DataFrame:  # fmt: skip
    """Return how often each method picks a candidate with IoU > `threshold` (strict, as ReCLIP's code): a row a method.

    Columns: `setting`, method, n, accuracy, ci_low, ci_high, delta_vs_clip (points, to the first method, whatever its
    name), p_value (sign flips over images), delta_ci_low, delta_ci_high, p_holm (for the methods of the table). With
    `by`, a value an expression such as its split, each value has rows of its own, in a column of that name.

    >>> pairs = Pairs(*map(torch.tensor, ([0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1], [0.9, 0.1, 0.2, 0.8])))
    >>> scores = {"clip": torch.tensor([2.0, 1.0, 2.0, 1.0]), "mine": torch.tensor([2.0, 1.0, 0.0, 1.0])}
    >>> rec_table(pairs, scores, split="val")[["split", "method", "n", "accuracy", "delta_vs_clip"]]
      split method  n  accuracy  delta_vs_clip
    0   val   clip  2      50.0            0.0
    1   val   mine  2     100.0           50.0
    """
    rows, images = _picks(pairs, scores)
    every, parts = (pairs.iou[rows] > threshold).double().numpy().T, []
    for level, inside in ({"": slice(None)} if by is None else by.groupby(by.to_numpy(), sort=False).indices).items():
        hits, clusters = every[inside], images[inside]
        found = _means({"accuracy": hits, "delta": hits - hits[:, :1]}, clusters, seed)
        p = sign_flip_p(hits - hits[:, :1], clusters, seed=seed)
        parts.append(pd.DataFrame({
            **_start({**setting, **({} if by is None else {by.name: level})}, list(scores), len(hits)),
            "accuracy": found["accuracy"][0], "ci_low": found["accuracy"][1], "ci_high": found["accuracy"][2],
            "delta_vs_clip": found["delta"][0], "p_value": p.round(4),
            "delta_ci_low": found["delta"][1], "delta_ci_high": found["delta"][2],
            "p_holm": np.r_[1.0, holm(p[1:])].round(4),
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def ris_table(pairs: Pairs, scores: Mapping[str, Tensor], seed: int = 0, **setting: Any) -> pd.DataFrame:
    """Return how well the picked masks fit, a row a method, and last "oracle": each expression's best candidate.

    Columns: `setting`, method, n, in percent oiou (Σ intersection / Σ union), miou and p50 … p90 (share of expressions
    with IoU ≥ 0.5 …), each with _low and _high; delta_oiou_vs_clip and delta_miou_vs_clip to the first method with
    their intervals; p_value and p_holm of mIoU. Measures as LAVT's (Yang et al., CVPR 2022).
    """
    if pairs.intersection is None or pairs.union is None:
        raise ValueError("The pairs have no masks: make them with pair_up(ds, candidates, masks=True).")
    rows, images = _picks(pairs, {**scores, "oracle": pairs.iou})
    above, below, iou = (values[rows].double().numpy().T for values in (pairs.intersection, pairs.union, pairs.iou))
    below = np.maximum(below, 1e-9)  # nothing but empty masks: oIoU 0
    value = above.sum(0) / below.sum(0)
    found = {"oiou": percent(np.stack([value, *cluster_bootstrap(above, images, below, seed=seed)]))}
    precisions = {f"p{t}": (iou >= t / 100).astype(np.float64) for t in range(50, 100, 10)}
    found |= _means({"miou": iou, **precisions, "delta_miou": iou - iou[:, :1]}, images, seed)
    delta_oiou = np.stack([value - value[0], *cluster_bootstrap(above, images, below, seed=seed, reference=0)])
    deltas = {"delta_oiou": percent(delta_oiou), "delta_miou": found.pop("delta_miou")}
    columns = _start(setting, [*scores, "oracle"], len(iou))
    for name, (middle, low, high) in (found | deltas).items():
        columns |= {name + "_vs_clip" * (name in deltas): middle, f"{name}_low": low, f"{name}_high": high}
    p = sign_flip_p(iou - iou[:, :1], images, seed=seed)  # the oracle is no method, and without p_holm
    return pd.DataFrame({**columns, "p_value": p.round(4), "p_holm": np.r_[1.0, holm(p[1:-1]), np.nan].round(4)})


def ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """Return the rank of the first relevant image for each text, from 1: [N, T] and [N, T] bool -> [T].

    Of equal scores the lower row ranks first, as in `BalancedIndex`. ValueError where a text has no relevant image.

    >>> ranks(torch.tensor([[3.0], [2.0], [2.0]]), torch.tensor([[False], [False], [True]]))
    tensor([3])
    """
    if not relevant.any(0).all():
        raise ValueError(f"{int((~relevant.any(0)).sum())} of {relevant.shape[1]} texts have no relevant image.")
    best = scores.masked_fill(~relevant, -torch.inf).amax(0)
    equal = scores == best
    row = (equal & relevant).int().argmax(0)  # argmax takes the first of equals only if they are counted
    before = torch.arange(len(scores), device=scores.device)[:, None] < row
    return 1 + (scores > best).sum(0) + (equal & before).sum(0)


def recall_table(scores: Mapping[str, Tensor], relevant: Tensor, seed: int = 0, **setting: Any) -> pd.DataFrame:
    """Return recall@k (percent) and median rank of each method, a row a method, from [N, T] scores and relevance.

    Columns: `setting`, method, n; for k = 1, 5, 10 recall_k and delta_k (points, to the first method), each with _low
    and _high; median_rank, median_low, median_high. Intervals resample texts.
    """
    found = {name: ranks(one, relevant).cpu().numpy() for name, one in scores.items()}
    count, ks = relevant.shape[1], np.array([1, 5, 10])
    reference, rows = next(iter(found.values()))[:, None] <= ks, []
    for rank in found.values():
        steps = np.unique(np.quantile(rank, np.linspace(0, 1, 201), method="lower"))
        hit = rank[:, None] <= ks
        parts = np.concatenate([hit, hit * 1.0 - reference, rank[:, None] <= steps], 1)
        low, high = cluster_bootstrap(parts, np.arange(count), seed=seed)
        row: dict[str, float] = {}
        for name, *three in zip(_RECALLS, *percent(np.stack([parts.mean(0), low, high])), strict=False):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), three, strict=True))
        shares = (high[-len(steps) :], low[-len(steps) :])
        bounds = [steps[(share >= 0.5).argmax()] if np.isfinite(share).all() else np.nan for share in shares]
        rows.append({**row, "median_rank": np.median(rank), "median_low": bounds[0], "median_high": bounds[1]})
    return pd.concat([pd.DataFrame(_start(setting, list(found), count)), pd.DataFrame(rows)], axis=1)


def accuracy_by(
    pairs: Pairs, scores: Mapping[str, Tensor], groups: pd.Series | pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """Return accuracy in slices of the expressions: `groups` has a row an expression, in each column its slice.

    Columns aspect, slice, method, n, accuracy, ci_low, ci_high, delta_vs_clip, delta_ci_low, delta_ci_high (percent; to
    the first method; intervals resample images, as in `rec_table`).
    """
    rows, images = _picks(pairs, scores)
    hits, parts = (pairs.iou[rows] > 0.5).double().numpy().T, []
    for aspect, labels in pd.DataFrame(groups).reset_index(drop=True).items():
        for name, inside in labels.groupby(labels, observed=True).indices.items():
            own = hits[inside]
            found = _means({"accuracy": own, "delta": own - own[:, :1]}, images[inside], seed, draws=2000)
            parts.append(pd.DataFrame({
                "aspect": aspect, "slice": name, "method": list(scores), "n": len(own),
                **dict(zip(("accuracy", "ci_low", "ci_high"), found["accuracy"], strict=True)),
                **dict(zip(("delta_vs_clip", "delta_ci_low", "delta_ci_high"), found["delta"], strict=True)),
            }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


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


def expression_slices(ds: ReferDataset, candidates: pd.DataFrame) -> pd.DataFrame:
    """Return a row an expression for `accuracy_by`: its kind, and thirds by number of candidates and size of target."""
    texts, image_ids = ds.expressions["text"], ds.expressions["image_id"]
    area = ds.annotations[["w", "h"]].prod(axis=1).loc[ds.expressions["ann_id"]].set_axis(texts.index)
    kinds = pd.CategoricalDtype(["attributes", "place", "relation"])
    return pd.DataFrame({
        "kind of expression": expression_kind(texts).astype(kinds),
        "candidates in the image": _thirds(image_ids.map(candidates.groupby("image_id").size())),
        "size of the region": _thirds(area, ["small", "medium", "large"]),
    })  # fmt: skip


def _thirds(values: pd.Series, names: Sequence[str] = ()) -> pd.Series:
    """Cut values into thirds, as far as ties allow, with `names` or labelled by their range."""
    codes = pd.qcut(values.rank(), 3, labels=False, duplicates="drop").fillna(0).rank(method="dense").astype(int) - 1
    ranges = values.groupby(codes).agg(lambda part: f"{part.min()}–{part.max()}")
    return pd.Series(pd.Categorical.from_codes(codes, names or list(ranges)), values.index)
