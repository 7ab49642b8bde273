"""Picks and tables against slow versions, the first edition's table of the sample, and cases counted by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsap_utils.evaluation import expression_kind, pick, rec_table, ris_table
from bsap_utils.regions import Pairs
from bsap_utils.stats import cluster_bootstrap, holm, sign_flip_p


def case(seed=0, images=30, most=6, masks=False):
    """Random pairs of ragged images and expressions, rows by expression and candidate, and two methods' scores."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), generator.integers(1, most, images))
    asked = np.repeat(np.arange(images), generator.integers(1, 5, images))
    expression, candidate = np.nonzero(asked[:, None] == image)
    union = generator.integers(50, 100, len(expression))
    shared = (union * generator.random(len(expression))).astype(int)
    columns = [expression, candidate, asked[expression], shared / union] + [shared, union] * masks
    scores = {"clip": torch.tensor(generator.normal(0, 1, len(expression)))}
    scores["bsap"] = scores["clip"] + torch.tensor(2 * shared / union)
    return Pairs(*map(torch.tensor, columns)), scores


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.sampled_from([2, 1000]))
def test_the_first_of_the_highest_is_picked(seed, steps):
    pairs, scores = case(seed)
    s = (scores["clip"] * steps).round()
    expected = []
    for one in pairs.expression.unique():
        rows = torch.nonzero(pairs.expression == one)[:, 0].tolist()
        expected.append(max(rows, key=lambda row: (s[row], -row)))
    assert pick(pairs, s).tolist() == expected
    assert pick(pairs, s.float()).tolist() == expected


def test_many_settings_are_picked_at_once():
    pairs, scores = case()
    many = torch.stack([*scores.values(), torch.zeros(len(pairs))], 1)
    assert pick(pairs, many).T.tolist() == [pick(pairs, one).tolist() for one in many.T]


def test_scores_that_are_not_one_number_a_pair_are_refused():
    pairs, scores = case()
    for wrong in (
        scores["clip"][:-1],
        scores["clip"].where(pairs.expression > 0, math.nan),
        torch.zeros(2, len(pairs)),
    ):
        with pytest.raises(ValueError, match="one number a pair is needed"):
            pick(pairs, wrong)


def test_the_rec_table_is_counted_by_hand():
    pairs, scores = case(1)
    table = rec_table(pairs, scores, split="val", visual_prompts="crop+blur")
    hits, images = [], []
    for one in pairs.expression.unique():
        rows = torch.nonzero(pairs.expression == one)[:, 0]
        images.append(int(pairs.image[rows[0]]))
        hits.append([bool(pairs.iou[rows[scores[name][rows].argmax()]] > 0.5) for name in scores])
    hits, images = np.array(hits, float), np.array(images)
    delta = hits - hits[:, :1]
    (low, high), (d_low, d_high) = (cluster_bootstrap(part, images) for part in (hits, delta))
    p = sign_flip_p(delta, images)
    for i, row in table.iterrows():
        expected = [hits[:, i].mean(), low[i], high[i], delta[:, i].mean(), d_low[i], d_high[i]]
        got = row[["accuracy", "ci_low", "ci_high", "delta_vs_clip", "delta_ci_low", "delta_ci_high"]].to_numpy(float)
        np.testing.assert_allclose(got, 100 * np.array(expected), atol=0.00501)
        assert row["p_value"] == pytest.approx(p[i], abs=1e-4)
    assert table["split"].tolist() == ["val", "val"] and table["visual_prompts"].iloc[0] == "crop+blur"
    assert table["p_holm"].iloc[1] == pytest.approx(holm(p[1:])[0], abs=1e-4) and table["delta_vs_clip"].iloc[0] == 0
    assert list(table)[:2] == ["split", "visual_prompts"] and table["n"].eq(len(hits)).all()


def test_the_first_method_is_the_reference_whatever_its_name():
    pairs, scores = case(2)
    there, back = rec_table(pairs, scores), rec_table(pairs, dict(reversed(scores.items())))
    assert there["delta_vs_clip"].iloc[1] == -back["delta_vs_clip"].iloc[1] != 0
    assert back["method"].tolist() == ["bsap", "clip"]


def test_iou_of_exactly_the_threshold_is_wrong_for_boxes_and_right_for_masks():
    pairs = Pairs(*map(torch.tensor, ([0], [0], [0], [0.5], [5], [10])))
    scores = {"clip": torch.zeros(1)}
    assert rec_table(pairs, scores)["accuracy"].item() == 0
    assert ris_table(pairs, scores)["p50"].tolist() == [100, 100]


def test_the_ris_table_is_counted_by_hand():
    pairs, scores = case(3, masks=True)
    table = ris_table(pairs, scores, split="val").set_index("method")
    assert list(table.index) == ["clip", "bsap", "oracle"]
    picked = {name: pick(pairs, s) for name, s in scores.items()} | {"oracle": pick(pairs, pairs.iou)}
    for name, rows in picked.items():
        iou, shared, union = (x[rows].double().numpy() for x in (pairs.iou, pairs.intersection, pairs.union))
        assert table.at[name, "oiou"] == pytest.approx(100 * shared.sum() / union.sum(), abs=0.006)
        assert table.at[name, "miou"] == pytest.approx(100 * iou.mean(), abs=0.006)
        for t in (50, 60, 70, 80, 90):
            assert table.at[name, f"p{t}"] == pytest.approx(100 * (iou >= t / 100).mean(), abs=0.006)
        assert table.at[name, "miou_low"] < table.at[name, "miou"] < table.at[name, "miou_high"]
    for measure in ("oiou", "miou"):
        assert table[f"delta_{measure}_vs_clip"].tolist() == pytest.approx((table[measure] - table.at["clip", measure]).tolist(),
                                                                           abs=0.011)  # fmt: skip
        assert (table[f"delta_{measure}_low"] <= table[f"delta_{measure}_vs_clip"]).all()
    alike = {"clip": scores["clip"], "other": scores["clip"].flip(0)}
    iou = np.stack([pairs.iou[pick(pairs, s)].numpy() for s in alike.values()], 1)
    p = sign_flip_p(iou - iou[:, :1], pairs.image[picked["clip"]].numpy(), seed=1)
    assert ris_table(pairs, alike, 1)["p_value"].tolist()[:2] == p.round(4).tolist() and 0.05 < p[1] < 0.95
    assert not any(name.startswith("delta_p") for name in table)
    assert np.isnan(table.at["oracle", "p_holm"]) and (table.loc["oracle", "miou"] >= table["miou"]).all()
    with pytest.raises(ValueError, match="masks=True"):
        ris_table(case(3)[0], scores)


def test_tables_keep_their_columns():
    committed = {name: pd.read_csv(f"figures/sample/table_{name}.csv", nrows=1) for name in ("rec", "ris")}
    setting = {name: "x" for name in committed["rec"].columns[: committed["rec"].columns.get_loc("method")]}
    pairs, scores = case(4, masks=True)
    for name, table in (("rec", rec_table), ("ris", ris_table)):
        got = list(table(pairs, scores, **setting))
        assert [column for column in got if column in committed[name]] == [c for c in committed[name] if c in got]
        assert set(committed[name]) - set(got) == set()
        assert "p_holm" in got


def test_one_image_has_no_intervals_and_no_errors():
    pairs, scores = case(5, images=1, masks=True)
    rec, ris = rec_table(pairs, scores), ris_table(pairs, scores)
    assert rec[["ci_low", "ci_high", "delta_ci_low", "delta_ci_high"]].isna().all(axis=None)
    assert rec["accuracy"].notna().all() and ris["oiou"].notna().all() and ris["oiou_low"].isna().all()


def test_empty_masks_have_no_overlap_and_no_error():
    pairs = Pairs(*map(torch.tensor, ([0, 1], [0, 1], [0, 1], [0.0, 0.0], [0, 0], [0, 0])))
    table = ris_table(pairs, {"clip": torch.zeros(2)})
    assert table["oiou"].tolist() == [0, 0] and table["oiou_low"].tolist() == [0, 0]


def test_slices_are_tables_of_their_expressions():
    pairs, scores = case(7, images=60)
    image_of = [int(pairs.image[pairs.expression == e][0]) for e in pairs.expression.unique()]
    parity = np.where(np.array(image_of) % 2, "odd", "even")
    group = pd.Series(pd.Categorical(parity, ["odd", "neither", "even"]), name="parity")
    table = rec_table(pairs, scores, by=group)
    assert table["parity"].drop_duplicates().tolist() == ["odd", "even"]  # the order of the categories
    assert table.index.equals(pd.RangeIndex(4))
    for (name, method), row in table.set_index(["parity", "method"]).iterrows():
        inside = torch.tensor((group == name).to_numpy())[pairs.expression]
        number = pairs.expression[inside].unique(return_inverse=True)[1]
        own = Pairs(number, *(x[inside] for x in (pairs.candidate, pairs.image, pairs.iou)))
        whole = rec_table(own, {key: s[inside] for key, s in scores.items()}).set_index("method").loc[method]
        assert row["n"] == whole["n"] and row["accuracy"] == whole["accuracy"]
        assert row["ci_low"] == pytest.approx(whole["ci_low"], abs=2) and row["delta_vs_clip"] == whole["delta_vs_clip"]


def test_slices_are_refused_for_other_expressions_and_without_a_value_left_out():
    pairs, scores = case(7, images=20)
    count = int(pairs.expression.max()) + 1
    with pytest.raises(ValueError, match=f"{count - 1} values of part, of {count} expressions"):
        rec_table(pairs, scores, by=pd.Series(["a"] * (count - 1), name="part"))
    part = pd.Series(["b", None, *["a", None] * count], name=0)[:count]  # in the order in which they come
    assert rec_table(pairs, scores, by=part)[[0, "n"]].drop_duplicates().to_numpy().tolist() == [
        ["b", 1], ["a", (count - 1) // 2]
    ]  # fmt: skip


def test_kinds_of_expressions():
    kinds = {
        "key above the red house": "relation", "Man to the left of dog": "relation", "Behind it": "relation",
        "left mug": "place", "second from left": "place", "Top shelf": "place",
        "striped fish": "attributes", "topaz": "attributes", "bright thunder": "attributes", "underwear": "attributes",
    }  # fmt: skip
    assert expression_kind(pd.Series([*kinds])).tolist() == [*kinds.values()]


def test_slices_of_the_sample_are_thirds_of_it(sample):
    """As notebook 03 makes them."""
    table = pd.read_csv("figures/sample/table_rec_slices.csv")
    expressions = len(sample.select(split="test").expressions)
    assert table.groupby(["aspect", "method"])["n"].sum().eq(expressions).all()
    assert table["slice"][:6:2].tolist() == ["attributes", "place", "relation"]
    assert table["slice"].tolist()[-6::2] == ["small", "medium", "large"]
    of_size = table.loc[table["aspect"] == "size of the region", "n"]
    assert of_size.between(0.3 * expressions, 0.37 * expressions).all()
    ranges = table["slice"][table["aspect"] == "candidates in the image"].drop_duplicates()
    assert ranges.str.split("–").explode().astype(int).is_monotonic_increasing
