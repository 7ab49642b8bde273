"""Every method against a slow NumPy version written from its source's formula, and the properties that hold for any scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bsap_utils.normalization import (
    METHODS,
    bsap,
    bsap_hybrid,
    calibrated_weight,
    candidate_softmax,
    centred,
    pool,
    prompt_potentials,
    qb_norm_dynamic,
    shift_and_scale,
    shift_and_scale_from_features,
)

seeds = st.integers(0, 2**32 - 1)
NAMES = list(METHODS)
OF_A_REGION = [name for name in NAMES if name not in ("bsap_h", "tas", "bsap_calibrated", "db_norm", "sinkhorn")]


def case(seed, prompts=None, spread=4.0, dtype=torch.float64):
    """Random logits around 22, as CLIP's are, of ragged images: pairs by expression and candidate, s [P], a [C, M]."""
    generator = np.random.default_rng(seed)
    images = generator.integers(1, 6)
    image = np.repeat(np.arange(images), generator.integers(1, 7, images))
    asked = np.repeat(np.arange(images), generator.integers(1, 5, images))
    expression, candidate = np.nonzero(asked[:, None] == image)
    hub = generator.normal(0, 2, len(image))
    s = 22 + hub[candidate] + generator.normal(0, spread, len(candidate))
    a = 22 + hub[:, None] + generator.normal(0, spread, (len(image), prompts or generator.integers(1, 200)))
    pairs = SimpleNamespace(expression=torch.tensor(expression), candidate=torch.tensor(candidate))
    extra = {
        "bsap_calibrated": {
            "mean_logit": torch.tensor(generator.normal(22, 3, len(image))),
            "image": torch.tensor(image),
        },
        "db_norm": {"image_logits": torch.tensor(60 + generator.normal(0, 9, (len(image), 30)))},
    }
    return torch.tensor(s).to(dtype), torch.tensor(a).to(dtype), pairs, extra


def mean_exp_log(row, temperature):
    return temperature * np.log(np.exp((row - row.max()) / temperature).mean()) + row.max()


def sinkhorn_rows(a, temperature=1.0, iterations=10):
    """Scale rows and columns of exp(a / T) in turn to equal sums; the shift is what the rows were scaled by, in logs."""
    kernel, rows, columns = np.exp((a - a.max()) / temperature), None, np.ones(a.shape[1])
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = 1 / (kernel.T @ rows)
    return -temperature * np.log(rows)


def largest(row, k):
    return np.sort(row)[::-1][:k].mean()


def of_pair(q, row, rivals, others, temperature=None, weight=None, k=None):
    """All methods for one pair in the plainest arithmetic: q, its region's bank logits, q of its rivals and other texts."""
    mean = row.mean()
    w = 0.5 if weight is None else weight
    b = 1 / (1 + np.exp((row - q) / (temperature or 1)).sum())
    softmax = 1 / np.exp(rivals - q).sum()
    h = w * softmax + (1 - w) * b
    return {
        "clip": q,
        "bsap": q - mean_exp_log(row, temperature or 1),
        "qb_norm": q - mean_exp_log(row, temperature or 5),
        "bsap_h": np.log(h) - np.log(max(1 - h, 1e-300)),
        "bsap_minmax": (q - row.min()) / ((row.max() - row.min()) or 1),
        "bsap_zscore": (q - mean) / (np.sqrt(((row - mean) ** 2).mean()) or 1),
        "subtraction": q - (1 if weight is None else weight) * mean,
        "dn": q - w * mean,
        "tas": q - 0.7 * (sum(others) / len(others) if others else 0),
        "nnn": q - (0.75 if weight is None else weight) * largest(row, k or 128),
        "csls": (2 * q - largest(row, k or 10)) / 2,
        "b": b,
        "h": h,
        "softmax": softmax,
    }


def oracle(name, s, a, pairs, extra, **options):
    s, a, expression, candidate = (x.numpy() for x in (s, a, pairs.expression, pairs.candidate))
    if name == "sinkhorn":
        return s - sinkhorn_rows(a)[candidate]
    if name == "db_norm":  # exp(β₁ s) / Σ exp(β₁ a) · exp(β₂ s) / Σ exp(β₂ i) on cosines, its log for each unit of β
        first, second, images = s / 100 * 50, s / 100, extra["db_norm"]["image_logits"].numpy()[candidate]
        first = first - np.log(np.exp(a[candidate] / 100 * 50).mean(1))
        second = second - np.log(np.exp(images / 100).mean(1))
        return 100 * (first + second) / (50 + 1)
    if name == "bsap_calibrated":
        pooled, image = np.array([mean_exp_log(row, 1) for row in a]), extra[name]["image"].numpy()
        x, y = (
            v - np.array([v[image == i].mean() for i in image]) for v in (pooled, extra[name]["mean_logit"].numpy())
        )
        return s - (x @ y / (x @ x) if (x**2).sum() > 1e-12 else 0) * pooled[candidate]
    out = []
    for p, c in enumerate(candidate):
        others = [s[o] for o in np.flatnonzero(candidate == c) if o != p]
        out.append(of_pair(s[p], a[c], s[expression == expression[p]], others, **options)[name])
    return np.array(out)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_methods_agree_with_the_slow_version(name, seed):
    s, a, pairs, extra = case(seed, prompts=None if seed % 4 else 1)  # one prompt spreads nothing
    expected = oracle(name, s, a, pairs, extra)
    got = METHODS[name](s, a, pairs, **extra.get(name, {})).numpy()
    if name == "sinkhorn":  # a potential is one up to a constant
        got, expected = got - got.mean(), expected - expected.mean()
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, temperature=st.floats(0.3, 300), weight=st.floats(0, 1), k=st.integers(1, 60))
def test_options_reach_the_formula(seed, temperature, weight, k):
    s, a, pairs, extra = case(seed)

    def same(got, name, **options):
        np.testing.assert_allclose(got.numpy(), oracle(name, s, a, pairs, extra, **options), rtol=1e-8, atol=1e-8)

    both = {"weight": weight, "temperature": temperature}
    same(METHODS["bsap"](s, a, pairs, temperature=temperature), "bsap", temperature=temperature)
    same(METHODS["qb_norm"](s, a, pairs, temperature=temperature), "bsap", temperature=temperature)
    same(METHODS["nnn"](s, a, pairs, k=k, weight=weight), "nnn", k=k, weight=weight)
    same(METHODS["csls"](s, a, pairs, k=k), "csls", k=k)
    same(METHODS["dn"](s, a, pairs, weight=weight), "subtraction", weight=weight)
    same(bsap(s, a, pairs, temperature), "b", temperature=temperature)
    same(bsap_hybrid(s, a, pairs, **both), "h", **both)
    same(candidate_softmax(s, pairs), "softmax")
    same(candidate_softmax(s - 2000, pairs), "softmax")
    np.testing.assert_allclose(
        METHODS["bsap_h"](s, a, pairs, **both).sigmoid(), bsap_hybrid(s, a, pairs, **both), rtol=1e-7
    )


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=st.sampled_from(NAMES))
def test_the_order_of_prompts_does_not_matter(seed, name):
    s, a, pairs, extra = case(seed)
    mixed = a[:, torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed))]
    options = extra.get(name, {})
    torch.testing.assert_close(METHODS[name](s, mixed, pairs, **options), METHODS[name](s, a, pairs, **options))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=st.sampled_from(["bsap", "qb_norm", "subtraction", "bsap_minmax", "bsap_zscore", "sinkhorn"]))
def test_what_a_region_adds_to_all_its_logits_is_removed(seed, name):
    s, a, pairs, _ = case(seed)
    hub = torch.linspace(-30, 30, len(a), dtype=torch.float64)
    moved = METHODS[name](s + hub[pairs.candidate], a + hub[:, None], pairs)
    torch.testing.assert_close(moved, METHODS[name](s, a, pairs), rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_the_family_meets_where_it_should(seed):
    s, a, pairs, _ = case(seed)

    def same(one, other, **options):
        torch.testing.assert_close(METHODS[one](s, a, pairs, **options), other)

    same("bsap", METHODS["subtraction"](s, a, pairs), temperature=math.inf)
    low = METHODS["bsap"](s, a, pairs, temperature=1e-6)
    torch.testing.assert_close(low, s - a.amax(1)[pairs.candidate], rtol=0, atol=2e-5)  # T · log M is left
    same("qb_norm", METHODS["bsap"](s, a, pairs), temperature=1.0)
    same("qb_norm", METHODS["bsap"](s, a, pairs, temperature=100 / 20))
    same("csls", METHODS["nnn"](s, a, pairs, k=10, weight=0.5))
    same("nnn", METHODS["dn"](s, a, pairs), k=a.shape[1], weight=0.5)
    same("sinkhorn", METHODS["bsap"](s, a, pairs, temperature=3.0), temperature=3.0, iterations=1)
    for name in ("subtraction", "dn", "nnn", "csls", "tas"):
        same(name, s, weight=0.0)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.5, 5.0, 300.0]), temperature=st.sampled_from([0.05, 1.0, 7.0]))
def test_the_hybrid_ends_in_bsap_and_in_clip_where_it_saturates_too(seed, scale, temperature):
    s, a, pairs, _ = case(seed, spread=scale)
    ends = {0.0: METHODS["bsap"](s, a, pairs, temperature=temperature), 1.0: s}
    for weight, end in ends.items():
        score = METHODS["bsap_h"](s, a, pairs, weight=weight, temperature=temperature)
        for one in pairs.expression.unique():
            mine = pairs.expression == one
            assert score[mine].argsort().equal(end[mine].argsort())


def test_the_probability_ties_where_the_ranking_does_not():
    pairs = SimpleNamespace(expression=torch.zeros(4, dtype=torch.long), candidate=torch.arange(4))
    s, a = torch.tensor([90.0, 95.0, 94.5, 92.0]), torch.arange(4.0)[:, None]
    assert len(bsap(s, a, pairs).unique()) == 1 and len(METHODS["bsap"](s, a, pairs).unique()) == 4
    assert len(METHODS["bsap_h"](s, a, pairs, weight=0.0).unique()) == 4
    assert len(METHODS["bsap_h"](-s, a, pairs, weight=0.5).unique()) == 4


def test_pools_are_exact_at_any_temperature():
    a = case(5, prompts=500)[1]
    for temperature in (1e4, 1e6):  # the next term of the series has 1 / T³
        m, variance = a.mean(1), a.var(1, correction=0)
        third = ((a - m[:, None]) ** 3).mean(1)
        exact = m + variance / 2 / temperature + third / 6 / temperature**2
        torch.testing.assert_close(pool(a, temperature), exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(pool(a.float(), 1e6), pool(a.float().double(), 1e6), rtol=0, atol=0)
    falling = [pool(a, t) for t in (1e-6, 0.01, 0.1, 1, 10, 100, 1e4, math.inf)]
    assert all((above >= below).all() for above, below in zip(falling, falling[1:], strict=False))
    torch.testing.assert_close(pool(a, 3.0) + 3 * math.log(500), 3 * (a / 3).logsumexp(1))
    for wrong in (0, -1, 1e-7, 1e7, math.nan, -math.inf):
        with pytest.raises(ValueError, match="temperature is .* between 1e-6 and 1e6"):
            pool(a, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_and_half_precision_stay_finite(name):
    for dtype in (torch.float16, torch.float32, torch.float64):
        s, a, pairs, extra = case(3, spread=1000.0, dtype=dtype)
        assert METHODS[name](s, a, pairs, **extra.get(name, {})).isfinite().all()
    same = torch.full_like(a, 7.0)
    assert METHODS[name](s, same, pairs, **extra.get(name, {})).isfinite().all()


def test_the_calibrated_weight_is_least_squares_and_needs_competition():
    generator = np.random.default_rng(0)
    image = torch.tensor(np.repeat(np.arange(40), 5))
    pooled, level = (torch.tensor(generator.normal(0, size, 200)) for size in (1, 50))
    mean_logit = (
        0.6 * pooled + level[image] + torch.tensor(generator.normal(0, 0.1, 200))
    )  # levels of images are no matter
    design = np.concatenate([np.eye(40)[image], pooled[:, None]], 1)
    expected = np.linalg.lstsq(design, mean_logit.numpy(), rcond=None)[0][-1]
    assert calibrated_weight(pooled, mean_logit, image) == pytest.approx(expected) == pytest.approx(0.6, abs=0.03)
    assert calibrated_weight(pooled, mean_logit, torch.arange(200)) == 0
    assert calibrated_weight(torch.ones(200), mean_logit, image) == 0


@pytest.mark.parametrize("name", [*OF_A_REGION, "sinkhorn"])
def test_features_in_blocks_give_the_same_shift_and_scale(name):
    torch.manual_seed(0)
    features, bank = normalize(torch.randn(301, 16), dim=1), normalize(torch.randn(140, 16), dim=1)
    expected = shift_and_scale(100 * features @ bank.T, name)
    got = shift_and_scale_from_features(features, bank, 100.0, name, block=5000)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got[0].dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0, 1e3, 1e6])
def test_a_large_bank_of_float32_features_loses_no_digits(temperature):
    torch.manual_seed(1)
    features, bank = normalize(torch.randn(70, 8), dim=1), normalize(torch.randn(20_000, 8), dim=1)
    got = shift_and_scale_from_features(features, bank, 100.0, temperature=temperature)[0]
    torch.testing.assert_close(got, pool(100 * features @ bank.T, temperature), rtol=0, atol=5e-5)


def test_what_needs_the_queries_is_no_shift():
    for name in ("bsap_h", "tas", "no such"):
        with pytest.raises(ValueError, match="not a shift and a scale"):
            shift_and_scale(torch.zeros(1, 1), name)


def test_sinkhorn_uses_all_prompts_alike():
    a = case(4, prompts=7)[1]
    shift = pool(a - prompt_potentials(lambda: [a[:2], a[2:]], 2.0, 200), 2.0)
    potentials = prompt_potentials(lambda: [a], 2.0, 200)
    plan = ((a - shift[:, None] - potentials) / 2).exp()
    torch.testing.assert_close(plan.sum(1), torch.full((len(a),), 7.0, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), plan.sum(0).mean().expand(7), rtol=1e-6, atol=0)


def test_dynamic_qb_norm_corrects_only_texts_whose_best_image_is_a_prompts_best():
    scores = torch.tensor([[5.0, 1.0, 2.0], [4.0, 3.0, 2.5]])
    a = torch.tensor([[1.0, 9.0, 9.0], [0.0, 0.0, 2.0]])  # the first image is every prompt's best
    expected = scores.double()
    expected[:, 0] -= pool(a, 5.0)
    torch.testing.assert_close(qb_norm_dynamic(scores, a), expected)


def test_centring_takes_the_shared_component_off():
    features = normalize(torch.randn(200, 8) + 5, dim=1)
    moved = centred(features, features.mean(0))
    assert features.mean(0).norm() > 0.9 > 0.1 > moved.mean(0).norm()
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(200))


def test_defaults_are_the_authors():
    s, a, pairs, _ = case(2, prompts=200)
    options = {
        "bsap": {"temperature": 1.0},
        "nnn": {"k": 128, "weight": 0.75},
        "csls": {"k": 10, "weight": 0.5},
        "qb_norm": {"temperature": 5.0},  # β = 20 at CLIP's scale of 100
        "dn": {"weight": 0.5},
        "tas": {"weight": 0.7},
        "sinkhorn": {"temperature": 1.0, "iterations": 10},
    }
    for name, theirs in options.items():
        assert METHODS[name](s, a, pairs).equal(METHODS[name](s, a, pairs, **theirs))
    assert bsap(s, a, pairs).equal(bsap(s, a, pairs, 1.0)) and pool(a).equal(pool(a, 1.0))
    assert shift_and_scale(a)[0].equal(pool(a))
    assert bsap_hybrid(s, a, pairs).equal(bsap_hybrid(s, a, pairs, weight=0.5, temperature=1.0))
