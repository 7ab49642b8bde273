"""How sure are we: intervals and tests that resample images, because expressions of one image are not independent.

One rule serves table, text and figure (`outcome`): a difference is shown when its interval leaves out 0 and, where a
table has several methods, its Holm-adjusted p-value is below 0.05.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

_BLOCK = 2**20  # counts of a cluster in a resample that are held at a time: about 30 MB


def _sums(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Add up rows [N, K] by cluster: a resample's sums are those of its clusters."""
    return pd.DataFrame(np.asarray(values, np.float64)).groupby(pd.factorize(clusters)[0]).sum().to_numpy()


def _blocks(draws: int, clusters: int) -> Iterator[int]:
    rows = max(_BLOCK // clusters, 1)
    yield from (min(rows, draws - start) for start in range(0, draws, rows))


def cluster_bootstrap(values: np.ndarray, clusters: np.ndarray, denominator: np.ndarray | None = None,
                      draws: int = 10_000, seed: int = 0,
                      reference: int | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the 95 % percentile interval of Σ values / Σ denominator, resampling clusters (images): low [K], high [K].

    `values` [N, K], `clusters` [N]. Without `denominator` the ratio is the mean; with it ([N, K]) it is for instance
    oIoU, from intersections and unions. The columns share their resamples, so a column may be a paired difference;
    `reference` is a column whose ratio is taken from all in each resample. Bounds are NaN for less than two clusters
    and where a denominator is 0 throughout. (Davison and Hinkley, Bootstrap Methods and Their Application, 1997, §3.8.)

    >>> hits = np.array([1, 1, 0, 1, 0, 0])
    >>> low, high = cluster_bootstrap(hits[:, None], np.array([7, 7, 7, 8, 8, 9]))
    >>> print(f"{low[0]:.3f} to {high[0]:.3f}")
    0.000 to 0.667
    """
    above = _sums(values, clusters)
    below = _sums(np.ones((len(values), 1)) if denominator is None else denominator, clusters)
    count, generator, parts = len(above), np.random.default_rng(seed), []
    if count < 2:
        return tuple(np.full((2, values.shape[1]), np.nan))  # type: ignore[return-value]
    for rows in _blocks(draws, count):
        drawn = generator.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(times @ above / (times @ below))
    ratios = np.concatenate(parts)
    if reference is not None:
        ratios -= ratios[:, [reference]]
    if np.isnan(ratios).any():  # a resample without any image of a slice says nothing about it
        frame = pd.DataFrame(ratios)
        return frame.quantile(0.025).to_numpy(), frame.quantile(0.975).to_numpy()
    return tuple(np.quantile(ratios, [0.025, 0.975], axis=0))  # type: ignore[return-value]


def sign_flip_p(difference: np.ndarray, clusters: np.ndarray, draws: int = 20_000, seed: int = 0) -> np.ndarray:
    """Return the two-sided p-value of no difference, flipping the sign of whole clusters (images): [N, K], [N] -> [K].

    Under the null hypothesis an image's summed difference is as likely negative as positive. With few images that
    differ the p-value cannot be small; without any it is 1. Drawn at random, so at least 1 / (draws + 1). NaN stays.

    >>> sign_flip_p(np.ones((3, 1)), np.array([1, 2, 3])).round(2)
    array([0.25])
    """
    sums = _sums(difference, clusters)
    generator, extreme = np.random.default_rng(seed), np.zeros(sums.shape[1])
    bound = np.abs(sums.sum(0)) * (1 - 1e-12)  # equal sums count as equal, whatever the order of adding
    for rows in _blocks(draws, len(sums)):
        signs = 2.0 * generator.integers(2, size=(rows, len(sums))) - 1
        extreme += (np.abs(signs @ sums) >= bound).sum(0)
    return np.where(np.isnan(bound), np.nan, (1 + extreme) / (1 + draws))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down rule (1979), [K] -> [K]; NaN is no test and stays.

    >>> holm([0.01, 0.04, 0.03]).round(2)
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def outcome(low: float, high: float, p: float = 0.0) -> str:
    """Return "better", "worse" or "no difference shown", from a difference's interval and its adjusted p-value."""
    if not p < 0.05 or not (low > 0 or high < 0):
        return "no difference shown"
    return "better" if low > 0 else "worse"


def verdict(name: str, delta: float, low: float, high: float, p: float = 0.0, unit: str = "points",
            reference: str = "CLIP") -> str:  # fmt: skip
    """Return a difference and what it shows in one line.

    >>> verdict("BSAP", 2.71, 0.2, 5.64)
    'BSAP − CLIP: +2.7 points [+0.2, +5.6]: better'
    """
    numbers = ["–" if np.isnan(value) else f"{value:+.1f}".replace("-", "−") for value in (delta, low, high)]
    return f"{name} − {reference}: {numbers[0]} {unit} [{numbers[1]}, {numbers[2]}]: {outcome(low, high, p)}"
