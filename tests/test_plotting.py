"""Figures: what can be asserted about them without looking."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bsap_utils import plotting
from bsap_utils.datasets import DatasetError
from bsap_utils.evaluation import pick
from bsap_utils.regions import load_candidates, pair_up

# a figure that warns ends in a notebook's output; plotting's own filter does not reach into pytest
pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("ignore:Glyph .* missing")]
NASTY = ["$x_{1$", "$5 … $10", r"\frac{1}{", "😀 漢字", "tab\tand\x00nul", "<b>bold</b> & co"]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def a_table(methods=("clip", "bsap", "mine")):
    values = np.arange(len(methods)) * 3.0 + 40
    return pd.DataFrame({"method": methods, "accuracy": values, "ci_low": values - 2, "ci_high": values + 1})


def texts(figure):
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def test_the_same_figure_gives_the_same_bytes_with_its_caption_in_few_colours(tmp_path):
    caption = "Accuracy “é” from T = 0 to ∞"
    for stem in ("one", "two"):
        plotting.save(plotting.intervals(a_table()), tmp_path / "new" / stem, caption)
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / "new" / stem).with_suffix(suffix).read_bytes() for stem in ("one", "two"))
        assert one == two
    picture = Image.open(tmp_path / "new" / "one.png")
    assert picture.mode == "P" and picture.text == {"Description": caption}
    assert caption in (tmp_path / "new" / "one.svg").read_text(encoding="utf-8")


def test_few_colours_look_like_the_figure(tmp_path):
    figure = plotting.curves(pd.DataFrame({"x": [1.0, 2.0, 4.0], "y": [1.0, 3.0, 2.0]}), "x", "y")
    figure.savefig(tmp_path / "all.png")
    plotting.save(figure, tmp_path / "few", "")
    every, few = (np.asarray(Image.open(tmp_path / name).convert("RGB"), int) for name in ("all.png", "few.png"))
    assert every.shape == few.shape and np.abs(every - few).max() < 12


def test_a_figure_with_pictures_is_no_svg_and_a_link_is_not_written_through(tmp_path):
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    plotting.save(plotting.picture_grid([picture], ["noise"]), tmp_path / "grid", "noise")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png"]
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "link.png").symlink_to(tmp_path / "precious.txt")
    with pytest.raises(DatasetError, match="link.png"):
        plotting.save(plotting.intervals(a_table()), tmp_path / "link", "")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_text_is_text_in_every_figure(tmp_path):
    table = a_table(NASTY)
    first = plotting.intervals(table, title="from $5 to $10", xlabel="$x_{1$")
    plotting.save(first, tmp_path / "intervals", "\ud83d $x_{1$")
    written = (tmp_path / "intervals.svg").read_text(encoding="utf-8")
    assert "from $5 to $10" in written and "$x_{1$" in written and "<b>" not in written
    curves = plotting.curves(table.assign(x=1.0), "x", "accuracy", "method", title="$x_{1$", log="x")
    plotting.save(curves, tmp_path / "curves", "")
    plotting.save(plotting.heat_map(table.set_index("method"), title="$x_{1$"), tmp_path / "map", "")
    captions = [*NASTY, "half of an emoji: \ud83d"]
    grid = plotting.picture_grid([Image.new("RGB", (9, 9))] * len(captions), captions, titles=captions[-2:])
    plotting.save(grid, tmp_path / "grid", "")


def test_what_cannot_be_drawn_is_replaced_and_long_text_is_cut():
    assert plotting.plain("a\ud83d\x00 b\n c") == "a?� b c"
    assert plotting.plain("one two three four five", 9) == "one two\nthree …"


def test_a_method_of_ones_own_has_its_name_and_a_grey():
    assert plotting.label("mine") == "mine" and plotting.label("clip") == "CLIP"
    grey = plotting.colour("mine")
    assert grey == plotting.colour("another of mine")
    assert grey not in [colour for _, colour in plotting.METHODS.values()]
    assert plotting.colours(["val", "test"]) != plotting.colours(["clip", "mine"])
    assert len(set(plotting.colours(list("abcdefgh")).values())) == 8


def test_every_method_of_the_package_has_a_label_of_its_own():
    from bsap_utils.normalization import METHODS

    assert set(METHODS) <= set(plotting.METHODS)
    assert len({plotting.label(name) for name in METHODS}) == len(METHODS)


def test_intervals_stand_where_the_table_says():
    figure = plotting.intervals(a_table())
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CLIP", "BSAP", "mine"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row is at the top"
    lines = {tuple(map(float, line.get_xdata())) for line in axis.lines}
    assert {(38.0, 41.0), (40.0,), (44.0, 47.0), (46.0,)} <= lines and (0.0, 0.0) not in lines
    assert {"40.0", "43.0", "46.0"} <= set(texts(figure))
    bsap = next(line for line in axis.lines if list(line.get_xdata()) == [43.0])
    assert bsap.get_color() == plotting.colour("bsap") and list(bsap.get_ydata()) == [1.0]


def test_differences_have_a_zero_line_signs_and_a_dash_where_nothing_is_known():
    assert {"+0.0"} <= set(texts(plotting.intervals(a_table().assign(accuracy=-0.04), zero=True)))  # no "−0.0"
    table = a_table().assign(accuracy=[-1.5, 2.0, np.nan])
    figure = plotting.intervals(table, zero=True)
    assert {"−1.5", "+2.0", "–"} <= set(texts(figure))
    zero = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.0, 0.0]]
    assert len(zero) == 1 and zero[0].get_linestyle() == "-"
    assert "difference to CLIP" in figure.axes[0].get_xlabel()


def test_panels_that_share_their_levels_have_one_order():
    left, right = plt.subplots(1, 2, sharey=True)[1]
    plotting.intervals(a_table(), axis=left)
    plotting.intervals(a_table().iloc[[2, 1]], axis=right)
    points = {
        float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in right.lines if line.get_marker() == "o"
    }
    assert points == {46.0: 2.0, 43.0: 1.0}
    assert [text.get_text() for text in left.get_yticklabels()] == ["CLIP", "BSAP", "mine"]


def test_levels_of_a_hue_do_not_lie_on_each_other():
    both = pd.concat([a_table().assign(split="val"), a_table().assign(split="test")])
    figure = plotting.intervals(both, hue="split", title="both")
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    heights = [float(line.get_ydata()[0]) for line in points]
    assert len(set(heights)) == 6 and {round(height) for height in heights} == {0, 1, 2}
    assert len({line.get_color() for line in points}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["val", "test"]


def test_an_infinite_temperature_stands_at_the_right_end():
    temperatures = [0.5, 1.0, 5.0, np.inf]
    table = pd.DataFrame({"T": temperatures * 2, "y": range(8), "method": ["clip"] * 4 + ["bsap"] * 4})
    table = table.assign(low=table["y"] - 1, high=table["y"] + 1)
    axis = plotting.curves(table, "T", "y", "method", "low", "high", log="x").axes[0]
    ticks = {label.get_text(): at for label, at in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)}
    assert list(ticks) == ["0.5", "1", "5", "∞"] and 5 < ticks["∞"] < 50
    bsap = [line for line in axis.lines if line.get_color() == plotting.colour("bsap")]
    assert list(bsap[0].get_xdata()) == [0.5, 1.0, 5.0] and list(bsap[0].get_ydata()) == [4, 5, 6]
    assert list(bsap[1].get_ydata()) == [6, 7] and list(bsap[1].get_xdata())[1] == ticks["∞"]
    assert len(axis.collections) == 2, "a band a line"


def test_a_logarithmic_axis_has_plain_numbers():
    table = pd.DataFrame({"n": [100, 10_000, 1_000_000], "ms": [1.0, 2.0, 4.0]})
    figure = plotting.curves(table, "n", "ms", log="x")
    figure.canvas.draw()
    assert "1,000,000" in texts(figure) and not any("$" in text for text in texts(figure))


def test_a_heat_map_names_its_levels():
    frame = pd.DataFrame([[1.0, 5.0, 2.0], [9.0, np.nan, 3.0]], ["clip", "b"], [0.5, 1.0, np.inf])
    axis = plotting.heat_map(frame, centre=2.0, title="map").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "1", "∞"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CLIP", "b"]
    axis.figure.canvas.draw()
    at_the_centre, low = axis.collections[0].get_facecolors()[[2, 3], :3]
    assert at_the_centre.min() > 0.9 > low.min(), "no colour where a number is the centre"
    large = plotting.heat_map(pd.DataFrame(np.ones((22, 21)), columns=[*np.logspace(-1, 2, 20), np.inf]))
    labels = [label.get_text() for label in large.axes[0].get_xticklabels()]
    assert len(labels) <= 13 and labels[-1] == "∞"


boxes = st.tuples(st.integers(0, 280), st.integers(0, 200), st.integers(1, 320), st.integers(1, 240)).map(
    lambda box: (box[0], box[1], min(box[2], 320 - box[0]), min(box[3], 240 - box[1]))
)


def drawn_label(axis, label):
    """Where a label is on the picture: left, top, right, bottom in pixels of the picture."""
    axis.figure.canvas.draw()
    text = next(text for text in axis.texts if text.get_text() == label)
    (x0, y0), (x1, y1) = axis.transData.inverted().transform(text.get_bbox_patch().get_window_extent())
    return x0, y1, x1, y0


@settings(max_examples=25, deadline=None)
@given(boxes, st.booleans(), st.integers(1, 3))
def test_a_label_stays_inside_the_picture_wherever_its_box_is(box, below, columns):
    axis = plt.subplots(1, columns, figsize=(7, 6.65 / columns), squeeze=False, subplot_kw=plotting.BLANK)[1][0, 0]
    axis.imshow(np.zeros((240, 320, 3)))
    axis.set_title("a caption")
    plotting.outline(axis, box, "red", "BSAP-H", below=below)
    left, top, right, bottom = drawn_label(axis, "BSAP-H")
    slack = 4 * columns  # its size is estimated before the figure's layout is known
    assert left > -slack and top > -slack and right < 320 + slack and bottom < 240 + slack
    plt.close("all")


@pytest.mark.parametrize(
    "target", [(110, 55, 90, 43), (10, 200, 60, 40), (10, 0, 60, 40), (250, 100, 60, 60), (250, 205, 70, 35)]
)
def test_labels_cover_neither_what_is_asked_for_nor_each_other(target):
    axis = plt.subplots(figsize=(2.3, 2), subplot_kw=plotting.BLANK)[1]
    axis.imshow(np.zeros((240, 320, 3)))
    plotting.outline(axis, (120, 100, 80, 60), "red", "CLIP", avoid=[target])
    plotting.outline(axis, target, "blue", "BSAP", below=True, avoid=[target])
    plotting.outline(axis, (120, 100, 80, 60), "green", "third", avoid=[target])
    spots = [drawn_label(axis, name) for name in ("CLIP", "BSAP", "third")]
    x, y, w, h = target
    for number, (left, top, right, bottom) in enumerate(spots):
        for other in [(x + 3, y + 3, x + w - 3, y + h - 3), *spots[:number]]:
            apart = right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3]
            assert apart, (number, spots, target)


@pytest.fixture(scope="module")
def masked(sample_val):
    ds = sample_val.select(limit=6)
    return ds, load_candidates(ds, "masks", "data/refshapes")


@pytest.mark.parametrize("masks", [False, True])
def test_a_scene_shows_the_picks_and_their_overlap(masked, masks, tmp_path):
    ds, candidates = masked
    pairs = pair_up(ds, candidates, masks=masks)
    scores = {"clip": torch.rand(len(pairs), generator=torch.Generator().manual_seed(0)), "mine": pairs.iou}
    figure = plotting.scene_panel(ds, candidates, pairs, scores, torch.tensor([0, 3, 5, 8]), "mine")
    assert len(figure.axes) == 6
    for axis, row in zip(figure.axes, [0, 3, 5, 8], strict=False):
        assert ds.expressions["text"].iloc[row] in axis.get_title(loc="left").replace("\n", " ")
        overlap = [float(pairs.iou[pick(pairs, score)[row]]) for score in scores.values()]
        assert f"IoU: CLIP {overlap[0]:.2f}, mine {overlap[1]:.2f}" in [text.get_text() for text in axis.texts]
        assert len(axis.patches) == (0 if masks else 6) and len(axis.collections) == (6 if masks else 0)
    plotting.save(figure, tmp_path / "scenes", "")


def test_a_scene_needs_masks_only_where_pairs_have_masks(masked):
    ds, candidates = masked
    boxes = candidates.drop(columns="segmentation")
    pairs = pair_up(ds, boxes)
    assert plotting.scene_panel(ds, boxes, pairs, {"clip": pairs.iou, "bsap": pairs.iou}, [0])


def test_masks_without_an_edge_are_drawn_without_a_word(masked):
    axis = plt.subplots()[1]
    axis.imshow(np.zeros((8, 8, 3)))
    for mask in (np.zeros((8, 8), bool), np.ones((8, 8), bool)):
        plotting.outline(axis, (0, 0, 8, 8), "red", "CLIP", mask=mask)
    assert not axis.collections and len(axis.texts) == 2


def test_the_hero_shows_both_picks_with_logit_and_difference(val_case):
    ds, pairs, s, a = val_case.ds, val_case.pairs, val_case.s, val_case.a
    difference = s - a.double().logsumexp(1)[pairs.candidate]
    clip, bsap = pick(pairs, s), pick(pairs, difference)
    rows = (clip != bsap).nonzero().ravel()[:2].tolist()
    figure = plotting.hero(ds, val_case.candidates, pairs, s, a.logsumexp(1), rows)
    for column, row in enumerate(rows):
        scene, ladder = figure.axes[column], figure.axes[len(rows) + column]
        assert {"CLIP", "BSAP"} <= {text.get_text() for text in scene.texts}
        bold = {text.get_text() for text in ladder.texts if text.get_weight() == "bold"}
        numbers = {f"{float(s[clip[row]]):.1f}", f"{float(difference[bsap[row]]):+.1f}"}
        assert bold == {number.replace("-", "−") for number in numbers}
        assert len(ladder.texts) == 2 * min(int((pairs.expression == row).sum()), 8)


def test_the_hero_shows_the_eight_highest_logits_and_bsap_s_pick_though_its_logit_is_lower(val_case):
    pairs, row = val_case.pairs, int(val_case.pairs.expression.bincount().argmax())
    own = (pairs.expression == row).nonzero()[:, 0]
    lowest = own[val_case.s[own].argmin()]
    a = val_case.a.clone()
    a[pairs.candidate[lowest]] = -50
    ladder = plotting.hero(val_case.ds, val_case.candidates, pairs, val_case.s, a.double().logsumexp(1), [row]).axes[1]
    drawn = torch.from_numpy(ladder.lines[0].get_ydata())
    expected = torch.cat([val_case.s[own].sort(descending=True).values[:8], val_case.s[lowest][None]]).double()
    assert len(own) > 9 and drawn.equal(expected) and len(ladder.texts) == 2 * 9


def test_a_thumbnail_is_the_candidate_s_part_of_the_picture(sample_val, detections):
    row = int(detections["w"].argmax())
    small = plotting.thumbnail(sample_val, detections, row, 50)
    x, y, w, h = detections.loc[row, ["x", "y", "w", "h"]]
    part = sample_val.load_image(detections.loc[row, "image_id"]).crop((x, y, x + w, y + h))
    inside = np.asarray(small, float)[(np.asarray(small) != 255).any(2)]
    assert small.size == (50, 50) and np.abs(inside.mean(0) - np.asarray(part).mean((0, 1))).max() < 8


def test_a_grid_has_every_picture_over_its_caption():
    pictures = [np.full((20, 30, 3), shade, np.uint8) for shade in range(0, 250, 25)]
    figure = plotting.picture_grid(pictures, [f"number {i}" for i in range(10)], 4, ["first", "second", "third"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(figure.axes) == 12 and len(shown) == 10
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in shown] == list(range(0, 250, 25))
    assert [axis.texts[0].get_text() for axis in shown] == [f"number {i}" for i in range(10)]
    assert [figure.axes[row].get_title(loc="left") for row in (0, 4, 8)] == ["first", "second", "third"]


def test_a_table_for_readers_has_labels_intervals_and_dashes_and_no_markup():
    table = a_table(["clip", "<script>alert(1)</script>"]).assign(
        p_holm=[1.0, 0.0123], split="$5 … $10", delta_vs_clip=[0.0, -2.5]
    )
    table.loc[1, ["accuracy", "ci_low"]] = np.nan
    html = plotting.show_table(table.set_index("method")).to_html()
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", html)
    assert {
        "accuracy, %",
        "p (Holm)",
        "CLIP",
        "40.0 [38.0, 41.0]",
        "– [–, 44.0]",
        "+0.0",
        "−2.5",
        "0.0123",
        "$5 … $10",
    } <= set(cells)
    assert "<script>" not in html and "ci_low" not in html
    assert "tex2jax_ignore" in html, "dollars are no mathematics in a table either"
    numbered = plotting.show_table(table[["method", "accuracy"]]).to_html()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", numbered)[:2] == ["CLIP", "40.0"] and "row_heading" not in numbered
