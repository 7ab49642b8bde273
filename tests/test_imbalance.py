"""Shares of variance, hubs and traits against slow versions and cases known beforehand."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom

from bsap_utils.imbalance import (
    GROUND,
    LOOSE,
    OBJECT,
    diagnosis,
    gini,
    hub_table,
    k_occurrence,
    region_share,
    region_traits,
    sums_of_squares,
)
from bsap_utils.normalization import pool
from bsap_utils.plotting import KIND_COLOURS


def scores(seed=0, candidates=60, texts=500, region=2.0, interaction=1.0):
    """Logits whose region share is region² / (region² + interaction²), over images of five, with levels of images and texts."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(candidates // 5), 5)
    logits = (
        generator.normal(0, region, (candidates, 1))
        + generator.normal(0, interaction, (candidates, texts))
        + generator.normal(0, 9, (candidates // 5, 1))[image]
        + generator.normal(0, 9, (1, texts))
    )
    return torch.tensor(logits), torch.tensor(image)


def test_the_region_share_is_that_of_competing_candidates():
    logits, image = scores(candidates=2000)
    assert region_share(logits, image) == pytest.approx(0.8, abs=0.02)
    parts = {"region": 0.0, "interaction": 0.0}
    small, group = scores(candidates=20, texts=7)
    small = small.float()  # summed up in float64
    for i in group.unique():
        own = small[group == i].double().numpy()
        own = own - own.mean(0)
        parts["region"] += 7 * (own.mean(1) ** 2).sum()
        parts["interaction"] += ((own - own.mean(1, keepdims=True)) ** 2).sum()
    assert region_share(small, group) == pytest.approx(parts["region"] / sum(parts.values()), rel=1e-12)
    assert np.isnan(region_share(small, torch.arange(20)))  # nobody competes


def test_the_parts_add_up_to_the_whole_also_in_blocks():
    logits, image = scores(candidates=50, texts=40)
    levels = pd.DataFrame(logits.numpy()).groupby(image.numpy()).transform("mean").to_numpy()  # of a text in its image
    sums = sums_of_squares(logits, image)
    assert sums.to_numpy().sum() == pytest.approx(np.square(logits.numpy() - levels).sum())
    wide = logits.repeat(1, 5000)  # 200,000 texts: several blocks
    pd.testing.assert_frame_equal(sums_of_squares(wide, image), 5000 * sums)


def test_the_diagnosis_finds_what_was_built_in():
    generator = np.random.default_rng(0)
    hub = generator.normal(0, 1, (500, 1))
    image = torch.tensor(np.repeat(np.arange(100), 5))
    logits = torch.tensor(hub + generator.normal(0, 1, (500, 300)))
    seen = torch.tensor(2 * hub + generator.normal(0, 0.1, (500, 30)))
    found = diagnosis(logits, seen, image, temperature=np.inf)
    assert found["region_share"] == pytest.approx(0.5, abs=0.05)
    assert found["agreement"] > 0.98 and found["weight"] == pytest.approx(0.5, abs=0.02)
    short = logits.float()
    assert diagnosis(short, seen, image).equals(diagnosis(short.double(), seen, image, temperature=1.0))
    blind = diagnosis(logits, torch.tensor(generator.normal(0, 1, (500, 30))), image)
    assert blind["agreement"] < 0.02 and abs(blind["weight"]) < 0.6
    x, y = pool(seen, np.inf).numpy().reshape(100, 5), logits.mean(1).numpy().reshape(100, 5)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    assert found["agreement"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1] ** 2)


def test_hubs_are_counted_and_compared():
    counts = k_occurrence(torch.eye(4) + torch.tensor([[5.0], [0.0], [0.0], [0.0]]), 2)
    assert counts.tolist() == [4, 2, 1, 1] or (counts.sum() == 8 and counts[0] == 4)
    even, hub = np.full(40, 2), np.r_[np.full(8, 10), np.zeros(32)]
    pairwise = np.abs(hub[:, None] - hub).sum() / (2 * 40 * hub.sum())
    assert gini(np.stack([even, hub])) == pytest.approx([0, pairwise])
    table = hub_table(pd.DataFrame({"clip": hub, "bsap": even}), np.arange(40) // 2, draws=200).set_index(
        ["method", "measure"]
    )
    assert table.loc[("clip", "never"), "value"] == 0.8
    assert table.loc[("bsap", "gini"), "delta_vs_clip"] == pytest.approx(-pairwise)
    assert table.loc[("bsap", "gini"), "delta_ci_high"] < 0
    assert (table["ci_low"].dropna() <= table["value"][table["ci_low"].notna()] + 1e-9).all()
    never = hub_table(pd.DataFrame({"clip": [*hub, *hub, *hub[-20:]]}), np.arange(100)).loc[2]
    assert never[["ci_low", "ci_high"]].tolist() == pytest.approx(binom.ppf([0.025, 0.975], 100, 0.84) / 100)
    alone = hub_table(pd.DataFrame({"clip": hub}), np.zeros(40))
    assert alone[["ci_low", "ci_high"]].isna().all(axis=None)


def test_bare_ground_touches_no_object(sample_val):
    val = sample_val.select(limit=3)
    image_id = val.images.index[0]
    objects = val.annotations[val.annotations["image_id"] == image_id]
    x, y, w, h = objects[["x", "y", "w", "h"]].iloc[0]
    boxes = [(x, y, w, h), (x, y, w, 0.45 * h), (x, y, w, 0.12 * h), (0.0, 0.0, 3.0, 3.0), (x, y, w, h)]
    others = val.images.index[val.images.index != image_id]
    candidates = pd.DataFrame(boxes, columns=["x", "y", "w", "h"]).assign(image_id=[*[image_id] * 4, others[0]])
    crowds = val.annotations.assign(iscrowd=(val.annotations["image_id"] == others[0]).astype(int))  # no objects
    traits = region_traits(dataclasses.replace(val, annotations=crowds), candidates)
    assert traits["kind"].tolist() == [OBJECT, LOOSE, LOOSE, GROUND, GROUND] and {*traits["kind"]} == {*KIND_COLOURS}
    assert traits["category"].iloc[0] == objects["category"].iloc[0] and traits["category"].iloc[1:].isna().all()
    assert traits["framing"].tolist() == pytest.approx([1, 0.45, 0.12, 0, 0])
