"""Picks, correctness, intervals and p-values, against plain loops, hand-computed numbers and simulated coverage."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsap_utils import evaluation, refshapes
from bsap_utils.evaluation import cluster_bootstrap, mcnemar_p, pick_regions, rec_correct, rec_table
from bsap_utils.proposals import box_iou, from_boxes

seeds = st.integers(0, 2**32 - 1)


# picking


@settings(max_examples=100, deadline=None)
@given(seed=seeds, ties=st.booleans())
def test_picks_are_those_of_a_loop(seed, ties):
    generator = np.random.default_rng(seed)
    regions, texts, images = generator.integers(1, 30), generator.integers(1, 5), generator.integers(1, 8)
    scores = generator.normal(size=(regions, texts)) * 50
    scores = (scores // 50 if ties else scores).astype(np.float32)
    group = generator.integers(0, images, regions)
    scores[np.arange(texts) >= generator.integers(0, texts + 1, images)[group][:, None]] = np.nan
    expected = np.full((group.max() + 1, texts), -1)
    for image, column in np.ndindex(*expected.shape):
        for row in range(regions):
            best = expected[image, column]
            if group[row] == image and (best < 0 or scores[row, column] > scores[best, column]):
                expected[image, column] = -1 if np.isnan(scores[row, column]) else row
    got = pick_regions(torch.tensor(scores), torch.tensor(group))
    assert got.dtype == torch.long
    np.testing.assert_array_equal(got.numpy(), expected)


def test_ties_go_to_the_first_row_and_infinite_scores_are_scores():
    scores = torch.tensor([[1.0, -torch.inf], [2.0, -torch.inf], [2.0, -torch.inf], [torch.inf, 0.0]])
    assert pick_regions(scores, torch.tensor([0, 0, 0, 1])).tolist() == [[1, 0], [3, 3]]


def test_an_image_without_regions_or_texts_has_no_pick():
    assert pick_regions(torch.ones(2, 1), torch.tensor([0, 2])).tolist() == [[0], [-1], [1]]
    assert pick_regions(torch.ones(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert pick_regions(torch.ones(4, 0), torch.tensor([0, 0, 1, 1])).shape == (2, 0)


def test_half_precision_and_integers_can_be_ranked():
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        assert pick_regions(torch.tensor([[1], [3], [2]], dtype=dtype), torch.tensor([0, 0, 0])).tolist() == [[1]]


def test_picking_refuses_a_group_that_does_not_fit():
    with pytest.raises(ValueError, match=r"scores \[4, 2\] and group \[3\]"):
        pick_regions(torch.ones(4, 2), torch.zeros(3, dtype=torch.long))


# correctness


def test_correct_means_more_than_half_strictly():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 5, 10], [0, 0, 5.001, 10], [50, 50, 1, 1], [0, 0, 10, 10]])
    correct, iou = rec_correct(torch.tensor([0, 1, 2, 3, -1]), boxes, np.array([[0, 0, 10, 10]] * 5))
    assert correct.tolist() == [True, False, True, False, False]
    np.testing.assert_allclose(iou, [1, 0.5, 0.5001, 0, 0])
    assert rec_correct(np.array([1]), boxes, boxes[:1], threshold=0.49)[0].all()
    assert [len(x) for x in rec_correct(np.zeros(0, dtype=int), boxes, np.zeros((0, 4)))] == [0, 0]


def test_correctness_refuses_what_does_not_fit():
    boxes = np.ones((2, 4))
    with pytest.raises(ValueError, match=r"picked \(3,\) and referred \(2, 4\)"):
        rec_correct(np.zeros(3, dtype=int), boxes, boxes)
    for wrong in (2, -2):
        with pytest.raises(ValueError, match="rows of 2 boxes"):
            rec_correct(np.array([0, wrong]), boxes, boxes)


# intervals


def naive_bootstrap(values, cluster, denominator, resamples, level, seed):
    """Draw the same images, and gather every row of every drawn image."""
    names = list(dict.fromkeys(cluster))
    rows = [np.flatnonzero(cluster == name) for name in names]
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        taken = np.concatenate([rows[i] for i in generator.integers(len(names), size=len(names))])
        ratios.append(values[taken].sum(0) / denominator[taken].sum(0))
    return np.percentile(ratios, [50 - 50 * level, 50 + 50 * level], axis=0)


def clustered(seed, clusters=30, columns=None, spread=1.0):
    generator = np.random.default_rng(seed)
    cluster = np.repeat(generator.permutation(clusters), generator.integers(1, 12, clusters))
    shape = (len(cluster),) if columns is None else (len(cluster), columns)
    values = generator.normal(size=shape) + spread * generator.normal(size=(clusters, *shape[1:]))[cluster]
    order = generator.permutation(len(cluster))
    return values[order], cluster[order], generator


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_bootstrap_is_that_of_a_loop(columns, level):
    values, cluster, generator = clustered(4, columns=columns)
    names = np.array([f"image {c}" for c in cluster])
    got = cluster_bootstrap(values, names, None, 300, level, 7)
    np.testing.assert_allclose(got, naive_bootstrap(values, cluster, np.ones_like(values), 300, level, 7))
    assert np.shape(got) == (2, *values.shape[1:])
    weights = generator.uniform(0, 5, values.shape)
    got = cluster_bootstrap(values, names, weights, 300, level, 7)
    np.testing.assert_allclose(got, naive_bootstrap(values, cluster, weights, 300, level, 7))
    shared = weights if columns is None else weights[:, 0]
    if columns:
        got = cluster_bootstrap(values, names, shared, 300, level, 7)
        np.testing.assert_allclose(got, naive_bootstrap(values, cluster, shared[:, None], 300, level, 7))


def test_blocks_do_not_show(monkeypatch):
    """With many clusters the resamples come in blocks: 3,000 clusters and 800 resamples take three of them."""
    values, cluster, _ = clustered(5, clusters=3_000)
    got = cluster_bootstrap(values, cluster, None, 800)
    np.testing.assert_allclose(got, naive_bootstrap(values, cluster, np.ones_like(values), 800, 0.95, 0))


def test_same_seed_same_interval_and_columns_share_resamples():
    values, cluster, _ = clustered(6, columns=2)
    assert np.array_equal(cluster_bootstrap(values, cluster), cluster_bootstrap(values, cluster))
    assert not np.array_equal(cluster_bootstrap(values, cluster), cluster_bootstrap(values, cluster, seed=1))
    for column in (0, 1):
        alone = cluster_bootstrap(values[:, column], cluster)
        np.testing.assert_allclose(np.array(cluster_bootstrap(values, cluster))[:, column], alone)
    low, high = cluster_bootstrap(values[:, 0] - values[:, 0], cluster)
    assert low == high == 0


@settings(max_examples=30, deadline=None)
@given(seed=seeds, shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_interval_holds_the_mean_and_moves_with_the_values(seed, shift, scale):
    values, cluster, _ = clustered(seed)
    low, high = cluster_bootstrap(values, cluster, None, 500)
    assert values.min() <= low <= values.mean() <= high <= values.max()
    moved = cluster_bootstrap(scale * values + shift, cluster, None, 500)
    np.testing.assert_allclose(moved, [scale * low + shift, scale * high + shift], rtol=1e-8, atol=1e-8)


def test_the_interval_covers_the_truth_where_one_that_ignores_images_does_not():
    """400 simulated studies of 60 images: about 95 % must cover 0. Resampling expressions covers far less."""
    covered, covered_naively = 0, 0
    for study in range(400):
        values, cluster, _ = clustered(study, clusters=60)
        low, high = cluster_bootstrap(values, cluster, None, 400)
        covered += low <= 0 <= high
        low, high = cluster_bootstrap(values, np.arange(len(values)), None, 400)
        covered_naively += low <= 0 <= high
    assert 0.90 <= covered / 400 <= 0.98
    assert covered_naively / 400 < 0.75


def test_one_image_gives_no_interval():
    low, high = cluster_bootstrap(np.array([1.0, 0.0, 1.0]), np.zeros(3))
    assert math.isnan(low) and math.isnan(high)
    assert np.isnan(cluster_bootstrap(np.ones((3, 2)), np.zeros(3))).tolist() == [[True, True]] * 2


@pytest.mark.parametrize(
    ("values", "cluster", "denominator", "said"),
    [
        ([], [], None, "no values"),
        ([1.0, math.nan], [0, 1], None, "NaN"),
        ([1.0, math.inf], [0, 1], None, "infinite"),
        ([1.0, 2.0], [0, 1], [1.0, -1.0], "negative"),
        ([1.0, 2.0], [0, 1], [1.0, math.nan], "NaN"),
        ([1.0, 2.0], [0.0, math.nan], None, "cluster has NaN"),
        ([1.0, 2.0], [0], None, r"values \(2,\), denominator \(2,\) and cluster \(1,\)"),
        ([1.0, 2.0], [0, 1], [1.0], r"denominator \(1,\)"),
        ([[[1.0]], [[2.0]]], [0, 1], None, r"values \(2, 1, 1\)"),
        ([1.0, 2.0], [0, 1], [0.0, 1.0], "add up to 0"),
    ],
)
def test_bootstrap_refuses_what_it_cannot_do(values, cluster, denominator, said):
    with pytest.raises(ValueError, match=said):
        cluster_bootstrap(np.array(values), np.array(cluster), None if denominator is None else np.array(denominator))


def test_bootstrap_refuses_odd_levels_and_counts():
    for options in ({"level": 1.0}, {"level": 95}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level"):
            cluster_bootstrap(np.array([1.0, 2.0]), np.array([0, 1]), **options)


def test_bootstrap_is_bounded_in_memory():
    generator = np.random.default_rng(0)
    cluster = np.repeat(np.arange(1500), 7)
    values = generator.random((len(cluster), 9)) < 0.5
    tracemalloc.start()
    cluster_bootstrap(values, cluster)
    cluster_bootstrap(np.ones(50_000), np.arange(50_000), None, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


# McNemar's test


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 2**5),
        (0, 5, 2 / 2**5),
        (8, 1, 2 * (1 + 9) / 2**9),
        (4, 4, 1.0),
        (3, 9, 2 * (1 + 12 + 66 + 220) / 2**12),
    ],
)
def test_mcnemar_is_the_hand_computed_binomial(only_a, only_b, p):
    a = np.array([1] * only_a + [0] * only_b + [1, 1, 1, 0, 0], dtype=bool)
    b = np.array([0] * only_a + [1] * only_b + [1, 1, 1, 0, 0], dtype=bool)
    for kind in (bool, int, float):
        assert mcnemar_p(a.astype(kind), b.astype(kind)) == pytest.approx(p)
    assert mcnemar_p(a, b) == mcnemar_p(b, a)


def test_mcnemar_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        mcnemar_p(np.ones(2), np.ones(3))
    for wrong in (math.nan, 0.5, 2):
        with pytest.raises(ValueError, match="only True and False"):
            mcnemar_p(np.array([1, wrong]), np.array([1, 0]))
    assert mcnemar_p(np.zeros(0), np.zeros(0)) == 1.0


# the table

SETTING = {
    "dataset": "refshapes",
    "split": "val",
    "proposals": "detections",
    "model": "clip-refshapes",
    "pretrained": "",
    "visual_prompts": ("crop", "blur"),
    "aux_bank": "categories",
}
COLUMNS = [*SETTING, "method", "n", "accuracy", "ci_low", "ci_high", "delta_vs_clip", "p_value"]
COLUMNS += ["delta_ci_low", "delta_ci_high"]


@pytest.fixture
def predictions():
    generator = np.random.default_rng(1)
    images = np.repeat(np.arange(100, 140), generator.integers(1, 9, 40))
    frames = [
        pd.DataFrame(
            {
                "sent_id": np.arange(len(images)) * 3,
                "image_id": images,
                "method": method,
                "correct": generator.random(len(images)) < accuracy,
                "iou": 0.1,
            }
        )
        for method, accuracy in [("nnn", 0.5), ("clip", 0.4), ("bsap", 0.7)]
    ]
    return pd.concat(frames).sample(frac=1, random_state=0)


def test_the_table_is_what_a_loop_would_write(predictions):
    table = rec_table(predictions, **SETTING)
    assert list(table) == COLUMNS
    assert list(table["method"]) == list(dict.fromkeys(predictions["method"]))
    assert set(table["visual_prompts"]) == {"crop+blur"}
    by_method = {name: part.sort_values("sent_id") for name, part in predictions.groupby("method")}
    clip = by_method["clip"]["correct"].to_numpy()
    for row in table.itertuples():
        mine = by_method[row.method]
        correct, images = mine["correct"].to_numpy(), mine["image_id"].to_numpy()
        low, high = cluster_bootstrap(correct, images)
        delta_low, delta_high = cluster_bootstrap(correct.astype(float) - clip, images)
        assert row.n == len(correct)
        assert row.accuracy == round(100 * correct.mean(), 2)
        assert (row.ci_low, row.ci_high) == (round(100 * low, 2), round(100 * high, 2))
        assert row.delta_vs_clip == round(100 * (correct.mean() - clip.mean()), 2)
        assert (row.delta_ci_low, row.delta_ci_high) == (round(100 * delta_low, 2), round(100 * delta_high, 2))
        assert row.p_value == pytest.approx(mcnemar_p(correct, clip), rel=1e-3)
    nothing = table.set_index("method").loc["clip", ["delta_vs_clip", "delta_ci_low", "delta_ci_high"]]
    assert (nothing == 0).all()


def test_without_clip_there_is_no_difference_to_it(predictions):
    table = rec_table(predictions[predictions["method"] != "clip"], **SETTING)
    assert table[["delta_vs_clip", "p_value", "delta_ci_low", "delta_ci_high"]].isna().all(axis=None)
    assert table[["accuracy", "ci_low", "ci_high"]].notna().all(axis=None)


def test_the_kind_of_columns_does_not_matter(predictions):
    expected = rec_table(predictions, **SETTING)
    other = predictions.astype({"method": "category", "correct": int, "image_id": str}).iloc[::1]
    pd.testing.assert_frame_equal(rec_table(other, **SETTING), expected)
    assert rec_table(predictions, **{**SETTING, "visual_prompts": "crop"})["visual_prompts"].eq("crop").all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.drop(p.index[p["method"] == "bsap"][:1]), "lacks"),
        (lambda p: p[(p["method"] != "bsap") | (p["sent_id"] > 30)], "bsap lacks 11"),
        (lambda p: pd.concat([p, p.iloc[:2]]), "2 predictions come twice"),
        (lambda p: p.assign(image_id=np.arange(len(p))), "more than one image"),
        (lambda p: p.assign(correct=[None, *p["correct"][1:]]), "missing entries"),
        (lambda p: p.assign(correct=0.5), "not True or False"),
        (lambda p: p.drop(columns=["image_id", "method"]), "no column image_id, method"),
        (lambda p: p.iloc[:0], "no predictions"),
    ],
)
def test_incomplete_predictions_are_refused(predictions, change, said):
    with pytest.raises(ValueError, match=said):
        rec_table(change(predictions.reset_index(drop=True)), **SETTING)


def test_the_setting_must_be_complete(predictions):
    with pytest.raises(TypeError, match="aux_bank"):
        rec_table(predictions, **{k: v for k, v in SETTING.items() if k != "aux_bank"})
    with pytest.raises(TypeError, match="colour"):
        rec_table(predictions, **SETTING, colour="red")


# From logits to tables, on the sample


@pytest.fixture(scope="module")
def scored(sample):
    """The sample's val split with random logits: what counts here is which region is whose."""
    ds = sample.select(split="val")
    regions = from_boxes(ds, "data/refshapes/refshapes_dets_dict.json")
    generator = torch.Generator().manual_seed(0)
    names, group = np.unique(regions["image_id"], return_inverse=True)
    slot = torch.tensor(ds.expressions.groupby("image_id").cumcount().to_numpy())
    query = torch.randn(len(regions), int(slot.max()) + 1, generator=generator)
    in_use = torch.tensor(ds.expressions.groupby("image_id").size().loc[names].to_numpy())
    query[torch.arange(query.shape[1])[None] >= in_use[group][:, None]] = torch.nan
    expression_group = torch.tensor(np.searchsorted(names, ds.expressions["image_id"]))
    logits = SimpleNamespace(query=query, aux=torch.randn(len(regions), 5, generator=generator), group=torch.tensor(group),
                             expression_group=expression_group, expression_slot=slot)  # fmt: skip
    return ds, regions, logits


def test_predictions_against_a_loop_over_expressions(scored):
    ds, regions, logits = scored
    frame = evaluation.rec_predictions(ds, regions, logits, ["clip", "subtraction"])
    assert len(frame) == 2 * len(ds.expressions) and frame["sent_id"].iloc[: len(ds.expressions)].tolist() == list(
        ds.expressions.index
    )
    bias = logits.aux.double().mean(1)
    for method, scores in (("clip", logits.query.double()), ("subtraction", logits.query.double() - bias[:, None])):
        part = frame[frame["method"] == method].set_index("sent_id")
        seen = dict.fromkeys(ds.images.index, 0)
        for sent_id, expression in ds.expressions.iterrows():
            rows = np.flatnonzero(regions["image_id"] == expression["image_id"])
            column = seen[expression["image_id"]]
            seen[expression["image_id"]] += 1
            best = rows[int(np.argmax([float(scores[row, column]) for row in rows]))]
            found = part.loc[sent_id]
            assert found["region"] == best and found["image_id"] == expression["image_id"]
            assert found[["x", "y", "w", "h"]].tolist() == regions.loc[best, ["x", "y", "w", "h"]].tolist()
            truth = ds.regions.loc[expression["ann_id"], ["x", "y", "w", "h"]].to_numpy(float)
            iou = box_iou(regions.loc[[best], ["x", "y", "w", "h"]].to_numpy(), truth[None])[0]
            assert np.isclose(found["iou"], iou) and found["correct"] == (iou > 0.5)


def test_options_reach_their_method_and_unknown_methods_are_named(scored):
    ds, regions, logits = scored
    cold, hot = (
        evaluation.rec_predictions(ds, regions, logits, ["bsap"], {"bsap": {"temperature": t}}) for t in (0.01, 100.0)
    )
    assert (cold["region"] != hot["region"]).any()
    with pytest.raises(ValueError, match=r"clop.*clip, bsap"):
        evaluation.rec_predictions(ds, regions, logits, ["clop"])


def test_slices_partition_the_expressions(scored):
    ds, regions, logits = scored
    frame = evaluation.rec_predictions(ds, regions, logits, ["clip", "bsap"])
    slices = evaluation.rec_slices(ds, regions, frame, ["clip", "bsap"])
    assert (slices.groupby(["aspect", "method"])["n"].sum() == len(ds.expressions)).all()
    overall = 100 * frame[frame["method"] == "clip"]["correct"].mean()
    for _, part in slices[slices["method"] == "clip"].groupby("aspect"):
        assert np.isclose((part["accuracy"] * part["n"]).sum() / part["n"].sum(), overall, atol=0.02)
    assert (slices["ci_low"] <= slices["accuracy"]).all() and (slices["accuracy"] <= slices["ci_high"]).all()


def test_kinds_of_expression_as_the_generator_made_them():
    rng, wrong, seen = np.random.default_rng(0), 0, 0
    for seed in range(12):
        scene = refshapes.draw_scene(np.random.default_rng([21, seed]))
        for target in scene.objects:
            for kind in ("attributes", "place", "relation"):
                text = refshapes.describe(scene, target, kind, rng)
                if text:
                    seen += 1
                    wrong += evaluation.expression_kind(pd.Series([text])).iloc[0] != kind
    assert seen > 50 and wrong == 0


def test_example_scenes_are_wins_and_losses(scored):
    ds, regions, logits = scored
    frame = evaluation.rec_predictions(ds, regions, logits, ["clip", "bsap"])
    scenes = evaluation.example_scenes(ds, frame, "bsap", each=4, seed=1)
    assert scenes["outcome"].tolist() == ["win"] * 4 + ["loss"] * 4
    for _, scene in scenes.iterrows():
        right = {m: box_iou(np.array([scene[m]]), np.array([scene["truth"]]))[0] > 0.5 for m in ("clip", "bsap")}
        assert right == {"bsap": scene["outcome"] == "win", "clip": scene["outcome"] == "loss"}
    itself = evaluation.example_scenes(ds, frame, "clip")
    assert len(itself) == 6 and set(itself["outcome"]) <= {"both right", "both wrong"}
