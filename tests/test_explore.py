"""The explorer: what it computes, what its controls do, and what it says to input that is wrong. tests/test_browser.py clicks."""

import datetime
import inspect
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import logsumexp

from bsap_utils import explore
from bsap_utils.aux_prompts import auxiliary_prompts
from bsap_utils.datasets import XYWH
from bsap_utils.evaluation import rec_predictions
from bsap_utils.normalization import METHODS, family
from bsap_utils.proposals import load_proposals
from bsap_utils.scoring import refer_logits


@pytest.fixture(scope="module")
def val(sample):
    return sample.select("val", limit=6)


@pytest.fixture(scope="module")
def regions(val):
    return load_proposals(val, "detections", "data/refshapes")


@pytest.fixture(scope="module")
def explorer(val, regions, scorer):
    return explore.Explorer(val, regions, [scorer])


@pytest.fixture
def page(explorer, sample, tmp_path):
    return explore.controls(explorer, sample, explore.Start(scene=6), tmp_path)


NOW = datetime.datetime.now(datetime.timezone.utc)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def upload(page, content):
    page.source.value = explore.OWN_PICTURE
    page.upload.value = [{"name": "a", "type": "", "size": len(content), "content": content, "last_modified": NOW}]


@pytest.mark.parametrize("method", METHODS)
def test_its_picks_are_those_of_the_evaluation(explorer, sample, val, regions, scorer, method):
    prompts = auxiliary_prompts("categories", sample)
    options = explore.options_of(method, scorer.logit_scale)
    logits = refer_logits([scorer], val, regions, prompts)
    evaluated = rec_predictions(val, regions, logits, [method], {method: options})
    for number, image_id in enumerate(val.images.index, 1):
        scene = explorer.scene(number)
        for row in evaluated[evaluated["image_id"] == image_id].itertuples():
            pick = explorer.table(scene, row.text, prompts, method, **options)["score"].argmax()
            assert scene.regions.index[pick] == row.region


def test_the_bias_is_what_the_family_subtracts(explorer, scorer):
    scene, prompts = explorer.scene(1), ["fish", "star", "red key"]
    features = scene.features[0].mean(0)
    aux = scorer.logits(features, scorer.encode_texts([f"a photo of {text}" for text in prompts])).double().numpy()
    for temperature in (0.5, 3.0):
        table = explorer.table(scene, "Red Fish", prompts, "family", weight=0.3, temperature=temperature, nearest=2)
        pool = temperature * (logsumexp(np.sort(aux)[:, 1:] / temperature, axis=1) - math.log(2))
        np.testing.assert_allclose(table["bias"], pool, atol=1e-4)
        np.testing.assert_allclose(table["score"], table["clip"] - 0.3 * table["bias"], atol=1e-4)
    np.testing.assert_allclose(
        explorer.table(scene, "red fish", prompts, "dn", weight=0.5)["bias"], aux.mean(1), atol=1e-4
    )


def test_each_picture_is_encoded_once(explorer, page, monkeypatch):
    def encoded_again(*_, **__):
        raise AssertionError("encoded again")

    page.scene.value = 1
    monkeypatch.setattr(type(explorer.scorers[0]), "encode_regions", encoded_again)
    page.scene.value = 6
    page.scene.value, page.temperature.value = 1, 7.0
    assert not page.message.value


def test_every_control_redraws_what_it_should(page):
    assert (
        page.text.value == "dotted apple"
        and "BSAP picks region 4, which is right: the pick changes" in page.summary.value
    )
    changes = [("temperature", 30.0), ("text", "blue leaf"), ("bank", "generic"), ("method", "family"), ("weight", 0.2),
               ("nearest", 2), ("bank", explore.OWN_PROMPTS), ("own", "leaf, moon"), ("scene", 2)]  # fmt: skip
    for name, value in changes:
        before = page.picture.value
        getattr(page, name).value = value
        assert page.picture.value != before and not page.message.value, name
    assert page.text.value == page.known.value == page.known.options[0]
    page.known.index = 1
    assert page.text.value == page.known.options[1] and "which is" in page.summary.value


def test_a_method_offers_its_own_options_with_their_defaults(page, explorer):
    places = {"temperature": page.temperature, "weight": page.weight, "k": page.nearest, "nearest": page.nearest}
    for method in [*METHODS, explore.FAMILY]:
        page.method.value = method
        options = explore.options_of(method, explorer.logit_scale)
        usable = {name for name, widget in places.items() if not widget.disabled}
        assert usable == ({"k", "nearest"} & usable) | set(options) and not page.message.value
        assert bool({"k", "nearest"} & usable) == bool({"k", "nearest"} & set(options))
        for name, value in options.items():
            assert places[name].value == pytest.approx(places[name].max if value is None else value)
    assert set(explore.options_of("nnn")) == {"k", "weight"}
    defaults = {name: p.default for name, p in inspect.signature(family).parameters.items() if p.default is not p.empty}
    assert explore.options_of(explore.FAMILY) == defaults


def test_the_start_is_what_the_parameters_say(explorer, sample, tmp_path):
    start = explore.Start(2, "Red  <b>fish $^$", "generic", "bsap_h", 4.0, 0.25)
    page = explore.controls(explorer, sample, start, tmp_path)
    values = page.scene.value, page.bank.value, page.method.value, page.weight.value
    assert values == (2, "generic", "bsap_h", 0.25) and page.temperature.value == pytest.approx(4.0)
    assert page.text.value == start.expression and not page.message.value and "not known" in page.summary.value
    page.save.click()
    assert {file.name for file in tmp_path.iterdir()} == {"fig_explore.png", "fig_explore.svg"}


@pytest.mark.parametrize(
    ("name", "value", "said"), [("text", "  ", "Type an expression"), ("own", " , ,", "at least one auxiliary prompt")]
)
def test_wrong_input_is_said_in_words_and_fades_the_picture(page, name, value, said):
    page.bank.value = explore.OWN_PROMPTS
    good = getattr(page, name).value
    getattr(page, name).value = value
    assert said in page.message.value and 'role="alert"' in page.message.value
    assert "opacity: 0.3" in page.picture.value and not page.summary.value
    getattr(page, name).value = good
    assert not page.message.value and "opacity: 1" in page.picture.value


def test_a_picture_of_ones_own(page, explorer):
    picture = Image.new("RGB", (90, 60), "navy")
    picture.paste("orange", (20, 15, 50, 45))
    upload(page, b"GIF89a no picture")
    assert "no picture that can be read" in page.message.value
    upload(page, png(picture)[:-30])
    assert "cannot be read" in page.message.value
    upload(page, png(picture))
    assert not page.message.value and "is not known" in page.summary.value
    proposed = explorer.own_scene(png(picture), "").regions[XYWH].to_numpy()
    assert [20, 15, 30, 30] in proposed.tolist()
    page.boxes.value = "0, 0, 9, 9\n\n1 2 x 4"
    assert "Line 3 of the boxes" in page.message.value
    page.boxes.value = "0, 0, 9, 9\n(90, 60, 5, 5)"
    assert "Line 2 of the boxes" in page.message.value and "90 × 60" in page.message.value
    page.boxes.value = "20, 15, 30, 30\n[0, 0, 200, 60]"
    assert not page.message.value
    boxes = explorer.own_scene(png(picture), page.boxes.value).regions[XYWH].to_numpy().tolist()
    assert boxes == [[20, 15, 30, 30], [0, 0, 90, 60]]


def test_own_pictures_have_the_features_of_the_same_scene(explorer, val):
    scene = explorer.scene(3)
    text = "\n".join(", ".join(map(str, box)) for box in scene.regions[XYWH].to_numpy().tolist())
    own = explorer.own_scene(png(scene.image), text)
    torch.testing.assert_close(own.features[0], scene.features[0])


def test_a_picture_without_segments_is_one_region_and_pictures_stand_upright():
    flat = Image.new("RGB", (50, 40), "gray")
    assert explore.propose(flat)[XYWH].to_numpy().tolist() == [[0, 0, 50, 40]]
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    buffer = io.BytesIO()
    flat.save(buffer, "jpeg", exif=exif)
    assert explore.read_picture(buffer.getvalue()).size == (40, 50)


@given(st.text(st.sampled_from("0123456789., -+einfa;()[]\n\t"), max_size=40))
def test_any_text_gives_boxes_inside_or_an_error_in_words(text):
    try:
        boxes = explore.read_boxes(text, (30, 20)).to_numpy()
    except ValueError as error:
        assert str(error).startswith("Line ")
    else:
        assert len(boxes) == sum(bool(line.strip()) for line in text.splitlines())
        assert np.isfinite(boxes).all() and (boxes[:, 2:] > 0).all()


def test_a_scene_that_is_not_there_is_said(explorer):
    for number in (0, 7):
        with pytest.raises(ValueError, match=f"no scene {number}: refshapes has the scenes 1 to 6"):
            explorer.scene(number)
    with pytest.raises(ValueError, match="Unknown method 'bsop'"):
        explore.options_of("bsop")


def test_no_front_end_no_widgets(explorer, sample, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(explore, "display", lambda *objects, **_: shown.extend(objects))
    monkeypatch.setattr(explore, "controls", None)
    assert not explore.somebody_is_there()
    explore.show(explorer, sample, explore.Start(), tmp_path)
    assert shown[0].data.startswith(b"\x89PNG") and shown[0].alt == explorer.summary == shown[1].data
