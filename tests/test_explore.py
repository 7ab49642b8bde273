"""The explorer: what it computes, what its controls do, and what it says to input that is wrong. test_browser.py clicks.

The controls are cells of notebook 00: these tests run them as they stand there, without a kernel.
"""

import datetime
import io

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp

from bsap_utils import ROOT, explore, scoring
from bsap_utils.aux_prompts import auxiliary_prompts, unlabelled_texts
from bsap_utils.datasets import XYWH
from bsap_utils.evaluation import pick
from bsap_utils.normalization import METHODS, calibrated_weight, pool
from bsap_utils.regions import box_iou

BOX = ["x", "y", "width", "height"]
NOW = datetime.datetime.now(datetime.timezone.utc)


def run_notebook(folder, **parameters):
    """Run the code cells of 00 with other parameters; return their names, and as `displayed` what they display."""
    few = {"LIMIT": 6, "SCENE": 3, "MODEL": "local-dir:data/clip-refshapes", "OUT_DIR": str(folder)}
    names, displayed = {}, []
    for cell in nbformat.read(ROOT / "notebooks/00_explore.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"cell {cell.id}", "exec"), names)
            names |= few | parameters if "parameters" in cell.metadata.get("tags", []) else {}
            names["display"] = lambda shown, display_id: displayed.append(shown)
    names["displayed"] = displayed
    return names


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return run_notebook(tmp_path_factory.mktemp("explore"))


@pytest.fixture
def explorer(cells):
    return cells["explorer"]


@pytest.fixture
def scorer(cells):
    return cells["scorer"]


@pytest.fixture
def page(cells):
    """All widgets by name, in their first state; `layout` binds those that JavaScript binds."""
    page = cells["controls"](cells["setting"])
    cells["layout"](page)
    return page


def png(picture, **options):
    picture.save(stream := io.BytesIO(), "png", **options)
    return stream.getvalue()


def upload(page, content, name="mine.png"):
    page.source.index = 1
    page.upload.value = [{"name": name, "type": "", "size": len(content), "content": content, "last_modified": NOW}]


def draw(page, *boxes):
    page.boxes.bboxes = [dict(zip(BOX, box, strict=True)) | {"label": "candidate"} for box in boxes]


def shown(page):
    return page.picture.value, page.table.value, page.code.value


@pytest.mark.parametrize("method", ["bsap", "bsap_h", "bsap_calibrated", "qb_norm", "csls", "sinkhorn"])
def test_its_picks_are_those_of_the_evaluation(explorer, scorer, method):
    """Of every expression of its scenes, computed here as 03 does."""
    val, pairs = explorer.ds, explorer.pairs
    template, setting = "a photo of {}", explore.Setting(method=method, temperature=2.0, weight=0.7)
    text = scorer.encode_texts(val.expressions["text"], template)
    s = scorer.pair_logits(explorer.image, text, pairs)
    a = scorer.logits(explorer.image, scorer.encode_texts(auxiliary_prompts("categories", explorer.whole), template))
    options = {"bsap_h": {"temperature": 2.0}, "qb_norm": {"temperature": scorer.logit_scale / 20}}.get(method, {})
    if method.startswith("bsap") and method in ("bsap", "bsap_calibrated"):
        weight = 0.7 if method == "bsap" else explorer.calibrated(setting)
        scores = s - weight * pool(a, 2.0)[pairs.candidate]
    else:
        scores = METHODS[method](s, a, pairs, **options)
    torch.testing.assert_close(explorer.score(method, s, a, pairs, setting), scores)
    expected = pick(pairs, scores)
    assert explorer.right(setting)[1].equal(pairs.iou[expected] > 0.5)
    for row, (image_id, asked) in enumerate(val.expressions[["image_id", "text"]].itertuples(index=False)):
        scene = explorer.scene(val.images.index.get_loc(image_id) + 1)
        found = explorer.table(scene, setting._replace(text=asked)).loc[method]
        candidate = int(scene.rows[found["pick"] - 1])
        assert candidate == pairs.candidate[expected[row]]


def test_right_wrong_and_margin(explorer):
    scene = explorer.scene(1)
    asked = scene.expressions.iloc[0]
    table = explorer.table(scene, explore.Setting(asked["text"].upper(), weight=1.0))
    truth = explorer.ds.annotations.loc[asked["ann_id"], XYWH].to_numpy(float)
    overlaps = [box_iou(scene.boxes[number - 1], truth) > 0.5 for number in table["pick"]]
    assert table["right"].tolist() == ["✓" if right else "✗" for right in overlaps]
    s = explorer.logits(explorer.image, [asked["text"]], explore.Setting())[scene.rows, 0]
    best = s.sort(descending=True).values
    assert table.at["clip", "margin"] == pytest.approx(float(best[0] - best[1]), abs=1e-5)
    unknown = explorer.table(scene, explore.Setting("orange fish in a tree"))
    assert set(unknown["right"]) == {"–"} and (unknown["margin"] >= 0).all()


def test_the_calibrated_weight_is_least_squares_on_train_expressions(explorer, scorer):
    setting = explore.Setting(bank="generic", temperature=3.0)
    a = explorer.logits(explorer.image, auxiliary_prompts("generic"), setting).double().numpy()
    texts = unlabelled_texts(explorer.whole, auxiliary_prompts("generic"))
    m = explorer.logits(explorer.image, texts, setting).double().numpy().mean(1)
    x = 3.0 * logsumexp(a / 3.0, axis=1)
    for image in explorer.competing.unique().tolist():
        rows = explorer.competing.numpy() == image
        x[rows], m[rows] = x[rows] - x[rows].mean(), m[rows] - m[rows].mean()
    assert explorer.calibrated(setting) == pytest.approx((x * m).sum() / (x * x).sum(), rel=1e-4)


def test_without_train_expressions_the_weight_is_measured_on_all(cells, explorer):
    """As in notebook 03; and it can be in focus."""
    own = explore.Explorer(explorer.ds, cells["candidates"], explorer.scorer, explorer.ds)
    setting = explore.Setting("red star", method="bsap_calibrated")
    a = own.logits(own.image, own.prompts("categories"), setting)
    texts = unlabelled_texts(explorer.ds, own.prompts("categories"))
    mean = own.logits(own.image, texts, setting).mean(1)
    assert own.calibrated(setting) == pytest.approx(calibrated_weight(pool(a), mean, own.competing))
    cells["explorer"] = own
    try:
        page = cells["controls"](setting)
    finally:
        cells["explorer"] = explorer
    assert not page.message.value and page.mark.value and "w*" in page.table.value and page.picture.value


def test_every_control_redraws_what_it_should(page):
    changes = [("temperature", 30.0), ("text", "blue leaf"), ("bank", "generic"), ("weight", 0.2), ("method", "nnn"),
               ("bank", "leaf, moon"), ("template", "a picture of the {}"), ("scene", 2)]  # fmt: skip
    for name, value in changes:
        before = shown(page)
        getattr(page, name).value = value
        assert not page.message.value, name
        assert all(one != other for one, other in zip(shown(page)[-2:], before[-2:], strict=True)) or name in (
            "method",
        )
        assert shown(page)[0] != before[0], name
    assert page.text.value == page.known.value == page.known.options[0]
    page.known.value = page.known.options[1]
    assert page.text.value == page.known.options[1] and page.text.value in page.code.value
    assert "on all scenes" in page.total.value and "w* =" in page.mark.value


def test_next_win_and_next_loss_find_all_of_them_and_go_round(explorer, page):
    page.method.value = "dn"
    setting = explore.Setting(*(getattr(page, name).value for name in explore.Setting._fields))
    clip, mine = explorer.right(setting)
    for button, wanted in ((page.win, mine & ~clip), (page.loss, clip & ~mine)):
        rows = explorer.ds.expressions[wanted.numpy()]
        visited = []
        for _ in range(len(rows) + 1):
            button.click()
            visited.append((explorer.ds.images.index[page.scene.value - 1], page.text.value))
        if len(rows):
            assert set(visited) == set(rows[["image_id", "text"]].itertuples(index=False, name=None))
            assert page.table.value.count("✓") and page.table.value.count("✗")
        else:
            assert "There is none" in page.message.value
    page.random.click()
    assert not page.message.value


@pytest.mark.parametrize("method", ["bsap", "bsap_h", "sinkhorn", "qb_norm"])
def test_the_lines_to_copy_give_the_same_pick(page, capsys, method):
    page.temperature.value, page.weight.value, page.bank.value, page.method.value = 2.0, 0.35, "leaf, moon, car", method
    exec(page.code.value, {})
    picks = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
    alt = page.picture.value.split('alt="')[1].split('"')[0]
    assert alt.startswith(f"CLIP picks {picks['clip']}, ") and alt.endswith(f" picks {picks[method]}")


def test_a_picture_of_ones_own_has_the_features_of_the_same_scene(explorer, page, tmp_path, monkeypatch, capsys):
    scene = explorer.scene(3)
    own = explorer.own_scene(scene.image, scene.boxes)
    torch.testing.assert_close(own.features, explorer.image[:, scene.rows])
    upload(page, png(scene.image))
    draw(page, *scene.boxes[:2].tolist())
    assert "drawn shapes" in page.message.value and 'alt="CLIP picks' in page.picture.value
    draw(page, (20, 20, 100, 90), (150, 40, 110, 120))  # a browser's whole pixels
    assert "boxes = [[20.0, 20.0, 100.0, 90.0], [150.0, 40.0, 110.0, 120.0]]" in page.code.value
    scene.image.save(tmp_path / "mine.png")
    exec(page.code.value.replace("mine.png", str(tmp_path / "mine.png")), {})
    printed = capsys.readouterr().out.split("\nbsap ")[1].split()[0]
    assert page.picture.value.split("BSAP picks ")[1].startswith(printed)


def test_pictures_stand_upright(page):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    upload(page, png(Image.new("RGB", (90, 60), "navy"), exif=exif))
    assert Image.open(io.BytesIO(page.boxes.image_bytes)).size == (60, 90)


def test_candidates_are_found(page):
    picture = Image.new("RGB", (90, 60), "navy")
    picture.paste("orange", (20, 15, 50, 45))
    upload(page, png(picture))
    assert "Draw boxes" in page.message.value
    page.find.click()
    found = np.array([page.boxes.bboxes[0][side] for side in BOX])
    assert box_iou(found, np.array([20.0, 15, 30, 30])) > 0.8 and "alert" not in page.message.value
    upload(page, png(Image.new("RGB", (50, 40), "gray")))
    page.find.click()
    assert [[box[side] for side in BOX] for box in page.boxes.bboxes] == [[0, 0, 50, 40]]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("text", "  ", "Type an expression"), ("bank", " , ", "Unknown bank"), ("template", "a photo", "{}")],
)
def test_what_is_wrong_is_said_and_the_picture_fades_until_it_is_mended(page, name, value, words):
    good = getattr(page, name).value
    getattr(page, name).value = value
    assert words in page.message.value and 'role="alert"' in page.message.value and "opacity: 0.3" in page.picture.value
    getattr(page, name).value = good
    assert not page.message.value and "opacity: 1" in page.picture.value


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"x" * 50])
def test_a_bad_upload_is_said(page, content):
    upload(page, content)
    assert "cannot be read" in page.message.value
    page.find.click()
    assert "Choose a picture" in page.message.value


def test_text_is_text(page):
    page.text.value = "cost $x_{1$ <b>&</b> 😀"
    assert not page.message.value and "<b>" not in page.picture.value + page.table.value


def test_labels_of_widgets_say_what_they_are(page):
    for name in ("scene", "known", "text", "template", "bank", "method", "temperature", "weight", "code"):
        widget = getattr(page, name)
        assert widget.description and widget.tooltip, name


def test_without_a_person_there_are_picture_and_table_and_no_widget(tmp_path, monkeypatch):
    """As in papermill: what a widget sends would be kept with the outputs."""
    monkeypatch.setattr(ipywidgets.Widget, "open", None)
    picture, table = run_notebook(tmp_path, EXPRESSION="red star", SPLIT="test")["displayed"]
    assert picture.data.startswith(b"\x89PNG") and "CLIP" in table.to_html()
    assert (tmp_path / "fig_explore.png").is_file()


def test_of_fewer_pictures_than_the_scene_asked_for_the_last_is_shown(tmp_path):
    cells = run_notebook(tmp_path, LIMIT=2, SCENE=4)
    slider = cells["controls"](cells["setting"]).scene
    assert (slider.value, slider.max) == (2, 2) and len(cells["ds"].images) == 2
    assert cells["scene"].expressions["image_id"].unique().tolist() == [cells["ds"].images.index[1]]


def test_a_change_encodes_nothing_and_draws_once(page, monkeypatch):
    """So it takes 0.3 s in the browser, drawing and transport included (test_browser.py measures it)."""
    done = []
    for owner, name in ((scoring.ClipScorer, "_in_batches"), (explore.Explorer, "draw")):
        old = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, old=old, name=name: done.append(name) or old(*given))
    for value in np.linspace(0.5, 5, 10):
        page.temperature.value = value
    assert done == ["draw"] * 10
