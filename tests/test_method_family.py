"""The map of temperatures and weights, ablations and their readings, against slow NumPy loops and definitions."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsap_utils import analysis, evaluation, plotting, readings
from bsap_utils.analysis import ablation_table, family_hits, hits, holm, matching_temperature, subset_hits
from bsap_utils.normalization import METHODS
from bsap_utils.proposals import load_proposals
from bsap_utils.scoring import ClipScorer, ReferLogits, refer_logits

seeds = st.integers(0, 2**32 - 1)


def random_logits(seed, regions=40, prompts=7, images=6, most=4, dtype=torch.float64):
    """Ragged groups with 1 to `most` expressions an image, and random right regions: ReferLogits and [R, Q] bool."""
    generator = np.random.default_rng(seed)
    group = np.sort(np.concatenate([np.arange(images), generator.integers(0, images, regions - images)]))
    count = generator.integers(1, most + 1, images)
    empty = np.arange(most) >= count[group][:, None]
    query = np.where(empty, np.nan, generator.normal(size=(regions, most)) * 3)
    aux = generator.normal(size=(regions, prompts)) * 3 + generator.normal(size=(regions, 1)) * 4
    expression_group = np.repeat(np.arange(images), count)
    slot = np.concatenate([np.arange(n) for n in count])
    order = generator.permutation(len(slot))  # expressions need not come image by image
    right = (generator.random((regions, most)) < 0.4) & ~empty
    tensors = [torch.tensor(part, dtype=dtype) for part in (query, aux)]
    indices = [torch.tensor(part) for part in (group, expression_group[order], slot[order])]
    return ReferLogits(*tensors, *indices), torch.tensor(right)


def slow_hits(logits, right, temperature, weight, prompts=slice(None)):
    """One expression after the other, in NumPy."""
    query, aux, group = (part.double().numpy() for part in (logits.query, logits.aux[:, prompts], logits.group))
    found = []
    for image, slot in zip(logits.expression_group.numpy(), logits.expression_slot.numpy(), strict=True):
        best, best_score = None, -math.inf
        for region in np.flatnonzero(group == image):
            values = aux[region]
            if temperature == math.inf:
                pool = sum(values) / len(values)
            else:
                top = max(values)
                pool = top + temperature * math.log(
                    sum(math.exp((v - top) / temperature) for v in values) / len(values)
                )
            score = query[region, slot] - weight * pool
            if score > best_score:
                best, best_score = region, score
        found.append(bool(right[best, slot]))
    return np.array(found)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_the_map_is_that_of_a_loop(seed):
    logits, right = random_logits(seed)
    temperatures, weights = [0.01, 0.5, 1.0, 7.0, 1e4, math.inf], [0.0, 0.3, 1.0]
    grid = family_hits(logits, right, temperatures, weights)
    assert grid.shape == (len(logits.expression_slot), 6, 3) and grid.dtype == bool
    for (t, temperature), (w, weight) in itertools.product(enumerate(temperatures), enumerate(weights)):
        np.testing.assert_array_equal(grid[:, t, w], slow_hits(logits, right, temperature, weight))


def test_published_methods_are_points_of_the_map():
    logits, right = random_logits(1, regions=400, images=60)
    grid = family_hits(logits, right, [1.0, 5.0, math.inf], [0.0, 0.5, 1.0])
    places = {"clip": (0, 0), "bsap": (0, 2), "qb_norm": (1, 2), "subtraction": (2, 2), "dn": (2, 1)}
    found = {name: hits(METHODS[name](logits.query, logits.aux, logits.group), right, logits) for name in METHODS}
    for name, (t, w) in places.items():
        np.testing.assert_array_equal(grid[:, t, w], found[name])
    np.testing.assert_array_equal(grid[:, :, 0], np.repeat(found["clip"][:, None], 3, 1))
    assert len({found[name].mean() for name in places}) > 3, "the points should not all be alike"


def test_a_large_temperature_is_the_mean_in_single_precision_too():
    logits, right = random_logits(2, regions=2000, images=300, prompts=500, dtype=torch.float32)
    grid = family_hits(logits, right, [1e5, 1e7, math.inf], [1.0])
    assert (grid[:, 0] == grid[:, 2]).mean() > 0.99 and (grid[:, 1] == grid[:, 2]).all()


def test_hits_are_those_of_the_predictions(sample):
    val = sample.select(split="val")
    regions = load_proposals(val, "detections", "data/refshapes")
    _, group = np.unique(regions["image_id"], return_inverse=True)
    images = np.unique(regions["image_id"])
    generator = torch.Generator().manual_seed(0)
    slot = torch.tensor(val.expressions.groupby("image_id").cumcount().to_numpy(copy=True))
    aux = torch.randn(len(regions), 20, generator=generator)
    query = torch.randn(len(regions), int(slot.max()) + 1, generator=generator)
    logits = ReferLogits(query, aux, torch.from_numpy(group),
                         torch.from_numpy(np.searchsorted(images, val.expressions["image_id"])), slot)  # fmt: skip
    right = analysis.right_regions(val, regions, logits)
    predictions = evaluation.rec_predictions(val, regions, logits, list(METHODS))
    assert predictions["correct"].any()
    for method, part in predictions.groupby("method"):
        found = hits(METHODS[method](query, aux, logits.group), right, logits)
        np.testing.assert_array_equal(found, part["correct"].to_numpy())
    several = torch.stack([METHODS[method](query, aux, logits.group) for method in METHODS], 2)
    np.testing.assert_array_equal(hits(several, right, logits)[:, 1], hits(several[:, :, 1], right, logits))


def test_no_pick_is_no_hit():
    logits, right = random_logits(3)
    assert not hits(torch.full_like(logits.query, torch.nan), torch.ones_like(right), logits).any()


# where a top-k mean belongs


def test_the_maximum_belongs_to_the_lowest_temperature_and_the_mean_to_the_highest():
    logits, _ = random_logits(4, regions=200)
    temperatures = [*np.logspace(-3, 3, 61), math.inf]
    lowest, left = matching_temperature(logits.aux, logits.group, 1, temperatures)
    assert lowest == temperatures[0] and left < 1e-3
    assert matching_temperature(logits.aux, logits.group, 7, temperatures) == (math.inf, pytest.approx(0, abs=1e-20))
    between, left = matching_temperature(logits.aux, logits.group, 3, temperatures)
    assert 0.1 < between < 10 and 0 < left < 0.2


def test_what_is_left_is_the_definition_and_images_may_shift():
    logits, _ = random_logits(5, regions=60)
    aux, group = logits.aux.numpy(), logits.group.numpy()
    top = np.sort(aux, 1)[:, -3:].mean(1)
    pool = 2 * np.log(np.exp(aux / 2).mean(1))
    inside = [np.concatenate([x[group == g] - x[group == g].mean() for g in range(6)]) for x in (top, pool - top)]
    expected = (inside[1] ** 2).mean() / (inside[0] ** 2).mean()
    assert matching_temperature(logits.aux, logits.group, 3, [2.0])[1] == pytest.approx(expected)
    shifted = logits.aux + 10 * logits.group[:, None]
    assert matching_temperature(shifted, logits.group, 3, [2.0])[1] == pytest.approx(expected)


# number of prompts


def test_subsets_are_drawn_and_nested():
    logits, right = random_logits(6, regions=300, images=50)
    drawn = subset_hits(logits, right, [1, 2, 7], draws=12, seed=3)
    everything = slow_hits(logits, right, 1.0, 1.0)
    assert drawn.shape == (len(everything), 3, 12)
    np.testing.assert_array_equal(drawn[:, 2], np.repeat(everything[:, None], 12, 1))
    singles = [slow_hits(logits, right, 1.0, 1.0, [m]) for m in range(7)]
    first = [[m for m in range(7) if (singles[m] == drawn[:, 0, d]).all()] for d in range(12)]
    assert all(first) and len({m for found in first for m in found}) > 3
    for d, found in enumerate(first):
        pairs = [slow_hits(logits, right, 1.0, 1.0, [found[0], m]) for m in range(7) if m != found[0]]
        assert any((pair == drawn[:, 1, d]).all() for pair in pairs)
    np.testing.assert_array_equal(drawn, subset_hits(logits, right, [1, 2, 7], draws=12, seed=3))
    assert (drawn != subset_hits(logits, right, [1, 2, 7], draws=12, seed=4)).any()


# Holm


@settings(max_examples=60, deadline=None)
@given(p=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.02, 0.5])), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p):
    expected = []
    for i in range(len(p)):
        others = [j for j in range(len(p)) if j != i]
        sets = [(i, *more) for size in range(len(p)) for more in itertools.combinations(others, size)]
        expected.append(max(min(1, len(chosen) * min(p[j] for j in chosen)) for chosen in sets))
    np.testing.assert_allclose(holm(p), expected)


def test_what_was_not_tested_does_not_count():
    np.testing.assert_allclose(holm([np.nan, 0.03, np.nan, 0.04]), [np.nan, 0.06, np.nan, 0.06])
    assert np.isnan(holm([np.nan])).all() and len(holm([])) == 0


# tables and readings


@pytest.fixture
def ablation():
    generator = np.random.default_rng(0)
    clip = generator.random((300, 1)) < 0.4
    correct = (clip & (generator.random((300, 3)) < 0.95)) | (generator.random((300, 3)) < [0.0, 0.1, 0.4])
    return correct, np.repeat(clip, 3, 1), generator.integers(0, 40, 300)


def test_an_ablation_table_is_what_it_says(ablation):
    correct, clip, images = ablation
    table = ablation_table(["a", "b", "c"], correct, clip, images, default=1, seed=5)
    np.testing.assert_allclose(table["accuracy"], 100 * correct.mean(0), atol=0.006)
    np.testing.assert_allclose(table["clip_accuracy"], 100 * clip.mean(0), atol=0.006)
    correct, clip = 1.0 * correct, 1.0 * clip
    expected = {"ci": correct, "clip_ci": clip, "delta_ci": correct - clip, "default_ci": correct - correct[:, [1]]}
    for name, values in expected.items():
        low, high = evaluation.cluster_bootstrap(values, images, seed=5)
        np.testing.assert_allclose(table[[f"{name}_low", f"{name}_high"]], 100 * np.stack([low, high], 1), atol=0.006)
    assert table.loc[1, ["delta_vs_default", "default_ci_low", "default_ci_high"]].tolist() == [0, 0, 0]
    raw = [evaluation.mcnemar_p(correct[:, k], clip[:, k]) for k in range(3)]
    np.testing.assert_allclose(table["p_value"], raw, rtol=1e-3)
    np.testing.assert_allclose(table["p_holm"], holm(raw), rtol=1e-3)


def test_means_over_draws_have_no_p_value(ablation):
    correct, clip, images = ablation
    table = ablation_table([1, 2, 3], correct * 0.5, clip, images)
    assert table["p_value"].isna().all() and table["p_holm"].isna().all() and (table["ci_low"] < table["ci_high"]).all()


def test_readings_follow_the_numbers(ablation):
    correct, clip, images = ablation
    up = ablation_table(["a", "b", "c"], correct, clip, images)
    text = readings.ablation_reading(up, "Letter")
    assert "highest with *c*" in text and "lowest with *a*" in text and "From the default, *a*" in text
    assert "more than chance" in text and "beaten in 2 of 3" in text and "beats the correction in 1 " in text
    usual = readings.ablation_reading(ablation_table(["a", "b", "c"], correct, clip, images, default=2), "Letter", 2)
    assert "The highest is the default" in usual and "more than chance" not in usual
    same = ablation_table(["a", "b"], correct[:, [0, 0]], clip[:, :2], images, default=1)
    assert analysis.best_level(same, 1) == 1 and analysis.best_level(same, 0) == 0

    worse = readings.chosen_reading(up.assign(accuracy_where_chosen=50.0), "val", "test")
    assert worse.startswith("**On test BSAP is worse than CLIP.**") and "pays here" in worse
    changed = up.iloc[::-1].assign(
        accuracy_where_chosen=50.0, delta_vs_default=-1.0, default_ci_low=-2.0, default_ci_high=-0.5
    )
    better = readings.chosen_reading(changed, "val", "test")
    assert better.startswith("On test BSAP (T = 1") and "does harm" in better


def test_the_reading_of_sizes_finds_where_a_bank_is_enough():
    rows = [
        ["x", 1, 30, 10, 50],
        ["x", 2, 49.5, 45, 52],
        ["x", 4, 48, 47, 49],
        ["x", 8, 50, 50, 50],
        ["y", 1, 20, 20, 20],
    ]
    table = pd.DataFrame(rows, columns=["bank", "size", "accuracy", "draw_low", "draw_high"])
    text = readings.sizes_reading(table.assign(clip_accuracy=40.0, ci_low=table["accuracy"] - 5))
    assert "x: one prompt 10.0 to 50.0 % over the draws, all 8 50.0 %, within a point of that from 8 on" in text
    assert "y: one prompt 20.0 to 20.0 % over the draws, all 1 20.0 %, within a point of that from 1 on" in text
    assert "1 of 2 banks" in text


def test_the_reading_of_the_map_and_its_best_setting():
    accuracy = pd.DataFrame([[40.0, 40, 40], [45, 50, 42], [44, 50, 43]], [0.0, 0.5, 1.0], [0.1, 1.0, math.inf])
    assert analysis.best_setting(accuracy) == (0.5, 1.0)
    marks = [["CLIP", 1.0, 0.0, False], ["BSAP", 1.0, 1.0, False], ["NNN", math.inf, 0.5, True], ["QB-Norm", 1.05, 0.98, False],
             ["chosen", 1.0, 0.5, False]]  # fmt: skip
    places = pd.DataFrame(marks, columns=["label", "temperature", "weight", "approximate"])
    unclear = accuracy.to_numpy() > 44
    text = readings.family_reading(accuracy, unclear, places, 0.031, 16)
    assert "T = 1, w = 0.5, with 50.0 %" in text
    assert "In there: BSAP (50.0 %), QB-Norm (50.0 %); outside: CLIP (40.0 %), NNN (42.0 %)" in text
    assert "NNN's mark is at T = ∞" in text and "3.1 %" in text and "edge" not in text
    figure = plotting.family_map(accuracy, unclear, places.assign(colour="black"), "map")
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert labels == {"CLIP", "BSAP, QB-Norm", "NNN", "chosen"}, "marks that nearly coincide share a label"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.1", "∞"]
    plt.close(figure)


def test_figures_show_their_tables(ablation):
    correct, clip, images = ablation
    table = ablation_table(["a", "b", "c"], correct, clip, images)
    figure = plotting.ablation_dots(table, "t", default=2)
    axis = figure.axes[0]
    assert [label.get_fontweight() for label in axis.get_yticklabels()] == ["normal", "normal", "bold"]
    assert [dot.lines[0].get_xdata()[0] for dot in axis.containers] == table["accuracy"].tolist()
    plt.close(figure)
    figure = plotting.ablation_curve(table, [0.1, 1.0, math.inf], "t", 1)
    assert figure.axes[0].lines[1].get_ydata().tolist() == table["accuracy"].tolist()
    plt.close(figure)


# the worked example


def test_the_worked_scene_is_won_by_bsap_only(sample):
    val = sample.select(split="val", limit=25)
    regions = load_proposals(val, "detections", "data/refshapes")
    images, group = np.unique(regions["image_id"], return_inverse=True)
    slot = torch.tensor(val.expressions.groupby("image_id").cumcount().to_numpy(copy=True))
    generator = torch.Generator().manual_seed(1)
    query, aux = (torch.randn(len(regions), k, generator=generator) for k in (int(slot.max()) + 1, 5))
    logits = ReferLogits(query, aux, torch.from_numpy(group),
                         torch.from_numpy(np.searchsorted(images, val.expressions["image_id"])), slot)  # fmt: skip
    right = analysis.right_regions(val, regions, logits)
    seen = set()
    for seed in range(6):
        scene = analysis.worked_scene(val, regions, logits, right, seed=seed)
        rows, column = scene["rows"], scene["slot"]
        assert len(set(rows.tolist())) == 5 and set(regions["image_id"].iloc[rows]) == {scene["image_id"]}
        s = query[rows, column]
        assert not right[rows[s.argmax()], column] and right[rows, column].sum() == 1
        assert right[rows[(s - aux[rows].logsumexp(1)).argmax()], column]
        seen.add((scene["image_id"], scene["text"]))
    assert len(seen) > 1
    again = analysis.worked_scene(val, regions, logits, right, seed=5)
    assert torch.equal(again["rows"], scene["rows"])
    assert analysis.worked_scene(val, regions, logits, torch.zeros_like(right)) is None


def test_features_passed_in_are_not_encoded_again(sample, save_clip, monkeypatch):
    scorer = ClipScorer(f"local-dir:{save_clip()}", device="cpu")
    val = sample.select(split="val", limit=3)
    regions = load_proposals(val, "gt", "data/refshapes")
    features = scorer.encode_regions(val, regions, ("crop", "blur"))
    expected = refer_logits([scorer], val, regions, ["star", "key"])
    monkeypatch.setattr(ClipScorer, "encode_regions", None)
    found = refer_logits([scorer], val, regions, ["star", "key"], features=[features])
    torch.testing.assert_close(found.aux, expected.aux)
    torch.testing.assert_close(found.query, expected.query, equal_nan=True)


# prompts that an expression names


def test_prompts_an_expression_names_are_left_out_of_its_pool():
    logits, right = random_logits(7, regions=120, images=20)
    generator = np.random.default_rng(7)
    named = generator.random((len(logits.expression_slot), 7)) < 0.4
    named[:12], named[12] = True, False  # all named: all kept
    found = analysis.unnamed_hits(logits, right, named, temperature=1.5)
    for e, without in enumerate(named):
        kept = np.flatnonzero(~without) if not without.all() else np.arange(7)
        assert found[e] == slow_hits(logits, right, 1.5, 1.0, kept)[e]
    everything = analysis.unnamed_hits(logits, right, np.zeros_like(named), 1.5)
    np.testing.assert_array_equal(everything, slow_hits(logits, right, 1.5, 1.0))
    assert (found != everything).any()


def test_a_named_prompt_is_a_whole_word():
    texts = pd.Series(["Key above the c++ mug", "keyhole", "red star"])
    named = analysis.named_prompts(texts, ["key", "red star", "mug (blue)"])
    assert named.tolist() == [[True, False, False], [False, False, False], [False, True, False]]
