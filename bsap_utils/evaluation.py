"""Which candidate is picked, is it right, and how sure are we: REC and RIS from scores alone.

`scores` maps any name to one number a pair; the first is the reference that differences are taken to. Intervals and
tests resample images. Tables hold percentages with two decimals, NaN where nothing can be said.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .regions import Pairs
from .stats import holm, resampled, sign_flip_p


def pick(pairs: Pairs, scores: Tensor) -> Tensor:
    """Return the row of `pairs` with the highest score of each expression, [P] -> [E] or [P, K] -> [E, K]; of equals the first.

    Raises ValueError for scores that are NaN or not one a pair.
    """
    if scores.shape[:1] != pairs.expression.shape or scores.isnan().any():
        raise ValueError(f"{list(scores.shape)} scores of {len(pairs)} pairs, or NaN: one number a pair is needed.")
    numbers = pairs.expression, torch.arange(len(scores), device=scores.device)
    index, rows = (one.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores) for one in numbers)
    top = scores.new_zeros(int(pairs.expression.max()) + 1, *scores.shape[1:])
    top = top.scatter_reduce(0, index, scores, "amax", include_self=False)
    rows = rows.where(scores == top[pairs.expression], len(rows))
    return rows.new_zeros(top.shape).scatter_reduce(0, index, rows, "amin", include_self=False)


def _measures(parts: dict, images: np.ndarray, seed: int, **divisors: np.ndarray) -> pd.DataFrame:
    """A row a method: mean of each part [E, K], or Σ part / Σ divisor, differences to the first, and intervals, in percent."""
    above = np.concatenate([*parts.values()], 1)
    below = np.concatenate([divisors.get(name, np.ones_like(part)) for name, part in parts.items()], 1)
    every = np.vstack([above.sum(0) / below.sum(0), resampled(above, images, below, 10_000, seed)])
    every = every.reshape(len(every), len(parts), -1)
    every = np.concatenate([every, every - every[:, :, :1]], 1)  # [1 + draws, measures, K]
    three = np.stack([every[0], *np.quantile(every[1:], [0.025, 0.975], axis=0)], 1)
    names = [f"{start}{name}{end}" for start in ("", "delta_") for name in parts for end in ("", "_low", "_high")]
    percent = np.round(100 * three, 9).round(2) + 0.0  # 9: halves stay halves, whatever was subtracted; 0.0: no "-0.0"
    return pd.DataFrame(percent.reshape(len(names), -1).T, columns=names)


def rec_table(pairs: Pairs, scores: Mapping[str, Tensor], seed: int = 0, by: pd.Series | None = None,
              **setting: Any) -> pd.DataFrame:  # fmt: skip
    """Return how often each method picks a candidate with IoU > 0.5 (strict, as ReCLIP's code): a row a method.

    Columns: `setting`, method, n, accuracy, ci_low, ci_high, delta_vs_clip (points, to the first method, whatever its
    name), p_value (sign flips over images), delta_ci_low, delta_ci_high, p_holm (for the methods of the table). With
    `by`, a value an expression such as its split, each value but NaN has rows of its own, in a column of that name.

    >>> pairs = Pairs(*map(torch.tensor, ([0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1], [0.9, 0.1, 0.2, 0.8])))
    >>> scores = {"clip": torch.tensor([2.0, 1.0, 2.0, 1.0]), "mine": torch.tensor([2.0, 1.0, 0.0, 1.0])}
    >>> rec_table(pairs, scores, split="val")[["split", "method", "n", "accuracy", "delta_vs_clip"]]
      split method  n  accuracy  delta_vs_clip
    0   val   clip  2      50.0            0.0
    1   val   mine  2     100.0           50.0
    """
    rows = torch.stack([pick(pairs, torch.as_tensor(one)) for one in scores.values()])
    images = pairs.image[rows[0]].numpy()
    right, parts = (pairs.iou[rows] > 0.5).double().numpy().T, []
    by = pd.Series("", range(len(images))) if by is None else by
    if len(by) != len(images):
        raise ValueError(f"{len(by)} values of {by.name}, of {len(images)} expressions: one an expression is needed.")
    for level, inside in by.groupby(by.array, sort=by.dtype == "category", observed=True).indices.items():
        hits, of_level = right[inside], setting | ({} if by.name is None else {by.name: level})
        names = ["accuracy", "ci_low", "ci_high", "delta_vs_clip", "delta_ci_low", "delta_ci_high"]
        table = _measures({"accuracy": hits}, images[inside], seed).set_axis(names, axis=1)
        p = sign_flip_p(hits - hits[:, :1], images[inside], seed=seed)
        table.insert(4, "p_value", p.round(4))
        table["p_holm"] = np.r_[1.0, holm(p[1:])].round(4)
        parts.append(pd.concat([pd.DataFrame({**of_level, "method": [*scores], "n": len(hits)}), table], axis=1))
    return pd.concat(parts, ignore_index=True)


def ris_table(pairs: Pairs, scores: Mapping[str, Tensor], seed: int = 0, **setting: Any) -> pd.DataFrame:
    """Return how well the picked masks fit, a row a method, and last "oracle": each expression's best candidate.

    Columns: `setting`, method, n, in percent oiou (Σ intersection / Σ union), miou and p50 … p90 (share of expressions
    with IoU ≥ 0.5 …), each with _low and _high; delta_oiou_vs_clip and delta_miou_vs_clip to the first method with
    their intervals; p_value and p_holm of mIoU. Measures as LAVT's (Yang et al., CVPR 2022).
    """
    if pairs.intersection is None or pairs.union is None:
        raise ValueError("The pairs have no masks: make them with pair_up(ds, candidates, masks=True).")
    rows = torch.stack([pick(pairs, torch.as_tensor(one)) for one in [*scores.values(), pairs.iou]])
    images = pairs.image[rows[0]].numpy()
    shared, union, iou = (values[rows].double().numpy().T for values in (pairs.intersection, pairs.union, pairs.iou))
    precisions = {f"p{t}": (iou >= t / 100).astype(np.float64) for t in range(50, 100, 10)}
    union = np.maximum(union, 1e-9)  # nothing but empty masks: oIoU 0
    table = _measures({"oiou": shared, "miou": iou, **precisions}, images, seed, oiou=union)
    table = table.loc[:, ~table.columns.str.startswith("delta_p")]
    table = table.rename(columns={f"delta_{name}": f"delta_{name}_vs_clip" for name in ("oiou", "miou")})
    p = sign_flip_p(iou - iou[:, :1], images, seed=seed)  # the oracle is no method, and without p_holm
    table = table.assign(p_value=p.round(4), p_holm=np.r_[1.0, holm(p[1:-1]), np.nan].round(4))
    return pd.concat([pd.DataFrame({**setting, "method": [*scores, "oracle"], "n": len(iou)}), table], axis=1)


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
