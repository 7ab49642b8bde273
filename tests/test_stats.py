"""Intervals, tests and the one rule of what a difference shows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from bsap_utils.stats import cluster_bootstrap, holm, resampled, sign_flip_p, verdict


def test_the_interval_is_that_of_resampled_images():
    """Against SciPy's percentile bootstrap of a ratio of cluster sums, and far wider than one of expressions."""
    generator = np.random.default_rng(0)
    images = np.repeat(np.arange(80), generator.integers(1, 9, 80))
    level = generator.normal(0, 1, 80)
    hits = (level[images] + generator.normal(0, 0.3, len(images)) > 0).astype(float)
    low, high = cluster_bootstrap(hits[:, None], images)
    sums, counts = np.bincount(images, hits), np.bincount(images).astype(float)
    ratio = lambda x, n, axis: x.sum(axis) / n.sum(axis)  # noqa: E731
    expected = bootstrap(
        (sums, counts), ratio, paired=True, method="percentile", n_resamples=9999, rng=1
    ).confidence_interval
    assert low[0] == pytest.approx(expected.low, abs=0.01) and high[0] == pytest.approx(expected.high, abs=0.01)
    alone = np.subtract(*cluster_bootstrap(hits[:, None], np.arange(len(hits)))[::-1])
    assert high - low > 1.5 * alone


def test_ratios_and_their_differences_share_their_resamples():
    generator = np.random.default_rng(1)
    below = generator.uniform(50, 100, (60, 2))
    above = below * np.array([0.5, 0.6]) + generator.normal(0, 1, (60, 2))
    images = np.arange(60) // 3
    low, high = cluster_bootstrap(above, images, below)
    assert (low < above.sum(0) / below.sum(0)).all() and (high > above.sum(0) / below.sum(0)).all()
    drawn = resampled(above, images, below, 10_000, 0)
    assert np.array_equal(np.quantile(drawn, [0.025, 0.975], axis=0), [low, high])
    many = np.ones((300, 1))  # two blocks of draws
    assert len(resampled(many, np.arange(300), many, 10_000, 0)) == 10_000
    low, high = np.quantile(drawn[:, 1] - drawn[:, 0], [0.025, 0.975])
    assert 0.08 < low < high < 0.12
    one, other = cluster_bootstrap(above, images, seed=3), cluster_bootstrap(above, images, seed=3)
    assert np.array_equal(one, other)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(1, 300))
def test_names_of_images_do_not_matter_and_bounds_hold_the_middle(seed, draws):
    generator = np.random.default_rng(seed)
    images = np.sort(generator.integers(0, 9, 40))
    values = generator.random((40, 3))
    low, high = cluster_bootstrap(values, images, draws=draws)
    assert np.array_equal([low, high], cluster_bootstrap(values, 7 * images + 1000, draws=draws))
    assert (low <= high).all() and (low >= values.min(0)).all() and (high <= values.max(0)).all()


def test_one_image_says_nothing():
    low, high = cluster_bootstrap(np.ones((5, 2)), np.zeros(5))
    assert np.isnan([low, high]).all() and low.shape == (2,)
    assert sign_flip_p(np.ones((5, 2)), np.zeros(5)).tolist() == [1.0, 1.0]


def test_sign_flips_agree_with_all_of_them():
    generator = np.random.default_rng(2)
    images = np.repeat(np.arange(10), 3)
    difference = generator.choice([-1.0, 0.0, 1.0], (30, 4), p=[0.1, 0.5, 0.4])
    sums = np.stack([difference[images == i].sum(0) for i in range(10)])
    flips = np.array(list(itertools.product([-1, 1], repeat=10))) @ sums
    exact = (np.abs(flips) >= np.abs(sums.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(sign_flip_p(difference, images), exact, atol=0.015)
    assert sign_flip_p(np.zeros((30, 1)), images) == 1
    assert np.isnan(sign_flip_p(np.full((30, 1), np.nan), images)).all()


def test_clustered_hits_are_no_independent_evidence():
    """Ten images whose expressions all change alike: 100 independent pairs would be overwhelming, ten are not."""
    difference = np.repeat([1.0] * 8 + [-1.0] * 2, 10)[:, None]
    assert sign_flip_p(difference, np.repeat(np.arange(10), 10)) > 0.05 > sign_flip_p(difference, np.arange(100))


def test_p_values_are_uniform_where_nothing_differs():
    generator = np.random.default_rng(3)
    p = sign_flip_p(generator.normal(size=(100, 400)), np.arange(100) // 2, draws=500)
    assert 0.02 < (p < 0.05).mean() < 0.08 and 0.42 < (p < 0.5).mean() < 0.58


def test_holm_is_step_down_and_leaves_out_what_was_not_tested():
    p = holm([0.01, np.nan, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(p, [0.03, np.nan, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and len(holm([])) == 0


@pytest.mark.parametrize(
    "low, high, p, expected",
    [(0.2, 5.6, 0.0, "better"), (0.2, 5.6, 0.06, "no difference shown"), (-3, -0.1, 0.01, "worse"),
     (-1, 2, 0.001, "no difference shown"), (0.0, 1, 0, "no difference shown"), (math.nan, math.nan, 0, "no difference shown"),
     (0.2, 5.6, math.nan, "no difference shown")],
)  # fmt: skip
def test_one_rule_for_table_text_and_figure(low, high, p, expected):
    assert verdict("X", 1.0, low, high, p).endswith(f": {expected}")


def test_a_verdict_reads_as_a_sentence():
    assert verdict("BSAP", 2.71, 0.24, 5.6, p=0.03) == "BSAP − CLIP: +2.7 points [+0.2, +5.6], p = 0.03: better"
    assert verdict("BSAP", *np.array([2.71, 0.24, 5.6, 0.06])).endswith("[+0.2, +5.6], p = 0.06: no difference shown")
    assert verdict("A", -0.04, -1.25, -0.01) == "A − CLIP: +0.0 points [−1.2, +0.0]: worse"
    assert verdict("A", 1.0, math.nan, math.nan) == "A − CLIP: +1.0 points [–, –]: no difference shown"
