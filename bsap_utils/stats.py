"""How sure are we: intervals and tests that resample images, because expressions of one image are not independent."""

import numpy as np
import pandas as pd


def _sums(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Add up rows [N, K] by cluster: a resample's sums are those of its clusters."""
    codes, _ = pd.factorize(np.asarray(clusters))
    return np.stack([np.bincount(codes, column) for column in np.asarray(values).T], 1)


def _blocks(draws: int, clusters: int) -> list[int]:
    """Numbers of draws that add up to `draws`, each with about 30 MB of counts of clusters."""
    rows = max(2**20 // clusters, 1)
    return [min(rows, draws - start) for start in range(0, draws, rows)]


def resampled(values: np.ndarray, clusters: np.ndarray, divisors: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return Σ values / Σ divisors [N, K] of each resample of the clusters [N] (images), [draws, K]; NaN for one cluster.

    Columns share their resamples, so that differences of columns are paired ones.
    """
    above, below = _sums(values, clusters), _sums(divisors, clusters)
    count, generator, parts = len(above), np.random.default_rng(seed), []
    for rows in _blocks(draws, count):
        drawn = generator.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        parts.append(times @ above / (times @ below))
    return np.concatenate(parts) if count > 1 else np.full_like(above, np.nan)


def cluster_bootstrap(
    values: np.ndarray, clusters: np.ndarray, denominator: np.ndarray | None = None, draws: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % percentile interval of Σ values / Σ denominator, resampling clusters (images): low [K], high [K].

    `values` [N, K], `clusters` [N]. Without `denominator` ([N, K]: oIoU from intersections and unions) the ratio is the
    mean. NaN for less than two clusters. (Davison and Hinkley, Bootstrap Methods, 1997, §3.8.)

    >>> hits = np.array([1, 1, 0, 1, 0, 0])
    >>> low, high = cluster_bootstrap(hits[:, None], np.array([7, 7, 7, 8, 8, 9]))
    >>> print(f"{low[0]:.3f} to {high[0]:.3f}")
    0.000 to 0.667
    """
    divisors = np.ones((len(values), 1)) if denominator is None else denominator
    low, high = np.quantile(resampled(values, clusters, divisors, draws, seed), [0.025, 0.975], axis=0)
    return low, high


def sign_flip_p(difference: np.ndarray, clusters: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Return the two-sided p-value of no difference, flipping the sign of whole clusters (images): [N, K], [N] -> [K].

    Under the null hypothesis an image's summed difference is as likely negative as positive. Drawn at random, so at
    least 1 / (draws + 1); 1 where no image differs; NaN stays.

    >>> sign_flip_p(np.ones((3, 1)), np.array([1, 2, 3])).round(1)
    array([0.2])
    """
    sums = _sums(difference, clusters)
    generator, extreme = np.random.default_rng(seed), np.zeros(sums.shape[1])
    bound = np.abs(sums.sum(0)) * (1 - 1e-12)  # equal sums count as equal, whatever the order of adding
    for rows in _blocks(draws, len(sums)):
        signs = 2.0 * generator.integers(2, size=(rows, len(sums))) - 1
        extreme += (np.abs(signs @ sums) >= bound).sum(0)
    return np.where(np.isnan(bound), np.nan, (1 + extreme) / (1 + draws))


def holm(p: np.ndarray | list[float]) -> np.ndarray:
    """Return p-values adjusted for their number by Holm's step-down rule (1979), [K] -> [K]; NaN is no test and stays.

    >>> holm([0.01, 0.04, 0.03]).round(2)
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def verdict(name: str, delta: float, low: float, high: float, p: float = 0.0) -> str:
    """Return a difference to CLIP, points, and what it shows: better or worse if 0 is outside and p (Holm's) is below 0.05.

    >>> verdict("BSAP", 2.71, 0.2, 5.64)
    'BSAP − CLIP: +2.7 points [+0.2, +5.6]: better'
    """
    shown = ("better" if low > 0 else "worse") if p < 0.05 and (low > 0 or high < 0) else "no difference shown"
    text = f"{name} − CLIP: {delta:+.1f} points [{low:+.1f}, {high:+.1f}]{f', p = {p:.2f}' if p > 0 else ''}: {shown}"
    return text.replace("+nan", "–").replace(" -", " −").replace("[-", "[−").replace("−0.0", "+0.0")
