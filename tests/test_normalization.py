"""Every method against a slow NumPy version written from its source's formula, its properties, and what it refuses."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsap_utils import normalization
from bsap_utils.normalization import (
    METHODS,
    bsap,
    bsap_hybrid,
    family,
    group_log_softmax,
    region_bias,
    region_bias_from_features,
)

NAMES = ["clip", "bsap", "bsap_h", "bsap_minmax", "bsap_zscore", "subtraction", "dn", "nnn", "qb_norm"]


def oracle(name, query, aux, group, temperature=1.0, weight=0.5, k=16, qb_temperature=5.0):
    """One region and one text at a time, in the plainest float64 arithmetic there is."""
    out = np.full(query.shape, np.nan)
    for i, j in np.ndindex(*query.shape):
        s, a = query[i, j], aux[i]
        if np.isnan(s):
            continue
        probability = 1 / (1 + np.exp((a - s) / temperature).sum())
        softmax = 1 / sum(np.exp(query[o, j] - s) for o in range(len(query)) if group[o] == group[i])
        hybrid = weight * softmax + (1 - weight) * probability
        out[i, j] = {
            "clip": s,
            "bsap": s - temperature * np.log(np.exp(a / temperature).mean()),
            "bsap_h": np.log(hybrid) - np.log1p(-hybrid),
            "bsap_minmax": (s - min(a)) / ((max(a) - min(a)) or 1),
            "bsap_zscore": (s - sum(a) / len(a)) / (np.sqrt(sum((a - sum(a) / len(a)) ** 2) / len(a)) or 1),
            "subtraction": s - sum(a) / len(a),
            "dn": s - sum(a) / len(a) / 2,
            "nnn": s - 0.75 * np.mean(sorted(a, reverse=True)[:k]),
            "qb_norm": s - qb_temperature * np.log(np.exp(a / qb_temperature).mean()),
            "probability": probability,
            "hybrid": hybrid,
            "bias": temperature * np.log(np.exp(a / temperature).sum()),
        }[name]
    return out


def case(seed, regions=None, texts=None, prompts=None, images=None, slots=False, spread=4.0, dtype=torch.float64):
    """Random logits around 22, as CLIP's are, over ragged images in no particular order; with slots some are empty."""
    generator = np.random.default_rng(seed)
    regions = generator.integers(1, 13) if regions is None else regions
    texts = generator.integers(1, 6) if texts is None else texts
    prompts = generator.integers(1, 40) if prompts is None else prompts
    images = generator.integers(1, 6) if images is None else images
    group = generator.integers(0, images, regions)
    hub = generator.normal(0, 2, (regions, 1))
    query, aux = (22 + hub + generator.normal(0, spread, (regions, n)) for n in (texts, prompts))
    if slots:
        query[np.arange(texts) >= generator.integers(0, texts + 1, images)[group][:, None]] = np.nan
    return (
        torch.tensor(query).clip(-6e4, 6e4).to(dtype),
        torch.tensor(aux).clip(-6e4, 6e4).to(dtype),
        torch.tensor(group),
    )


seeds = st.integers(0, 2**32 - 1)


def test_the_registry_has_exactly_the_nine_methods():
    assert list(METHODS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, slots=st.booleans())
def test_methods_agree_with_the_slow_version(name, seed, slots):
    query, aux, group = case(seed, slots=slots)
    expected = oracle(name, query.numpy(), aux.numpy(), group.numpy())
    np.testing.assert_allclose(METHODS[name](query, aux, group).numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, temperature=st.floats(0.3, 300), weight=st.floats(0, 1), k=st.integers(1, 60))
def test_options_reach_the_formula(seed, temperature, weight, k):
    query, aux, group = case(seed)
    numpy = query.numpy(), aux.numpy(), group.numpy()

    def same(got, name, **options):
        np.testing.assert_allclose(got.numpy(), oracle(name, *numpy, **options), rtol=1e-8, atol=1e-8)

    same(METHODS["bsap"](query, aux, group, temperature=temperature), "bsap", temperature=temperature)
    same(METHODS["qb_norm"](query, aux, group, temperature=temperature), "bsap", temperature=temperature)
    same(METHODS["nnn"](query, aux, group, k=k), "nnn", k=k)
    same(METHODS["dn"](query, aux, group, weight=1), "subtraction")
    same(METHODS["subtraction"](query, aux, group, weight=0.5), "dn")
    same(METHODS["nnn"](query, aux, group, k=len(aux[0]), weight=1.0), "subtraction")
    same(bsap(query, aux, temperature), "probability", temperature=temperature)
    same(bsap_hybrid(query, aux, group, weight, temperature), "hybrid", temperature=temperature, weight=weight)
    same(region_bias(aux, temperature)[:, None].expand_as(query), "bias", temperature=temperature)
    hybrid = METHODS["bsap_h"](query, aux, group, weight=weight, temperature=temperature).sigmoid()
    np.testing.assert_allclose(hybrid, bsap_hybrid(query, aux, group, weight, temperature), rtol=1e-7, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.1, 1, 100, 1e4]), temperature=st.sampled_from([0.01, 1, 50]))
def test_bsap_lies_strictly_between_0_and_1(seed, scale, temperature):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        query, aux, group = case(seed, spread=scale, dtype=dtype)
        value = bsap(query, aux, temperature)
        assert ((value > 0) & (value < 1)).all()
        hybrid = bsap_hybrid(query, aux, group, 0.5, temperature)
        assert ((hybrid >= 0) & (hybrid <= 1)).all()


def test_bsap_ranks_by_query_minus_bias_also_where_the_probability_saturates():
    aux = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # odds of e^89 and more: float32 knows only 1 for all of them
    query = torch.tensor([[90.0], [95.0], [94.5], [92.0]])
    group = torch.zeros(4, dtype=torch.long)
    assert len(bsap(query, aux).unique()) == 1
    expected = (query - region_bias(aux)[:, None]).argsort(0, descending=True)
    assert METHODS["bsap"](query, aux, group).argsort(0, descending=True).equal(expected)
    low = METHODS["bsap"](-query, aux, group).argsort(0, descending=True)
    assert low.equal((-query - region_bias(aux)[:, None]).argsort(0, descending=True))
    for sign in (1, -1):
        assert len(METHODS["bsap_h"](sign * query, aux, group, weight=0.0).unique()) == 4


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.sampled_from([0.5, 5.0, 300.0]), temperature=st.sampled_from([0.05, 1.0, 7.0]))
def test_the_hybrid_ends_in_bsap_and_in_clip(seed, scale, temperature):
    query, aux, group = case(seed, images=1, spread=scale)
    rank = {name: METHODS[name](query, aux, group, **options).argsort(0) for name, options in
            [("clip", {}), ("bsap", {"temperature": temperature})]}  # fmt: skip
    for weight, end in ((0.0, "bsap"), (1.0, "clip")):
        score = METHODS["bsap_h"](query, aux, group, weight=weight, temperature=temperature)
        assert score.argsort(0).equal(rank[end])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=st.sampled_from(NAMES), slots=st.booleans())
def test_order_of_regions_prompts_columns_and_names_of_images_do_not_matter(seed, name, slots):
    query, aux, group = case(seed, slots=slots)
    torch.manual_seed(seed)
    rows, prompts, columns = (torch.randperm(n) for n in (*aux.shape, query.shape[1]))
    names = torch.randperm(9)
    expected = METHODS[name](query, aux, group)[rows][:, columns]
    got = METHODS[name](query[rows][:, columns], aux[rows][:, prompts], names[group[rows]])
    torch.testing.assert_close(got, expected, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=st.sampled_from(NAMES))
def test_images_and_columns_are_independent(seed, name):
    query, aux, group = case(seed, slots=True)
    together = METHODS[name](query, aux, group)
    assert together.isnan().equal(query.isnan())
    for image in group.unique():
        mine = group == image
        for column in range(query.shape[1]):
            alone = METHODS[name](query[mine][:, [column]], aux[mine], torch.zeros(int(mine.sum()), dtype=torch.long))
            torch.testing.assert_close(together[mine][:, [column]], alone, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=st.sampled_from([n for n in NAMES if n not in ("clip", "bsap_h", "dn", "nnn")]))
def test_a_hub_is_no_hub_any_more(seed, name):
    """What a region adds to all its logits, query and auxiliary, is removed wholly by the methods of weight 1."""
    query, aux, group = case(seed)
    hub = torch.linspace(-30, 30, len(query), dtype=torch.float64)[:, None]
    expected = METHODS[name](query, aux, group)
    torch.testing.assert_close(METHODS[name](query + hub, aux + hub, group), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, name=st.sampled_from(["bsap_minmax", "bsap_zscore"]))
def test_range_variants_remove_the_scale_too(seed, name):
    query, aux, group = case(seed, prompts=5)
    slope = torch.linspace(0.5, 3, len(query), dtype=torch.float64)[:, None]
    expected = METHODS[name](query, aux, group)
    torch.testing.assert_close(METHODS[name](slope * query - 7, slope * aux - 7, group), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_more_query_is_more_and_more_auxiliary_is_less(seed):
    query, aux, group = case(seed)
    for name in NAMES:
        assert (METHODS[name](query + 0.5, aux, group) >= METHODS[name](query, aux, group) - 1e-9).all()
    assert (bsap(query, aux + 0.5) < bsap(query, aux)).all()
    assert (bsap(query, torch.cat([aux, aux[:, :1]], 1)) < bsap(query, aux)).all()


def test_duplicating_the_whole_bank_moves_the_value_of_bsap_but_no_ranking():
    query, aux, group = case(3)
    for name in set(NAMES) - {"bsap_h", "nnn"}:
        twice = METHODS[name](query, aux.repeat(1, 2), group)
        torch.testing.assert_close(twice, METHODS[name](query, aux, group))
    torch.testing.assert_close(region_bias(aux.repeat(1, 2), 3.0), region_bias(aux, 3.0) + 3 * math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pool_runs_from_the_maximum_to_the_mean_without_losing_digits(dtype):
    _, aux, _ = case(5, regions=50, prompts=500, dtype=dtype)
    digits = 20 * torch.finfo(dtype).eps

    def pool(temperature, nearest=None):
        return -family(torch.zeros(50, 1), aux, temperature=temperature, nearest=nearest)[:, 0]

    for temperature in (1e3, 1e5, 1e8, 1e30):  # T · log M is 6e3 … 6e30: with it float32 would have nothing left
        exact = aux.double().mean(1) + aux.double().var(1, correction=0) / 2 / temperature  # the next term has 1 / T²
        torch.testing.assert_close(pool(temperature).double(), exact, rtol=max(digits, temperature**-2), atol=0)
    for temperature in (1e-3, 1e-10, 1e-30):
        torch.testing.assert_close(pool(temperature), aux.amax(1), rtol=digits, atol=10 * temperature)
    torch.testing.assert_close(pool(math.inf), aux.mean(1), rtol=digits, atol=0)
    torch.testing.assert_close(pool(math.inf, nearest=1), aux.amax(1), rtol=0, atol=0)
    falling = [pool(temperature) for temperature in (0.01, 0.1, 1, 10, 100, 1e4, math.inf)]
    assert all((a >= b - 1e-4).all() for a, b in zip(falling, falling[1:], strict=False))
    for temperature in (0.2, 1.0, 6.0):
        constant = temperature * math.log(500)
        torch.testing.assert_close(region_bias(aux, temperature) - constant, pool(temperature), rtol=digits, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite_with_finite_gradients(name, dtype):
    values = torch.tensor([-1e4, -3.0, 0.0, 1e-3, 1e4], dtype=dtype)
    query = torch.cartesian_prod(values, values)[:, 0].reshape(5, 5).requires_grad_()
    for bank in (values.flip(0), values[:1], torch.full((3,), 7.0, dtype=dtype), -values):
        aux = bank.repeat(5, 1).requires_grad_()
        scores = METHODS[name](query, aux, torch.tensor([0, 0, 0, 1, 1]))
        assert scores.isfinite().all()
        for gradient in torch.autograd.grad(scores.sum(), (query, aux), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right(name):
    query, aux, group = case(11, regions=5, texts=3, prompts=6, images=2)
    inputs = [(query - 22).requires_grad_(), (aux - 22).requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, a: METHODS[name](q, a, group), inputs)
    assert torch.autograd.gradcheck(
        lambda q, a: bsap_hybrid(q, a, group) + bsap(q, a, 3.0) + region_bias(a)[:, None], inputs
    )


@pytest.mark.parametrize("name", NAMES)
def test_types_are_promoted_and_kept(name):
    query, aux, group = case(2)
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.float32, torch.float64):
        q, a = query.to(dtype), aux.to(dtype)
        got = METHODS[name](q, a, group.int())
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), METHODS[name](q.double(), a.double(), group), rtol=1e-4, atol=1e-4)
    assert METHODS[name](query.half(), aux, group).dtype == torch.float64
    if torch.cuda.is_available():
        torch.testing.assert_close(
            METHODS[name](query.cuda(), aux.cuda(), group.cuda()).cpu(), METHODS[name](query, aux, group)
        )


@pytest.mark.parametrize("name", ["bsap_minmax", "bsap_zscore"])
@pytest.mark.parametrize("level", [0.0, 25.1, -1e4, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_region_without_a_range_is_only_shifted(name, level, dtype):
    query, group = torch.tensor([[level + 3], [level]], dtype=dtype), torch.tensor([0, 0])
    one, seven = torch.full((2, 1), level, dtype=dtype), torch.full((2, 7), level, dtype=dtype)
    rounded = seven.clone()
    rounded[:, ::2] = rounded[:, ::2].nextafter(seven[:, ::2] + 1)  # equal but for the last digit
    for aux in (one, seven, rounded):
        torch.testing.assert_close(METHODS[name](query, aux, group), query - level, rtol=0, atol=2e-3)


def test_the_pool_keeps_its_digits_where_one_prompt_towers_over_many():
    aux = torch.zeros(1, 100_000)
    aux[0, 7] = 40.0
    got = -family(torch.zeros(1, 1), aux)
    torch.testing.assert_close(got.item(), 40 - math.log(100_000), rtol=1e-6, atol=0)


def test_no_regions_and_no_texts_are_no_problem():
    for name, regions, texts in [(name, *shape) for name in NAMES for shape in [(0, 3), (4, 0), (0, 0)]]:
        got = METHODS[name](
            torch.zeros(regions, texts), torch.zeros(regions, 2), torch.zeros(regions, dtype=torch.long)
        )
        assert got.shape == (regions, texts)
    assert region_bias_from_features(torch.zeros(0, 4), torch.ones(3, 4), 100.0).shape == (0,)


def test_group_softmax_sums_to_one_in_every_image_and_skips_absent_numbers():
    logits, group = torch.randn(7, 3) * 50, torch.tensor([4, 0, 0, 4, 9, 4, 0])
    probability = group_log_softmax(logits, group).exp()
    for image in (0, 4, 9):
        torch.testing.assert_close(probability[group == image], logits[group == image].softmax(0))


ZERO, AUX, ONE_IMAGE = torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
TORN = torch.tensor([[0.0, 0.0], [0.0, torch.nan], [0.0, torch.nan]])
BAD = {
    "rows": (ZERO, torch.zeros(4, 5), ONE_IMAGE, r"\[3, 2\].*\[4, 5\]"),
    "vector": (torch.zeros(3), AUX, ONE_IMAGE, r"query_logits \[3\]"),
    "aux vector": (ZERO, torch.zeros(3), ONE_IMAGE, r"aux_logits \[3\]"),
    "no prompts": (ZERO, torch.zeros(3, 0), ONE_IMAGE, r"aux_logits \[3, 0\].*prompt"),
    "short group": (ZERO, AUX, torch.zeros(2, dtype=torch.long), r"group \[2\].*\[3, 2\]"),
    "negative group": (ZERO, AUX, torch.tensor([0, -2, 1]), "negative image -2"),
    "float group": (ZERO, AUX, torch.zeros(3), "torch.float32: whole numbers"),
    "NaN aux": (ZERO, torch.full((3, 5), torch.nan), ONE_IMAGE, r"aux_logits.*15 NaN or infinite"),
    "infinite query": (torch.tensor([[0.0, torch.inf]] * 3), AUX, ONE_IMAGE, r"query_logits.*\[0, 1\]"),
    "torn slot": (TORN, AUX, torch.tensor([0, 1, 0]), "some regions of image 0 in column 1"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("why", BAD)
def test_what_does_not_fit_is_refused_and_named(name, why):
    query, aux, group, said = BAD[why]
    with pytest.raises(ValueError, match=said):
        METHODS[name](query, aux, group)


def test_options_that_make_no_sense_are_refused():
    query, aux, group = case(1)
    for bad in (0, -1.0, math.nan):
        for call in (
            lambda t: region_bias(aux, t),
            lambda t: bsap(query, aux, t),
            lambda t: bsap_hybrid(query, aux, group, temperature=t),
            lambda t: family(query, aux, temperature=t),
            lambda t: region_bias_from_features(query, query, 100.0, t),
            *(lambda t, m=m: METHODS[m](query, aux, group, temperature=t) for m in ("bsap", "bsap_h", "qb_norm")),
        ):
            with pytest.raises(ValueError, match=f"temperature is {bad}"):
                call(bad)
    with pytest.raises(ValueError, match="finite"):
        region_bias(aux, math.inf)
    for bad in (-0.1, 1.1, math.nan):
        for call in (bsap_hybrid, METHODS["bsap_h"]):
            with pytest.raises(ValueError, match=f"weight is {bad}"):
                call(query, aux, group, weight=bad)
    with pytest.raises(ValueError, match="weight is nan"):
        METHODS["nnn"](query, aux, group, weight=math.nan)
    with pytest.raises(ValueError, match="0 nearest"):
        METHODS["nnn"](query, aux, group, k=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, block=st.integers(1, 200), temperature=st.sampled_from([0.5, 1.0, 5.0]))
def test_bias_from_features_is_the_bias_of_the_logits(seed, block, temperature):
    torch.manual_seed(seed)
    features, prompts = torch.randn(33, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    expected = region_bias(100 * features @ prompts.T, temperature)
    got = region_bias_from_features(features, prompts, 100.0, temperature, block)
    torch.testing.assert_close(got, expected)
    half = region_bias_from_features(features.half(), prompts.half(), 100.0, temperature, block)
    exact = region_bias(100 * features.half().double() @ prompts.half().double().T, temperature)
    torch.testing.assert_close(half.double(), exact, rtol=1e-4, atol=1e-3)
    assert half.dtype == torch.float32


def test_bias_from_features_refuses_what_does_not_fit():
    for features, prompts, said in [
        (torch.ones(4, 3), torch.ones(2, 5), r"\[4, 3\].*\[2, 5\]"),
        (torch.ones(4), torch.ones(2, 5), r"\[4\].*\[2, 5\]"),
        (torch.ones(4, 3), torch.ones(0, 3), "no auxiliary prompt"),
        (torch.ones(4, 3), torch.tensor([[1.0, torch.nan, 1.0]]), r"aux_features.*\[0, 1\]"),
        (torch.tensor([[1.0], [torch.inf]]), torch.ones(2, 1), r"features \[2, 1\].*\[1, 0\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            region_bias_from_features(features, prompts, 100.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bias_from_features_is_bounded_in_memory():
    """The logits alone would be 1.6 GB; a fresh process says how far its memory rose above what went in."""
    script = """
import resource, torch
from bsap_utils.normalization import region_bias_from_features
features, prompts = torch.ones(200_000, 4), torch.ones(2_000, 4)
region_bias_from_features(features[:10], prompts, 100.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
region_bias_from_features(features, prompts, 100.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 50_000  # KiB


def test_no_method_loops_over_images(monkeypatch):
    """A Python loop would make the number of torch calls grow with the number of images."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    for name in NAMES:
        counts = []
        for images in (2, 200):
            query, aux, _ = case(0, regions=600, prompts=20)
            with Count() as count:
                METHODS[name](query, aux, torch.arange(600) % images)
            counts.append(count.calls)
        assert counts[0] == counts[1] > 0, name


def test_public_functions_state_shapes_and_an_example():
    for name in ("region_bias", "region_bias_from_features", "family", "bsap", "bsap_hybrid", "group_log_softmax"):
        text = getattr(normalization, name).__doc__
        assert "[R" in text and ">>>" in text
