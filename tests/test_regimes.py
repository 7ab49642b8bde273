"""Notebook 05: the table of regimes, what of it needs labels, and data sets without a train split."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from test_real_scores import run_cells

import bsap_utils
from bsap_utils import regions
from bsap_utils.datasets import XYWH

QUICK = {"LIMIT": 12, "OTHER_TEMPLATES": ["a photo of the {}."], "BANKS": ["categories", "expressions"], "OTHER_PROMPTS": [],
         "TEMPERATURES": [1.0, 5.0, float("inf")], "OTHER_PROPOSALS": ["gt"], "DRAWS": 2, "TEXTS": 40,
         "MODEL": ["local-dir:data/clip-refshapes"], "CLIPS": []}  # fmt: skip
WAYS = ["bsap", "calibrated", "calibrated_5", "half", "texts", "hubness", "both", "choice"]
LABEL_FREE = ["clip", "proposals", "bank", "template", "region_share", "agreement", "weight"]


def run(folder, **parameters):
    names = run_cells("05_when", **QUICK | parameters, OUT_DIR=str(folder))
    return pd.read_csv(folder / "table_regimes.csv"), names


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "out"
    return *run(folder), folder


def test_a_row_a_regime_with_an_interval_for_each_gain(plain):
    table, _, folder = plain
    gains = [f"gain_{way}{end}" for way in WAYS for end in ("", "_ci_low", "_ci_high")]
    assert list(table) == [*LABEL_FREE, "clip_accuracy", *gains, "gain_hindsight"]
    assert len(table) == 2 * 2 * 2 and not table.isna().any().any()
    assert set(table["proposals"]) == {"detections", "gt"} and table["region_share"].between(0, 1).all()
    for way in WAYS:
        inside = (table[f"gain_{way}_ci_low"] <= table[f"gain_{way}"]) & (
            table[f"gain_{way}"] <= table[f"gain_{way}_ci_high"]
        )
        assert inside.all()
    assert (table["gain_hindsight"] >= table[["gain_bsap", "gain_choice"]].max(axis=1) - 1e-3).all()
    names = {path.stem for path in folder.glob("fig_*.png")}
    assert {"fig_regimes", "fig_kinds", "fig_bank_temperature", "fig_bank_size", "fig_weight", "fig_chosen"} <= names


def test_gains_are_those_of_a_slow_computation(plain):
    """One regime by hand: w* from NumPy's least squares within images, picks one expression after another."""
    table, names, _ = plain
    case = names["case_of"](split="test", bank="expressions")
    s, a, u = (one.double().numpy() for one in (case.s, case.a, case.u))
    pooled, image = np.log(np.exp(a - a.max()).mean(1)) + a.max(), case.image.numpy()
    x, y = (values - pd.Series(values).groupby(image).transform("mean").to_numpy() for values in (pooled, u.mean(1)))
    w = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    rows = pd.DataFrame(
        {"expression": case.pairs.expression, "candidate": case.pairs.candidate, "s": s, "iou": case.pairs.iou}
    )

    def accuracy(weight):
        scores = rows["s"] - weight * pooled[rows["candidate"]]
        return 100 * np.mean(
            [rows["iou"][scores[part].idxmax()] > 0.5 for part in rows.groupby("expression").groups.values()]
        )

    row = table[(table["bank"] == "expressions") & (table["proposals"] == "detections")].iloc[0]
    assert row["weight"] == pytest.approx(w, abs=1e-3)
    assert row["agreement"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, abs=1e-3)
    assert row["clip_accuracy"] == pytest.approx(accuracy(0), abs=1e-3)
    assert row["gain_bsap"] == pytest.approx(accuracy(1) - accuracy(0), abs=2e-3)
    assert row["gain_calibrated"] == pytest.approx(accuracy(w) - accuracy(0), abs=2e-3)
    assert row["gain_half"] == pytest.approx(accuracy(0.5) - accuracy(0), abs=2e-3)
    pooled = u.mean(1)  # no bank: the mean over the texts that the weight is measured on
    assert row["gain_texts"] == pytest.approx(accuracy(1) - accuracy(0), abs=2e-3)


def test_share_agreement_and_weight_need_no_labels(plain, tmp_path, monkeypatch):
    """With the targets of all expressions shuffled they stay to the last digit, and the choices they make too."""
    pair_up = regions.pair_up

    def shuffled(*arguments, **options):
        pairs = pair_up(*arguments, **options)
        order = torch.randperm(len(pairs.iou), generator=torch.Generator().manual_seed(1))
        return dataclasses.replace(pairs, iou=pairs.iou[order])

    monkeypatch.setattr(bsap_utils, "pair_up", shuffled)
    table, names = run(tmp_path / "out")
    assert not np.allclose(table["clip_accuracy"], plain[0]["clip_accuracy"], atol=1)
    pd.testing.assert_frame_equal(table[LABEL_FREE], plain[0][LABEL_FREE])
    ways = [one["ways_of"](one["case_of"](split="test"), (1.0, 1.0)) for one in (names, plain[1])]
    assert ways[0] == ways[1]


def test_the_weight_takes_harm_off_where_the_bank_knows_nothing(plain):
    """A bank that is noise has a weight near 0, so nothing is taken off; one that repeats the level has 1."""
    calibrated_weight, case = plain[1]["calibrated_weight"], plain[1]["case_of"]()
    noise = torch.randn(len(case.a), generator=torch.Generator().manual_seed(0))
    assert abs(calibrated_weight(10 * noise, case.u.mean(1), case.image)) < 0.05
    assert calibrated_weight(case.u.mean(1), case.u.mean(1), case.image) == pytest.approx(1)


def test_a_clip_that_has_learned_nothing_has_a_level_and_no_accuracy(plain):
    """Its scorer is not the model's, and choices stay near those of a random one."""
    control = pd.read_csv(plain[2] / "table_control.csv")
    assert (control["region_share"] > 0.3).all() and set(control["bank"]) == {"categories", "expressions"}
    assert control["accuracy"].max() < 40 < plain[0].loc[plain[0]["proposals"] == "detections", "clip_accuracy"].max()
    assert (control["delta_ci_low"] <= control["delta_vs_clip"]).all()


def test_03_and_00_with_one_candidate_an_image(tmp_path):
    """No thirds by the number of candidates, and a scene of one box."""
    whole = {"PROPOSALS": "whole", "LIMIT": 5, "OUT_DIR": str(tmp_path / "out")}
    run_cells("03_rec", **whole, SPLIT=["test"], METHODS=["clip", "bsap"])
    slices = pd.read_csv(tmp_path / "out/table_rec_slices.csv")
    assert set(slices["aspect"]) == {"kind of expression", "size of the region"} and slices["delta_vs_clip"].eq(0).all()
    assert run_cells("00_explore", **whole)["explorer"].scene(2).boxes.shape == (1, 4)


@pytest.fixture(scope="module")
def own_data(sample, tmp_path_factory):
    """A table of one's own: eight pictures of one split, no train split, no categories."""
    root = tmp_path_factory.mktemp("own")
    part = sample.select(split="test", limit=8)
    (root / "mine/images").mkdir(parents=True)
    for image_id in part.images.index:
        shutil.copy(part.image_path(image_id), root / "mine/images")
    rows = part.expressions.join(part.annotations[XYWH], on="ann_id").join(part.images["file_name"], on="image_id")
    rows[["file_name", *XYWH, "text"]].assign(split="mine").to_csv(root / "mine/expressions.csv", index=False)
    return root


def test_without_a_train_split_what_needs_one_is_left_out(own_data, tmp_path, capsys):
    parameters = {"DATASET": "mine", "DATA_ROOT": str(own_data), "CHOOSE_ON": "mine", "REPORT_ON": "mine",
                  "PROPOSALS": "gt", "OTHER_PROPOSALS": ["detections"], "LIMIT": 0}  # fmt: skip
    table, names = run(tmp_path / "out", **parameters, BANKS=["categories", "generic", "expressions"])
    assert set(table["bank"]) == {"generic"} and set(table["proposals"]) == {"gt"}
    assert set(names["unlabelled"]) <= set(pd.read_csv(own_data / "mine/expressions.csv")["text"].str.lower())
    printed = capsys.readouterr().out
    assert printed.count("Left out:") == 3 and "train" in printed and "categories" in printed
    assert table["weight"].notna().all()
