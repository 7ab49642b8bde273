"""Segmentation metrics against dense arrays, their intervals against a slow bootstrap, and what is said of them."""

import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from bsap_utils import ROOT, plotting
from bsap_utils.datasets import DatasetError, ReferDataset
from bsap_utils.evaluation import (
    RIS_THRESHOLDS,
    cluster_bootstrap,
    mask_overlaps,
    precision_curve,
    rec_predictions,
    ris_predictions,
    ris_scenes,
    ris_table,
)
from bsap_utils.proposals import from_boxes, from_masks, ground_truth
from bsap_utils.readings import ris_conclusion, ris_reading
from bsap_utils.scoring import ReferLogits

HEIGHT, WIDTH = 12, 15
SETTING = dict(
    dataset="toy", split="val", proposals="masks", model="m", pretrained="p", visual_prompts=("a", "b"), aux_bank="x"
)


def rle(mask):
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def random_mask(rng):
    """Empty, full, a box, or noise."""
    kind = rng.integers(5)
    mask = np.full((HEIGHT, WIDTH), kind == 1)
    if kind >= 2:
        y, x = rng.integers(0, 8, 2)
        mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = True
    return mask & (rng.random(mask.shape) < 0.6) if kind == 4 else mask


def world(rng, images=4):
    """A data set, its candidates, and all masks as dense arrays."""
    ids = rng.permutation(50)[:images]
    frame = pd.DataFrame({"file_name": "x.jpg", "width": WIDTH, "height": HEIGHT}, index=pd.Index(ids, name="image_id"))
    truth, candidates = [], []
    for image_id in ids:
        truth += [(image_id, random_mask(rng)) for _ in range(rng.integers(1, 4))]
        candidates += [(image_id, random_mask(rng)) for _ in range(rng.integers(1, 6))]

    def to_frame(masks):
        segmentation = pd.Series([rle(mask) for _, mask in masks], dtype=object)
        return pd.DataFrame(
            {"image_id": [i for i, _ in masks], "x": 0.0, "y": 0.0, "w": 1.0, "h": 1.0, "segmentation": segmentation}
        )

    regions = to_frame(candidates)
    regions = regions.assign(position=range(len(regions))).sort_values("image_id", kind="stable", ignore_index=True)
    dense = [candidates[i][1] for i in regions.pop("position")]
    anns = to_frame(truth).assign(category="c", area=1.0, iscrowd=0)
    anns.index = pd.Index(rng.permutation(2**40 + np.arange(len(anns))), name="ann_id")
    meant = rng.integers(0, len(anns), rng.integers(3, 12))
    expressions = pd.DataFrame(
        {
            "ref_id": 0,
            "ann_id": anns.index[meant],
            "image_id": anns["image_id"].to_numpy()[meant],
            "split": "val",
            "text": "it",
        },
        index=pd.Index(rng.permutation(1000)[: len(meant)], name="sent_id"),
    )
    ds = ReferDataset("toy", "unc", Path("nowhere"), frame, anns, expressions, {})
    return ds, regions, dict(zip(anns.index, [mask for _, mask in truth], strict=True)), dense


def random_logits(ds, regions, rng, aux=4):
    names, group = np.unique(regions["image_id"], return_inverse=True)
    expression_group = np.searchsorted(names, ds.expressions["image_id"])
    slot = ds.expressions.groupby("image_id").cumcount().to_numpy()
    query = np.full((len(regions), slot.max() + 1), np.nan, dtype=np.float32)
    for g, j in zip(expression_group, slot, strict=True):
        query[group == g, j] = 5 * rng.standard_normal((group == g).sum())
    parts = (
        query,
        5 * rng.standard_normal((len(regions), aux)).astype(np.float32),
        group,
        expression_group,
        slot.copy(),
    )
    return ReferLogits(*map(torch.tensor, parts))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_overlaps_against_dense_masks(seed):
    ds, regions, truth, dense = world(np.random.default_rng(seed))
    table = mask_overlaps(ds, regions)
    assert table.dtypes.map(lambda t: t.kind).tolist() == ["i"] * 4 + ["f"]
    expected = {
        (ann_id, row): ((truth[ann_id] & mask).sum(), (truth[ann_id] | mask).sum())
        for ann_id in ds.expressions["ann_id"].unique()
        for row, mask in enumerate(dense)
        if regions["image_id"][row] == ds.regions["image_id"][ann_id]
    }
    found = {(r.ann_id, r.region): (r.intersection, r.union) for r in table.itertuples()}
    assert found == expected and len(table) == len(expected)
    iou = [i / u if u else 0 for i, u in found.values()]
    np.testing.assert_allclose(table["iou"], iou, atol=1e-12)


def test_the_conventions_of_empty_and_full_masks():
    empty, full = np.zeros((HEIGHT, WIDTH), bool), np.ones((HEIGHT, WIDTH), bool)
    ds, regions, _, _ = world(np.random.default_rng(0), images=1)
    image_id = ds.images.index[0]
    anns = pd.DataFrame({"image_id": image_id, "segmentation": pd.Series([rle(empty), rle(full)], dtype=object)})
    expressions = ds.expressions.iloc[:2].assign(ann_id=[0, 1])
    ds = dataclasses.replace(ds, regions=anns, expressions=expressions)
    masks = pd.Series([rle(empty), rle(full), None], dtype=object)
    regions = pd.DataFrame({"image_id": image_id, "x": 0.0, "y": 0.0, "w": WIDTH, "h": HEIGHT, "segmentation": masks})
    table = mask_overlaps(ds, regions).set_index(["ann_id", "region"])
    assert table.loc[(0, 0)].tolist() == [0, 0, 0], "empty against empty has IoU 0"
    assert table.loc[(0, 1)].tolist() == [0, 180, 0] and table.loc[(1, 0)].tolist() == [0, 180, 0]
    assert table.loc[(1, 1)].tolist() == [180, 180, 1] and table.loc[(1, 2)].tolist() == [180, 180, 1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_the_table_against_dense_masks(seed):
    rng = np.random.default_rng(seed)
    ds, regions, truth, dense = world(rng)
    methods = ["clip", "bsap", "nnn"]
    logits = random_logits(ds, regions, rng)
    picks = ris_predictions(ds, regions, logits, methods, {"bsap": {"temperature": 2.0}})
    table = ris_table(picks, **SETTING, resamples=50).set_index("method")
    assert list(table.index) == [*methods, "oracle"] and set(table["n"]) == {len(ds.expressions)}
    rec = rec_predictions(ds, regions, logits, methods, {"bsap": {"temperature": 2.0}})
    assert picks.loc[picks["method"] != "oracle", "region"].tolist() == rec["region"].tolist()
    for method in table.index:
        inter, union, iou = [], [], []
        for sent_id, ann_id in ds.expressions["ann_id"].items():
            here = np.flatnonzero(regions["image_id"] == ds.expressions["image_id"][sent_id])
            scores = {r: ((truth[ann_id] & dense[r]).sum(), (truth[ann_id] | dense[r]).sum()) for r in here}
            one = {r: i / u if u else 0.0 for r, (i, u) in scores.items()}
            if method == "oracle":
                chosen = next(r for r in here if one[r] == max(one.values()))  # the first of equals
            else:
                chosen = rec.set_index(["method", "sent_id"]).loc[(method, sent_id), "region"]
            inter.append(scores[chosen][0])
            union.append(scores[chosen][1])
            iou.append(one[chosen])
        assert table.at[method, "oiou"] == pytest.approx(100 * sum(inter) / max(sum(union), 1), abs=0.006)
        assert table.at[method, "miou"] == pytest.approx(100 * np.mean(iou), abs=0.006)
        for threshold in RIS_THRESHOLDS:
            share = 100 * np.mean(np.array(iou) >= threshold)
            assert table.at[method, f"p{round(100 * threshold)}"] == pytest.approx(share, abs=0.006)
        assert table.at[method, "delta_miou_vs_clip"] == pytest.approx(
            table.at[method, "miou"] - table.at["clip", "miou"], abs=0.011
        )
    assert (table["miou"] <= table.at["oracle", "miou"]).all()


def toy_predictions(rng, images=30):
    rows = []
    for sent_id in range(4 * images):
        image_id, union = sent_id // 4, int(rng.integers(50, 5000))
        for method, quality in (("clip", 0.5), ("bsap", 0.6), ("oracle", 0.9)):
            intersection = int(union * rng.beta(4 * quality, 4 * (1 - quality)))
            rows.append([sent_id, image_id, method, intersection, union, intersection / union])
    frame = pd.DataFrame(rows, columns=["sent_id", "image_id", "method", "intersection", "union", "iou"])
    return frame.assign(correct=frame["iou"] >= 0.5)


def test_intervals_against_a_slow_bootstrap():
    """Both the ratio and the difference of two ratios, whose denominators differ, must be those of each resample."""
    rng = np.random.default_rng(1)
    picks = toy_predictions(rng)
    picks.loc[picks["method"] == "bsap", "union"] *= 2
    table = ris_table(picks, **SETTING, resamples=4000).set_index("method")
    wide = picks.pivot(index=["image_id", "sent_id"], columns="method", values=["intersection", "union", "iou"])
    sums = {
        name: wide[name].groupby("image_id").sum()[["clip", "bsap"]].to_numpy()
        for name in ("intersection", "union", "iou")
    }
    ratios, deltas, means = [], [], []
    for _ in range(4000):
        drawn = rng.integers(30, size=30)
        intersection, union, iou = (sums[name][drawn].sum(0) for name in ("intersection", "union", "iou"))
        ratios.append(100 * intersection[1] / union[1])
        deltas.append(100 * (intersection[1] / union[1] - intersection[0] / union[0]))
        means.append(100 * (iou[1] - iou[0]) / len(wide))
    for column, values in (("oiou", ratios), ("delta_oiou", deltas), ("delta_miou", means)):
        low, high = np.quantile(values, [0.025, 0.975])
        assert table.at["bsap", f"{column}_low"] == pytest.approx(low, abs=0.4)
        assert table.at["bsap", f"{column}_high"] == pytest.approx(high, abs=0.4)
    assert (table.loc["clip", ["delta_oiou_low", "delta_oiou_high", "delta_miou_low"]] == 0).all()
    assert table.at["bsap", "delta_oiou_vs_clip"] < 0 < table.at["bsap", "delta_miou_vs_clip"]
    assert table["visual_prompts"].unique().tolist() == ["a+b"]


def test_reference_takes_one_column_from_all():
    values, below = np.array([[3.0, 1], [4, 2], [0, 5]]), np.array([[4.0, 4], [4, 4], [9, 5]])
    plain = cluster_bootstrap(values, np.arange(3), below, resamples=500)
    low, high = cluster_bootstrap(values, np.arange(3), below, resamples=500, reference=0)
    assert low[0] == high[0] == 0 and low[1] < 0 < high[1] and not np.allclose(high[1], plain[1][1] - plain[1][0])


def test_a_table_without_clip_and_one_image():
    picks = toy_predictions(np.random.default_rng(2), images=1).query("method != 'clip'")
    table = ris_table(picks, **SETTING)
    assert table["delta_oiou_vs_clip"].isna().all() and table["oiou_low"].isna().all() and table["oiou"].notna().all()


def test_predictions_that_lack_something():
    picks = toy_predictions(np.random.default_rng(3), images=3)
    with pytest.raises(ValueError, match="bsap lacks 1"):
        ris_table(picks.drop(index=picks.index[picks["method"] == "bsap"][0]), **SETTING)
    with pytest.raises(ValueError, match="missing entries in intersection, union or iou"):
        ris_table(picks.assign(union=picks["union"].where(picks.index != 4)), **SETTING)


def test_candidates_without_masks(sample):
    val = sample.select(split="val", limit=3)
    boxes = from_boxes(val, ROOT / "data/refshapes/refshapes_dets_dict.json")
    with pytest.raises(DatasetError, match="are boxes, but segmentation needs masks"):
        mask_overlaps(val, boxes)
    with pytest.raises(DatasetError, match=rf"{len(boxes)} of {len(boxes)} candidates are boxes"):
        mask_overlaps(val, boxes.assign(segmentation=None))
    wrong = ground_truth(val)
    wrong.at[2, "segmentation"] = {"size": [1, 1], "counts": [1]}
    with pytest.raises(DatasetError, match=rf"Image {wrong.at[2, 'image_id']}: .*size \[1, 1\]"):
        mask_overlaps(val, wrong)


def test_true_masks_are_found_exactly(sample):
    """With the truth among the candidates the oracle is perfect, and the precision curve is 100 % everywhere."""
    val = sample.select(split="val", limit=15)
    regions = ground_truth(val)
    picks = ris_predictions(val, regions, random_logits(val, regions, np.random.default_rng(0)), ["clip", "bsap"])
    table = ris_table(picks, **SETTING, resamples=100).set_index("method")
    assert (table.loc["oracle", ["oiou", "miou", "p50", "p90", "miou_low"]] == 100).all()
    curve = precision_curve(picks, ["clip", "oracle"]).pivot(index="threshold", columns="method", values="precision")
    assert (curve["oracle"] == 100).all() and curve.loc[0.5, "clip"] == table.at["clip", "p50"]
    assert curve.loc[0.9, "clip"] == table.at["clip", "p90"] and (np.diff(curve["clip"]) <= 0).all()


def test_scenes_and_figures(sample):
    val = sample.select(split="val", limit=30)
    regions = from_masks(val, ROOT / "data/refshapes/refshapes_masks.json")
    picks = ris_predictions(val, regions, random_logits(val, regions, np.random.default_rng(0)), ["clip", "bsap"])
    scenes = ris_scenes(val, regions, picks, "bsap", each=2)
    assert scenes["outcome"].tolist() == ["win"] * 2 + ["loss"] * 2
    win = scenes["outcome"] == "win"
    assert ((scenes["bsap_iou"] >= 0.5) == win).all() and ((scenes["clip_iou"] >= 0.5) == ~win).all()
    for scene in scenes.itertuples():
        assert coco.iou([scene.bsap], [scene.truth], [0])[0, 0] == pytest.approx(scene.bsap_iou)
    pd.testing.assert_frame_equal(scenes, ris_scenes(val, regions, picks, "bsap", each=2))
    figure = plotting.mask_panel(val, scenes)
    assert [axis.get_title() for axis in figure.axes[:4]] and len([t for a in figure.axes for t in a.texts]) == 3 * 4
    table = ris_table(picks, **SETTING, resamples=50)
    bars = plotting.ris_bars(table, "title")
    for axis, measure in zip(bars.axes, ("oiou", "miou"), strict=True):
        assert [patch.get_width() for patch in axis.patches][::-1] == pytest.approx(table[measure].tolist())
    iou = picks.pivot(index="sent_id", columns="method", values="iou")
    curves = plotting.iou_curves(precision_curve(picks, ["clip", "bsap", "oracle"]), iou["bsap"] - iou["clip"])
    said = f"BSAP better: {100 * (iou['bsap'] > iou['clip']).mean():.1f} %"
    assert said in [text.get_text() for text in curves.axes[1].texts]
    plt.close("all")


@pytest.mark.parametrize(
    ("low", "high", "oiou_word", "said"),
    [
        (1, 3, "more", "is higher than"),
        (-3, -1, "less", "is lower than"),
        (-1, 1, "cannot tell", "not told apart from"),
    ],
)
def test_what_is_said_follows_the_numbers(low, high, oiou_word, said):
    picks = toy_predictions(np.random.default_rng(4))
    table = ris_table(picks, **SETTING, resamples=50)
    bounds = {f"delta_{m}_{side}": value for m in ("oiou", "miou") for side, value in (("low", low), ("high", high))}
    table = table.assign(**bounds)
    text = ris_reading(table, picks, "bsap", "toy val")
    assert oiou_word in text and "toy val" in text and f"{table['oiou'][0]:.1f} %" in text
    both = pd.concat([table, table.assign(split="test")])
    concluded = ris_conclusion(both, "bsap", "toy")
    assert concluded.count(said) == 2 and "val and test" in concluded and "no claim" not in concluded
    assert "no claim about RefCOCO" in ris_conclusion(table, "bsap", "refshapes")
    mixed = pd.concat([table, table.assign(split="test", delta_miou_low=5, delta_miou_high=6)])
    assert "higher on test" in ris_conclusion(mixed, "bsap", "toy") or low > 0


def test_intersections_are_exact_for_large_masks():
    """They come from a ratio of doubles: 50 megapixels still round to the right pixel."""
    height, width = 5000, 10_000
    ds, regions, _, _ = world(np.random.default_rng(0), images=1)
    image_id = ds.images.index[0]

    def runs(*counts):
        return {"size": [height, width], "counts": [*counts, height * width - sum(counts)]}

    anns = pd.DataFrame({"image_id": image_id, "segmentation": pd.Series([runs(3, 40_000_001)], dtype=object)})
    images = ds.images.assign(width=width, height=height)
    ds = dataclasses.replace(ds, images=images, regions=anns, expressions=ds.expressions.iloc[:1].assign(ann_id=0))
    masks = pd.Series([runs(7, 39_999_989), runs(40_000_003, 5_000_000)], dtype=object)
    regions = pd.DataFrame({"image_id": image_id, "x": 0.0, "y": 0.0, "w": 1.0, "h": 1.0, "segmentation": masks})
    table = mask_overlaps(ds, regions)
    assert table["intersection"].tolist() == [39_999_989, 1] and table["union"].tolist() == [40_000_001, 45_000_000]
    assert math.isclose(table["iou"][0], 39_999_989 / 40_000_001)
