"""The measures of notebook 01 against slow, independent versions: plain loops over the definitions, and scipy."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import skew, spearmanr

from bsap_utils import analysis, evaluation, plotting
from bsap_utils.analysis import (
    best_candidates,
    classifier_retriever_tables,
    hubness_table,
    k_occurrence,
    prefers_query,
    range_statistics,
    region_traits,
    right_regions,
    spearman_table,
    sums_of_squares,
)
from bsap_utils.datasets import XYWH
from bsap_utils.normalization import METHODS
from bsap_utils.proposals import ground_truth, load_proposals
from bsap_utils.scoring import ReferLogits

seeds = st.integers(0, 2**32 - 1)


# ranges


@settings(max_examples=50, deadline=None)
@given(seed=seeds, holes=st.floats(0, 0.9))
def test_ranges_are_those_of_the_texts_that_were_asked(seed, holes):
    generator = np.random.default_rng(seed)
    logits = generator.normal(20, 5, (generator.integers(1, 9), generator.integers(1, 9))).astype(np.float32)
    hidden = generator.random(logits.shape) < holes
    hidden[:, 0] = False
    got = range_statistics(torch.tensor(np.where(hidden, np.nan, logits)))
    for row, (values, drop) in enumerate(zip(logits, hidden, strict=True)):
        kept = values[~drop].astype(np.float64)
        expected = [kept.mean(), np.sqrt(((kept - kept.mean()) ** 2).mean()), kept.min(), kept.max()]
        np.testing.assert_allclose(
            got.loc[row, ["mean", "std", "minimum", "maximum"]].astype(float), expected, atol=1e-5
        )


def test_a_region_without_any_text_is_refused():
    with pytest.raises(ValueError, match="a text for every region"):
        range_statistics(torch.tensor([[1.0], [torch.nan]]))


# variance


@settings(max_examples=50, deadline=None)
@given(seed=seeds, images=st.integers(1, 4))
def test_the_decomposition_is_that_of_its_definition_and_adds_up(seed, images):
    generator = np.random.default_rng(seed)
    group = generator.integers(0, images, generator.integers(2, 12))
    scores = generator.normal(size=(len(group), generator.integers(1, 7)))
    expected = np.zeros((len(group), 3))
    for i, j in np.ndindex(*scores.shape):
        same = scores[group == group[i]]
        text, region = same[:, j].mean(), scores[i].mean() - same.mean()
        expected[i] += region**2, (text - scores.mean()) ** 2, (scores[i, j] - text - region) ** 2
    got = sums_of_squares(torch.tensor(scores), torch.tensor(group))
    np.testing.assert_allclose(got.to_numpy(), expected, atol=1e-9)
    assert got.to_numpy().sum() == pytest.approx(((scores - scores.mean()) ** 2).sum())
    one_group = sums_of_squares(torch.tensor(scores))
    pd.testing.assert_frame_equal(one_group, sums_of_squares(torch.tensor(scores), torch.zeros(len(group))))


def test_known_effects_are_found_again():
    generator = np.random.default_rng(0)
    effects = (generator.normal(0, scale, size) for scale, size in ((3, (2000, 1)), (2, (1, 500)), (1, (2000, 500))))
    total = sums_of_squares(torch.tensor(sum(effects))).sum()
    np.testing.assert_allclose(total / total.sum(), np.array([9, 4, 1]) / 14, atol=0.03)


def test_a_shift_by_region_changes_only_the_region_part():
    generator = torch.Generator().manual_seed(0)
    scores, aux = torch.randn(30, 12, generator=generator), torch.randn(30, 5, generator=generator)
    group = torch.arange(30) // 6
    before, after = (sums_of_squares(METHODS[m](scores, aux, group), group).sum() for m in ("clip", "bsap"))
    assert after["interaction"] == pytest.approx(before["interaction"], rel=1e-5)
    assert after["region"] != pytest.approx(before["region"], rel=0.01)


def test_a_matrix_with_holes_cannot_be_decomposed():
    with pytest.raises(ValueError, match="full matrix"):
        sums_of_squares(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))


# hubness


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds, k=st.integers(1, 4), grouped=st.booleans(), ties=st.booleans(), block=st.sampled_from([1, 20, 2**23])
)
def test_occurrence_is_counted_as_by_hand(seed, k, grouped, ties, block):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(generator.integers(1, 15), generator.integers(1, 6)))
    scores = np.round(scores) if ties else scores
    scores[generator.random(scores.shape) < 0.2] = np.nan
    group = generator.integers(0, 4, len(scores)) if grouped else np.zeros(len(scores), dtype=int)
    expected = np.zeros(len(scores), dtype=int)
    for column in scores.T:
        for image in set(group.tolist()):
            rows = [row for row in np.flatnonzero(group == image) if not np.isnan(column[row])]
            for row in sorted(rows, key=lambda row: -column[row])[:k]:  # Python's sort keeps the first of equals first
                expected[row] += 1
    got = k_occurrence(torch.tensor(scores), k, torch.tensor(group) if grouped else None, block)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_infinite_scores_are_scores_and_absent_ones_are_not():
    scores = torch.tensor([[torch.nan], [-torch.inf], [-torch.inf]])
    assert k_occurrence(scores, 2).tolist() == [0, 1, 1]
    assert k_occurrence(scores, 3, torch.tensor([0, 0, 1])).tolist() == [0, 1, 1]


def gini(x):
    return np.abs(x[:, None] - x[None]).sum() / (2 * len(x) ** 2 * x.mean())


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_hubness_measures_are_those_of_scipy_and_of_the_definition(seed):
    generator = np.random.default_rng(seed)
    counts = generator.poisson(generator.exponential(3, 40))
    counts[:2] = 0, 5  # some spread
    table = hubness_table(pd.DataFrame({"clip": counts}), np.arange(40), resamples=2).set_index("measure")
    expected = [skew(counts), gini(counts), (counts == 0).mean()]
    np.testing.assert_allclose(table.loc[["skewness", "gini", "never"], "value"], expected, atol=1e-9)


def test_resampled_measures_are_those_of_the_rows_repeated():
    generator = np.random.default_rng(3)
    counts, trait, cluster = (
        generator.poisson(2, 60) * 1.0,
        generator.integers(0, 9, 60) * 1.0,
        generator.integers(0, 12, 60),
    )
    seen = 0
    for weights in analysis._resampled_weights(cluster, 50, seed=0):
        got, rank = analysis._hubness(counts, weights), analysis._spearman(counts, trait, weights)
        for row, times in enumerate(weights.astype(int)):
            assert all(len(set(times[cluster == one])) == 1 for one in range(12)), "images are drawn whole"
            repeated = np.repeat(np.arange(60), times)
            x = counts[repeated]
            np.testing.assert_allclose(got[row], [skew(x), gini(x), (x == 0).mean()], atol=1e-9)
            assert rank[row] == pytest.approx(spearmanr(x, trait[repeated]).statistic, abs=1e-9)
            seen += 1
    assert seen == 51, "the sample itself comes first"


def test_equal_counts_have_no_skewness_and_one_taker_has_all():
    counts = pd.DataFrame({"clip": [0] * 99 + [7], "bsap": [1] * 100})
    table = hubness_table(counts, np.arange(100), resamples=200).set_index(["method", "measure"])
    assert table["value"].to_dict() == pytest.approx(
        {("clip", "skewness"): skew(counts["clip"]), ("clip", "gini"): 0.99, ("clip", "never"): 0.99,
         ("bsap", "skewness"): np.nan, ("bsap", "gini"): 0, ("bsap", "never"): 0}, nan_ok=True)  # fmt: skip
    assert table.loc[("bsap", "gini"), "delta_vs_clip"] == pytest.approx(-0.99)
    with pytest.raises(ValueError, match="≥ 0"):
        hubness_table(pd.DataFrame({"clip": [1, -1]}), np.arange(2))


def test_differences_are_paired():
    counts = np.random.default_rng(0).poisson(3, 200)
    table = hubness_table(pd.DataFrame({"clip": counts, "bsap": counts}), np.arange(200), resamples=100)
    assert (table.loc[table["method"] == "bsap", ["delta_ci_low", "delta_ci_high"]] == 0).all(axis=None)
    assert (table["ci_low"] < table["value"]).all() and (table["value"] < table["ci_high"]).all()


# what makes a hub


@settings(max_examples=40, deadline=None)
@given(seed=seeds, ties=st.booleans())
def test_rank_correlations_are_those_of_scipy(seed, ties):
    generator = np.random.default_rng(seed)
    outcome, trait = generator.normal(size=(2, 30))
    trait = (trait > 0) if ties else np.where(np.arange(30) % 7 == 0, np.nan, trait + outcome)
    known = ~np.isnan(trait)
    if len(np.unique(trait[known])) < 2:
        return
    row = spearman_table(outcome, pd.DataFrame({"trait": trait}), np.arange(30) // 3, resamples=20).loc[0]
    assert row["n"] == known.sum()
    assert row["spearman"] == pytest.approx(spearmanr(outcome[known], trait[known]).statistic)


def test_the_interval_of_a_correlation_covers_the_truth_when_regions_share_their_image():
    covered = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        image = np.repeat(np.arange(40), 8)
        outcome, trait = (generator.normal(size=40)[image] + 0.3 * generator.normal(size=320) for _ in range(2))
        row = spearman_table(outcome, pd.DataFrame({"trait": trait}), image, resamples=200, seed=seed).loc[0]
        covered.append(row["ci_low"] < 0 < row["ci_high"])
    assert np.mean(covered) > 0.85, "resampling regions instead of images covers about half of the time here"


def test_constant_and_unknown_traits_have_no_correlation():
    traits = pd.DataFrame({"same": [0.3] * 20, "unknown": [np.nan] * 20, "one image": [1.0] + [np.nan] * 19})
    table = spearman_table(np.arange(20.0), traits, np.arange(20), resamples=10)
    assert table[["spearman", "ci_low", "ci_high"]].isna().all(axis=None)
    assert table["n"].tolist() == [20, 0, 1]


def test_traits_of_regions_are_measured_in_the_picture(sample, tmp_path):
    val = sample.select(split="val", limit=3)
    regions = load_proposals(val, "detections", "data/refshapes")
    traits = region_traits(val, regions, sample.select(split="train"))
    rows = regions.reset_index(drop=True)
    for row in range(0, len(rows), 4):
        x, y, w, h = rows.loc[row, XYWH]
        image = Image.open(val.image_path(rows.loc[row, "image_id"])).convert("L")
        left, top, right, bottom = (int(np.round(v)) for v in (x, y, x + w, y + h))
        pixels = np.asarray(image)[top:bottom, left:right] / 255
        corner = np.hypot(x + w / 2 - 160, y + h / 2 - 120) / 200
        expected = [w * h / 320 / 240, corner, 1 - (y + h / 2) / 240, pixels.std()]
        got = traits.loc[row, ["size", "off_centre", "height", "contrast"]].astype(float)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert traits["background"].sum() > 0
    assert (traits["background"] == traits[["category", "frequency"]].isna().T).all(axis=None)
    framed = region_traits(val, ground_truth(val), sample)
    assert not framed["background"].any() and (framed["framing"] == 1).all()
    assert framed["category"].tolist() == val.regions.loc[ground_truth(val)["ann_id"], "category"].tolist()
    share = (sample.regions["category"] == framed.loc[0, "category"]).mean()
    assert framed.loc[0, "frequency"] == pytest.approx(share)
    assert region_traits(val, regions)["frequency"].isna().all()


# right as a classifier, wrong as a retriever


def random_logits(generator):
    sizes = generator.integers(1, 5, 6)
    texts = generator.integers(1, 4, 6)
    group, expression_group = np.repeat(np.arange(6), sizes), np.repeat(np.arange(6), texts)
    slot = np.concatenate([np.arange(t) for t in texts])
    query = generator.normal(size=(len(group), texts.max())).astype(np.float32)
    query[np.arange(query.shape[1]) >= texts[group][:, None]] = np.nan
    aux = generator.normal(size=(len(group), 4)).astype(np.float32)
    return ReferLogits(*map(torch.tensor, (query, aux, group, expression_group, slot)))


@settings(max_examples=50, deadline=None)
@given(seed=seeds)
def test_a_region_prefers_the_expression_by_either_criterion(seed):
    generator = np.random.default_rng(seed)
    logits = random_logits(generator)
    group = logits.group.numpy()
    rows = np.array([generator.choice([-1, *np.flatnonzero(group == g)]) for g in logits.expression_group.numpy()])
    same = generator.random((len(rows), 4)) < 0.2
    every, half = prefers_query(logits, rows, same)
    for e, row in enumerate(rows):
        query = float(logits.query[row, logits.expression_slot[e]])
        aux = [float(a) for a, left_out in zip(logits.aux[row], same[e], strict=True) if not left_out]
        assert every[e] == (row >= 0 and all(query > a for a in aux))
        assert half[e] == (row >= 0 and np.exp(query) / (np.exp(query) + sum(map(np.exp, aux))) > 0.5)
    assert not (half & ~every).any(), "b > 0.5 is the stricter one"


def test_regions_of_another_image_are_refused():
    logits = random_logits(np.random.default_rng(0))
    with pytest.raises(ValueError, match="other images"):
        prefers_query(logits, torch.full_like(logits.expression_group, len(logits.group) - 1))
    with pytest.raises(ValueError, match="one region for each"):
        prefers_query(logits, torch.tensor([0]))


def test_the_best_candidate_is_right_and_the_nearest(sample):
    val = sample.select(split="val", limit=20)
    regions = load_proposals(val, "detections", "data/refshapes")
    best = best_candidates(val, regions)
    names, group = np.unique(regions["image_id"], return_inverse=True)
    slot = val.expressions.groupby("image_id").cumcount().to_numpy()
    of = np.searchsorted(names, val.expressions["image_id"])
    empty = torch.zeros(len(group), slot.max() + 1), torch.zeros(len(group), 1)
    logits = ReferLogits(*empty, *map(torch.tensor, (group, of, slot)))
    right = right_regions(val, regions, logits).numpy()
    assert ((best >= 0) == [right[group == g, s].any() for g, s in zip(of, slot, strict=True)]).all()
    some = np.flatnonzero(best >= 0)
    assert right[best[some], slot[some]].all() and 0 < len(some) < len(best)
    for e in some[::7]:
        meant = val.regions.loc[val.expressions["ann_id"].iloc[e], XYWH].to_numpy(float)
        own = np.flatnonzero(group == of[e])
        iou = evaluation.box_iou(regions[XYWH].to_numpy()[own], np.tile(meant, (len(own), 1)))
        assert best[e] == own[iou.argmax()]


def test_the_tables_count_every_expression_once():
    yes, no = True, False
    columns = ["image_id", "reachable", "clip", "bsap", "right_every", "picked_every", "right_half", "picked_half"]
    rows = [
        (1, yes, yes, yes, yes, yes, yes, yes),
        (1, yes, yes, no, no, no, no, no),  # wrong as a classifier, right as a retriever
        (2, yes, no, yes, yes, no, no, no),  # only the right region prefers it, and not by half
        (2, yes, no, no, yes, yes, yes, no),
        (3, yes, no, no, no, yes, no, no),
        (3, no, no, no, no, yes, no, yes),
    ]
    cells, errors = classifier_retriever_tables(pd.DataFrame(rows, columns=columns))
    every = cells[cells["criterion"] == "every"].set_index(["classifier", "retriever"])["n"]
    assert every.to_dict() == {(True, True): 1, (True, False): 2, (False, True): 1, (False, False): 1}
    assert cells.groupby("criterion")["share"].sum().tolist() == pytest.approx([1, 1])
    kinds = errors.pivot(index="error", columns="criterion", values="n")
    assert kinds["every"].to_dict() == {
        "only the right region prefers it": 1, "both prefer it": 1, "the right region does not": 1, "no candidate is right": 1
    }  # fmt: skip
    assert kinds.loc[["only the right region prefers it", "the right region does not"], "half"].tolist() == [1, 2]
    assert errors.groupby("criterion")["n"].sum().tolist() == [4, 4]
    mended = errors[errors["criterion"] == "every"].set_index("error")["mended"]
    assert mended["only the right region prefers it"] == 1 and mended["no candidate is right"] == 0
    assert ((cells["ci_low"] <= cells["share"]) & (cells["share"] <= cells["ci_high"])).all()


def test_a_retriever_without_errors_has_an_empty_second_table():
    row = {"image_id": [1, 2], "reachable": True, "clip": True, "bsap": True}
    row |= {f"{who}_{how}": True for who in ("right", "picked") for how in ("every", "half")}
    cells, errors = classifier_retriever_tables(pd.DataFrame(row))
    assert cells.loc[cells["classifier"] & cells["retriever"], "share"].tolist() == [1, 1]
    assert (errors["n"] == 0).all() and errors["share"].isna().all()


# the figures, where there is little to show


def test_figures_are_drawn_without_background_errors_or_correlations():
    ranges = range_statistics(torch.randn(5, 4)).assign(own=[1.0, 2.0, 3.0, 4.0, 5.0], background=False)
    counts = pd.DataFrame({"clip": [3, 0, 1, 2, 0], "bsap": [0, 0, 0, 0, 0]})
    table = hubness_table(counts, np.arange(5), resamples=5).assign(setting="gallery")
    row = {"image_id": [1, 2], "reachable": True, "clip": True, "bsap": True}
    row |= {f"{who}_{how}": True for who in ("right", "picked") for how in ("every", "half")}
    _, errors = classifier_retriever_tables(pd.DataFrame(row))
    traits = pd.DataFrame({"background": [0.0] * 5, "size": [1.0, 2, 3, 4, 5]})
    relations = spearman_table(np.arange(5.0), traits, np.arange(5), resamples=5).assign(
        outcome="bias", label=["a", "b"]
    )
    shares = pd.DataFrame(
        {"region": [0.2, 0.5], "interaction": [0.3, 0.5], "text": [0.5, np.nan]}, index=["all", "image"]
    )
    gain = {
        "bank": "generic",
        "temperature": [1.0, np.inf],
        "sees": [0.1, 0.2],
        "gain": 1.0,
        "gain_low": 0.5,
        "gain_high": 2.0,
    }
    figures = [
        plotting.similarity_ranges(ranges, most=3), plotting.range_distributions(ranges), plotting.variance_bars(shares),
        plotting.lorenz_curves({"gallery": counts}, table), plotting.clip_errors(errors, {"every": "x", "half": "y"}),
        plotting.hub_relations(relations), plotting.sees_and_gains(pd.DataFrame(gain), 3.0),
        plotting.hub_sheet({"most": [(np.zeros((4, 4, 3)), "a")] * 3, "least": [(np.zeros((4, 4, 3)), "b")]}),
    ]  # fmt: skip
    shown = [[label.get_text() for label in figure.axes[0].get_yticklabels()] for figure in figures]
    assert shown[5] == ["b"], "a trait without a correlation has no row"
    assert shown[2] == ["all", "image"]
    for figure in figures:
        figure.canvas.draw()
        plt.close(figure)


def logits_of(ds, regions):
    names, group = np.unique(regions["image_id"], return_inverse=True)
    slot = ds.expressions.groupby("image_id").cumcount().to_numpy()
    of = np.searchsorted(names, ds.expressions["image_id"])
    random = torch.randn(len(group), slot.max() + 5, generator=torch.Generator().manual_seed(3))
    return ReferLogits(random[:, 4:].clone(), random[:, :4].clone(), *map(torch.tensor, (group, of, slot)))


def test_typical_scenes_are_the_median_of_wins_and_of_losses(sample):
    ds = sample.select(split="val", limit=40)
    regions = load_proposals(ds, "detections", "data/refshapes")
    logits = logits_of(ds, regions)
    logits.query.add_(1.5 * right_regions(ds, regions, logits))
    predictions = evaluation.rec_predictions(ds, regions, logits, ["clip", "bsap"])
    scenes = analysis.typical_scenes(ds, logits, predictions)
    assert [scene["outcome"] for scene in scenes] == ["win", "loss"]

    bias = torch.logsumexp(logits.aux, 1).numpy()
    kinds = evaluation.expression_kind(ds.expressions["text"]).to_numpy()
    by_expression = predictions.set_index(["sent_id", "method"])
    for scene, right, wrong in zip(scenes, ("bsap", "clip"), ("clip", "bsap"), strict=True):
        moved = {}
        for row, (sent_id, expression) in enumerate(ds.expressions.iterrows()):
            one = by_expression.loc[sent_id]
            boxes = [one.loc[[name], XYWH].to_numpy() for name in ("clip", "bsap")]
            apart = evaluation.box_iou(*boxes)[0] == 0
            if one.loc[right, "correct"] and not one.loc[wrong, "correct"] and apart and kinds[row] == "attributes":
                moved[expression["image_id"], expression["text"]] = (
                    bias[one.loc["clip", "region"]] - bias[one.loc["bsap", "region"]]
                )
        assert (
            len(moved) > 2 and (scene["image_id"], scene["text"]) == sorted(moved, key=moved.get)[(len(moved) - 1) // 2]
        )
        candidates = scene["candidates"]
        assert candidates["logit"].idxmax() == scene["clip"]
        assert (candidates["logit"] - candidates["bias"]).idxmax() == scene["bsap"]
        assert (regions.loc[candidates.index, "image_id"] == scene["image_id"]).all()

    figure = plotting.hero(ds, regions, scenes, most=3)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert [title.rsplit(": ")[-1] for title in titles if title] == ["BSAP mends it", "BSAP breaks it"]
    for scene, below in zip(scenes, figure.axes[2:], strict=True):
        shown = min(3, len(scene["candidates"])) + (
            scene["candidates"]["logit"].rank(ascending=False)[scene["bsap"]] > 3
        )
        bold = {t.get_text() for t in below.texts if t.get_weight() == "bold"}
        s, b = (scene["candidates"][column] for column in ("logit", "bias"))
        gap = f"{s[scene['bsap']] - b[scene['bsap']]:+.1f}".replace("-", "−")
        assert bold == {f"{s.max():.1f}".replace("-", "−"), gap}
        assert len(below.collections) == shown, "a line a candidate"
    plt.close(figure)


def test_where_the_methods_agree_there_is_no_typical_scene(sample):
    ds = sample.select(split="val", limit=3)
    regions = load_proposals(ds, "detections", "data/refshapes")
    logits = logits_of(ds, regions)
    logits.aux.zero_()
    predictions = evaluation.rec_predictions(ds, regions, logits, ["clip", "bsap"])
    assert analysis.typical_scenes(ds, logits, predictions) == []
