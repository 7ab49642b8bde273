"""One style for all figures: colour-blind-safe, one colour a method everywhere, sized for a paper's columns.

Importing this module sets matplotlib's defaults. Text is text: dollars of an expression are never mathematics
(`parse_math=True` asks for it). A figure that one notebook needs is a cell of that notebook, made of the helpers here.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, BboxImage
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from .datasets import XYWH, ReferDataset, write_file
from .evaluation import pick
from .regions import Pairs, decode_masks

SINGLE_COLUMN, DOUBLE_COLUMN = 3.4, 7.0  # inches
METHOD_LABELS = {
    "clip": "CLIP", "bsap": "BSAP", "bsap_h": "BSAP-H", "bsap_minmax": "BSAP min–max", "bsap_zscore": "BSAP z-score",
    "bsap_calibrated": "BSAP, weight w*", "subtraction": "Subtraction", "dn": "Distribution norm.", "nnn": "NNN",
    "csls": "CSLS", "qb_norm": "QB-Norm", "sinkhorn": "Sinkhorn", "db_norm": "DB-Norm", "centring": "Centring",
    "oracle": "Best candidate",
}  # fmt: skip
# Okabe and Ito's palette, completed from Paul Tol's: told apart with every common kind of colour vision.
METHOD_COLOURS = {
    "clip": "#D55E00", "bsap": "#0072B2", "bsap_h": "#56B4E9", "bsap_minmax": "#009E73", "bsap_zscore": "#332288",
    "bsap_calibrated": "#000000", "subtraction": "#E69F00", "dn": "#999933", "nnn": "#CC79A7", "csls": "#AA4499",
    "qb_norm": "#882255", "sinkhorn": "#661100", "db_norm": "#DDAA33", "centring": "#44AA99", "oracle": "#9A9A9A",
}  # fmt: skip
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#999933")  # what is no method
TRUTH_COLOUR = "#FFFFFF"
# Tol's high-contrast colours, no method's: an object, a part of one or a loose box around it, bare ground
KIND_COLOURS = {"object": "#004488", "part or loose box": "#DDAA33", "bare ground": "#BB5566"}

mpl.rcParams.update({
    "font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.linewidth": 0.7, "lines.linewidth": 1.4, "figure.dpi": 110, "savefig.dpi": 200,
    "figure.constrained_layout.use": True, "svg.hashsalt": "bsap", "svg.fonttype": "none", "legend.frameon": False,
    "text.parse_math": False,
})  # fmt: skip
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # an emoji is drawn as a box, without a word each

_greys: dict[str, str] = {}  # names that are no method of ours, in order of appearance


def label(method: str) -> str:
    """Return a method's name for readers; of one that is not in the table, the name itself.

    >>> label("bsap_h"), label("mine")
    ('BSAP-H', 'mine')
    """
    return METHOD_LABELS.get(method, plain(method))


def colour(method: str) -> str:
    """Return a method's colour; a method that is not in the table gets a grey, the next one another."""
    return METHOD_COLOURS.get(method) or _greys.setdefault(method, ("0.25", "0.45", "0.62")[len(_greys) % 3])


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: its own where methods are among them, else one of `SERIES`."""
    names = list(dict.fromkeys(names))
    of_methods = any(name in METHOD_COLOURS for name in names)
    return {name: colour(name) for name in names} if of_methods else dict(zip(names, cycle(SERIES), strict=False))


def plain(text: Any, width: int = 0, lines: int = 2) -> str:
    """Return `text` as it can be drawn: no half characters or controls, wrapped at `width` to so many lines at most."""
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) if width else text


def save(figure: Figure, stem: Path | str, caption: str) -> None:
    """Write `figure` to `stem`.png, in few colours, and to `stem`.svg where no picture is in it; same figure, same bytes.

    The caption stands in both files' metadata as Description. Raises DatasetError where a file cannot be written.
    """
    stem, caption, png, few, svg = Path(stem), plain(caption), io.BytesIO(), io.BytesIO(), io.BytesIO()
    has_pictures = bool(figure.findobj(lambda artist: isinstance(artist, AxesImage | BboxImage)))
    figure.savefig(png, format="png")
    drawn, info = Image.open(png), PngInfo()
    info.add_itxt("Description", caption)
    few_colours = (
        with_palette(drawn) if has_pictures else drawn.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    )
    few_colours.save(few, "PNG", optimize=True, pnginfo=info, dpi=drawn.info["dpi"])
    write_file(stem.with_name(f"{stem.name}.png"), few.getvalue())
    if not has_pictures:
        figure.savefig(svg, format="svg", metadata={"Date": None, "Description": caption})
        write_file(stem.with_name(f"{stem.name}.svg"), svg.getvalue())


def with_palette(picture: Image.Image, most: int = 128) -> Image.Image:
    """Return a photograph in few colours, dithered: much the same to the eye, and as PNG half as large or less."""
    # the default, median cut, loses what is small and bright; and PIL dithers only onto a palette that it is given,
    # which of all 16 million colours would take a minute: so of 32,768, white among them
    picture = picture.convert("RGB")
    coarse = ImageOps.posterize(picture, 5).point(lambda value: value * 255 // 248)
    palette = coarse.quantize(most, Image.Quantize.MAXCOVERAGE)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def intervals(
    table: pd.DataFrame, value: str = "accuracy", low: str = "ci_low", high: str = "ci_high", row: str = "method",
    hue: str | None = None, axis: Axes | None = None, zero: bool = False, marks: Mapping[str, float] | None = None,
    xlabel: str = "accuracy, %, 95 % interval", title: str = "", digits: int = 1,
) -> Figure:  # fmt: skip
    """Show points with intervals: a line a level of `row`, from the top, and side by side the levels of `hue`.

    `zero` draws the line of no difference and signs the numbers; `marks` are dotted lines, name → value. A number that
    is missing is a dash. Returns the figure, a new one unless there is an `axis`.
    """
    rows, groups = list(dict.fromkeys(table[row])), list(dict.fromkeys(table[hue])) if hue else [None]
    place = {level: number for number, level in enumerate(rows)}
    if axis is None:
        axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.72, 0.24 * len(rows) * (1 + len(groups)) / 2 + 0.85))[1]
    paint = colours(table[hue or row]) if hue or set(rows) & set(METHOD_COLOURS) else dict.fromkeys(rows, SERIES[0])
    for name, at in {"": 0.0, **(marks or {})}.items() if zero else (marks or {}).items():
        axis.axvline(at, color="0.35", linewidth=1, linestyle=":" if name else "-", zorder=0)
        axis.annotate(name, (at, 1), (2, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="left", va="top", fontsize=7, color="0.35", rotation=90)  # fmt: skip
    for number, group in enumerate(groups):
        shift = 0.7 * ((number + 0.5) / len(groups) - 0.5)
        for entry in (table if hue is None else table[table[hue] == group]).to_dict("records"):
            y, tone = place[entry[row]] + shift, paint[entry[hue or row]]
            missing = pd.isna(entry[value])
            text = "–" if missing else f"{entry[value]:{'+' if zero else ''}.{digits}f}".replace("-", "−")
            if not missing:
                axis.plot([entry[low], entry[high]], [y, y], color=tone, linewidth=1.3, solid_capstyle="butt")
                axis.plot(entry[value], y, "o", color=tone, markersize=4.5)
            axis.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                          va="center", fontsize=7.5, color=tone)  # fmt: skip
    axis.set_yticks(range(len(rows)), [label(str(level)) for level in rows])
    axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel)
    axis.set_title(plain(title))
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    if hue:
        _legend(axis, paint, "o")
    return axis.get_figure(root=True)


def curves(
    table: pd.DataFrame, x: str, y: str, hue: str | None = None, low: str | None = None, high: str | None = None,
    axis: Axes | None = None, log: str = "", marker: str = "o", xlabel: str = "", ylabel: str = "", title: str = "",
) -> Figure:  # fmt: skip
    """Show lines with bands from `low` to `high`, a line a level of `hue`; `log` names the logarithmic axes, as "x", "xy".

    An infinite x, as of a temperature, stands apart at the right end. Returns the figure, a new one unless there is an `axis`.
    """
    if axis is None:
        axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.62, 2.6))[1]
    finite = np.unique(table[x][np.isfinite(table[x])].to_numpy(float))
    end = finite[-1] * (finite[-1] / finite[0]) ** 0.12 if "x" in log else finite[-1] + 0.12 * np.ptp(finite)
    paint = colours(table[hue]) if hue else {"": SERIES[0]}
    for name, tone in paint.items():
        part = (table if hue is None else table[table[hue] == name]).sort_values(x)
        at, last = part[x].clip(upper=end), np.isinf(part[x])
        axis.plot(at[~last], part[y][~last], marker=marker, markersize=3, color=tone)
        axis.plot(at[-2:], part[y][-2:], ":" if last.any() else "", marker=marker, markersize=3, color=tone)
        if low and high:
            axis.fill_between(at, part[low], part[high], color=tone, alpha=0.14, linewidth=0)
    for side in log:
        axis.set(**{f"{side}scale": "log"})
        getattr(axis, f"{side}axis").set_major_formatter("{x:,.10g}")
        getattr(axis, f"{side}axis").set_minor_formatter("")
    if np.isinf(table[x]).any():
        few = finite if len(finite) <= 9 else finite[np.isclose(np.log10(finite) % 1, [[0], [1]]).any(0)]
        axis.set_xticks([*few, end], [*(f"{value:,.10g}" for value in few), "∞"])
        axis.minorticks_off()
    axis.grid(axis="y", color="0.92")
    axis.set(xlabel=xlabel or x, ylabel=ylabel or y)
    axis.set_title(plain(title))
    if hue:
        _legend(axis, paint, marker, "-")
    return axis.get_figure(root=True)


def _legend(axis: Axes, paint: Mapping[str, str], marker: str, line: str = "") -> None:
    """Name the colours above a figure of one panel, or in a panel of several."""
    marks = [Line2D([], [], color=tone, marker=marker, markersize=4, linestyle=line) for tone in paint.values()]
    figure, names = axis.get_figure(root=True), [label(str(name)) for name in paint]
    if len(figure.axes) == 1:
        figure.legend(marks, names, loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.2)
    else:
        axis.legend(marks, names, handletextpad=0.4)


def heat_map(
    frame: pd.DataFrame, label: str = "accuracy, %", xlabel: str = "temperature T", ylabel: str = "", title: str = "",
    axis: Axes | None = None, centre: float | None = None, best: bool = False,
) -> Figure:  # fmt: skip
    """Show a table of numbers as colours, in figures too where they fit; `best` frames the highest of each row.

    Rows from the top as they stand; a column named ∞ stands apart. With `centre` colours diverge from that number. The cell
    in row i and column j has its middle at (j + 0.5, i + 0.5), for marks that are added.
    """
    if axis is None:
        axis = plt.subplots(figsize=(DOUBLE_COLUMN, min(4.2, 0.3 * len(frame) + 1.1)))[1]
    reach = None if centre is None else (frame - centre).abs().max().max()
    span = {} if reach is None else {"vmin": centre - reach, "vmax": centre + reach}
    sns.heatmap(frame, ax=axis, annot=frame.size <= 80, fmt=".1f", annot_kws={"size": 7}, yticklabels=False,
                cmap="cividis" if centre is None else "PuOr", xticklabels=False, cbar_kws={"label": label}, **span)  # fmt: skip
    for names, ticks in ((frame.columns, axis.set_xticks), (frame.index, axis.set_yticks)):
        step = -(-len(names) // 12)
        shown = sorted({*range(0, len(names) - step // 2 - 1, step), len(names) - 1})
        ticks([number + 0.5 for number in shown], [_number(names[number]) for number in shown], rotation=0)
    for number, name in enumerate(frame.columns):
        if number and isinstance(name, float) and np.isinf(name):
            axis.axvline(number, color="white", linewidth=3)
    for number, column in enumerate(frame.to_numpy().argmax(1) if best else ()):
        axis.add_patch(Rectangle((column + 0.05, number + 0.07), 0.9, 0.86, fill=False, edgecolor="white", linewidth=2))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(plain(title))
    return axis.get_figure(root=True)


def _number(name: Any) -> str:
    return plain(name) if isinstance(name, str) else "∞" if np.isinf(name) else f"{name:,.3g}"


def picture_grid(
    pictures: Sequence[Any], captions: Sequence[str], columns: int = 6, titles: Sequence[str] = ()
) -> Figure:
    """Show pictures ([H, W, 3] or PIL) in a grid, each over its caption; `titles` name the rows."""
    rows = -(-len(pictures) // columns)
    size = DOUBLE_COLUMN / columns
    lines = max(plain(caption, int(18 * size)).count("\n") + 1 for caption in captions)
    height = rows * (size + 0.13 * lines + (0.2 if titles else 0.05))
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE_COLUMN, height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.text(
            0.5, -0.03, plain(caption, int(18 * size)), transform=axis.transAxes, fontsize=7, ha="center", va="top"
        )
    for axis, title in zip(axes[:, 0], titles, strict=False):
        axis.set_title(plain(title), fontsize=8).set_in_layout(False)
    return figure


def outline(
    axis: Axes, box: Sequence[float], colour: str, label: str = "", dashed: bool = False, below: bool = False,
    avoid: Sequence[Sequence[float]] = (),
) -> None:  # fmt: skip
    """Draw a box (xywh) on the picture that `axis` shows, its label above it, or `below`, where that is free.

    The label stays inside the picture, so no caption is covered, and off the boxes in `avoid` and earlier labels if it can.
    """
    for width, edge in ((2.4, "black"), (1.3, colour)) if dashed else ((3.4, "white"), (2.0, colour)):
        line: Any = (0, (3, 2)) if dashed and edge == colour else "-"
        axis.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=edge, linewidth=width, linestyle=line))
    if label:
        place_label(axis, label, box, colour, below, avoid)


def place_label(
    axis: Axes, text: str, box: Sequence[float], colour: str, below: bool = False, avoid: Sequence[Sequence[float]] = ()
) -> None:
    """Write `text` on a patch of `colour` beside a box (xywh), as `outline` says."""
    (left, right), (bottom, top) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    window = axis.get_window_extent()
    unit = (right - left) / window.width * axis.figure.dpi / 72  # pixels of the picture a point, before the layout
    w, h = (0.66 * 6.5 * len(text) + 5) * unit, 11 * unit
    x, y, width, height = box
    outside = {False: [y - h, y + height], True: [y + height, y - h]}[below]
    inside = {False: [y, y + height - h], True: [y + height - h, y]}[below]
    spots = [(at, level) for level in (*outside, *inside) for at in (x, x + width - w)]
    spots += [(at, level) for level in (y, y + height - h) for at in (x + width, x - w)]
    spots = [(float(np.clip(a, left, right - w)), float(np.clip(b, bottom, top - h))) for a, b in spots]
    taken = getattr(axis, "label_boxes", [])
    costs = [
        3 * sum(_shared((*spot, w, h), other) for other in taken)
        + sum(_shared((*spot, w, h), other) for other in (*avoid, box))
        + 1e-3 * number * w * h
        for number, spot in enumerate(spots)
    ]
    at = spots[int(np.argmin(costs))]
    axis.label_boxes = [*taken, (*at, w, h)]  # type: ignore[attr-defined]
    axis.text(at[0] + w / 2, at[1] + h / 2, text, ha="center", va="center", fontsize=6.5, color="white",
              bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"})  # fmt: skip


def _shared(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes (xywh) share."""
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(sides[0], 0) * max(sides[1], 0)


def thumbnail(ds: ReferDataset, candidates: pd.DataFrame, row: int, side: int = 96) -> Image.Image:
    """Cut one candidate out of its picture and fit it into a white square."""
    x, y, w, h = candidates.loc[row, XYWH]
    picture = ds.load_image(candidates.loc[row, "image_id"]).crop((x, y, x + max(w, 1), y + max(h, 1)))
    return ImageOps.pad(picture, (side, side), color="white")


def scene_panel(
    ds: ReferDataset, candidates: pd.DataFrame, pairs: Pairs, scores: Mapping[str, Any], rows: Sequence[int],
    method: str = "bsap", columns: int = 3,
) -> Figure:  # fmt: skip
    """Show expressions (row numbers) with the target in white dashes and the picks of the first of `scores` and `method`.

    Masks where `pairs` were made with masks, else boxes. Under each picture stand the picks' IoU with the target.
    """
    picks = {name: pick(pairs, scores[name]) for name in dict.fromkeys([next(iter(scores)), method])}
    height = -(-len(rows) // columns) * DOUBLE_COLUMN / columns * 0.95
    axes = plt.subplots(-(-len(rows) // columns), columns, figsize=(DOUBLE_COLUMN, height), squeeze=False)[1]
    for axis in axes.flat:
        axis.axis("off")
    for axis, expression in zip(axes.flat, map(int, rows), strict=False):
        asked = ds.expressions.iloc[expression]
        target, chosen = ds.annotations.loc[asked["ann_id"]], {name: int(of[expression]) for name, of in picks.items()}
        image = ds.load_image(asked["image_id"])
        regions = [target, *(candidates.loc[int(pairs.candidate[pair])] for pair in chosen.values())]
        tones, names = [TRUTH_COLOUR, *map(colour, chosen)], ["", *map(label, chosen)]
        boxes = [region[XYWH].tolist() for region in regions]
        if pairs.intersection is None:
            axis.imshow(image)
            for number, (box, tone, name) in enumerate(zip(boxes, tones, names, strict=True)):
                outline(axis, box, tone, name, dashed=not number, below=number == 2, avoid=boxes[:1])
        else:
            masks = decode_masks([region["segmentation"] for region in regions], image.height, image.width)
            axis.imshow(_tinted(image, masks[1:], tones[1:]))
            for mask, tone, style in zip(masks[[1, 2, 0, 0]], [*tones[1:], "black", tones[0]], "--- ", strict=True):
                if mask.any() and not mask.all():
                    axis.contour(
                        mask, [0.5], colors=[tone], linewidths=1.4, linestyles=[(0, (3, 2)) if style == " " else "-"]
                    )
            for box, tone, name in list(zip(boxes, tones, names, strict=True))[1:]:
                place_label(axis, name, box, tone, below=tone != tones[1], avoid=boxes[:1])
        axis.set_title(plain(f"“{asked['text']}”", 36), fontsize=8)
        known = ", ".join(f"{label(name)} {float(pairs.iou[pair]):.2f}" for name, pair in chosen.items())
        axis.text(0.5, -0.02, f"IoU: {known}", transform=axis.transAxes, ha="center", va="top", fontsize=7, color="0.3")
    return axes.flat[0].figure


def _tinted(image: Image.Image, masks: np.ndarray, tones: Sequence[str]) -> np.ndarray:
    """Return a picture, pale but for its masks [N, H, W], each of which is tinted with its colour."""
    grey, pixels = np.asarray(image.convert("L"))[..., None] / 255, np.asarray(image) / 255
    shown = np.where(masks.any(0)[..., None], pixels, 0.3 + 0.45 * grey + 0.25 * pixels)
    for mask, tone in zip(masks, tones, strict=True):
        shown = np.where(mask[..., None], 0.5 * shown + 0.5 * np.array(mpl.colors.to_rgb(tone)), shown)
    return shown


def hero(
    ds: ReferDataset, candidates: pd.DataFrame, pairs: Pairs, s: Any, bias: Any, rows: Sequence[int], most: int = 8
) -> Figure:
    """Show why CLIP and BSAP pick differently, a column an expression (row numbers): the picture with both picks, and
    under it the candidates of the highest logits `s` [P], each with its logit, its `bias` [C] and what lies between.
    """
    figure = plt.figure(figsize=(DOUBLE_COLUMN, 4.7))
    for (above, below), expression in zip(
        figure.subplots(2, len(rows), height_ratios=(2, 1), squeeze=False).T, rows, strict=True
    ):
        asked = ds.expressions.iloc[int(expression)]
        mine = np.flatnonzero(pairs.expression.numpy() == int(expression))
        scored = pd.DataFrame({"s": s[mine].numpy(), "bias": bias[pairs.candidate[mine]].numpy(), "iou": pairs.iou[mine].numpy()},
                              index=pairs.candidate[mine].numpy())  # fmt: skip
        picks = {"clip": scored["s"].idxmax(), "bsap": (scored["s"] - scored["bias"]).idxmax()}
        target = ds.annotations.loc[asked["ann_id"], XYWH].tolist()
        above.imshow(ds.load_image(asked["image_id"]))
        above.axis("off")
        above.set_title(plain(f"“{asked['text']}”", 44), weight="bold")
        for name, row in picks.items():
            text = f"{label(name)}: {'right' if scored.loc[row, 'iou'] > 0.5 else 'wrong'}"
            outline(above, candidates.loc[row, XYWH].tolist(), colour(name), text, avoid=[target])
        outline(above, target, TRUTH_COLOUR, dashed=True)
        order = scored["s"].sort_values(ascending=False).index
        shown = scored.loc[[row for x, row in enumerate(order) if x < most or row == picks["bsap"]]]
        below.vlines(range(len(shown)), shown["s"], shown["bias"], linewidth=5,
                     color=[colour("bsap") if row == picks["bsap"] else "0.82" for row in shown.index])  # fmt: skip
        below.plot(shown["bias"].to_numpy(), "_", color="0.2", markersize=14, markeredgewidth=2)
        below.plot(shown["s"].to_numpy(), "o", color=colour("clip"), markersize=6)
        frames = {row: colour(name) for name, row in picks.items()}
        for x, (row, (logit, level)) in enumerate(zip(shown.index, shown[["s", "bias"]].to_numpy(), strict=True)):
            crop = OffsetImage(np.asarray(thumbnail(ds, candidates, row, 80)), zoom=0.25)
            below.add_artist(AnnotationBbox(crop, (x, 0), (0, -15), xycoords=below.get_xaxis_transform(), pad=0.15,
                                            boxcoords="offset points", annotation_clip=False,
                                            bboxprops={"edgecolor": frames.get(row, "0.72"), "linewidth": 2}))  # fmt: skip
            for name, value, down in (("clip", f"{logit:.1f}", -29), ("bsap", f"{logit - level:+.1f}", -39)):
                won = row == picks[name]
                below.annotate(value.replace("-", "−"), (x, 0), (0, down), xycoords=below.get_xaxis_transform(),
                               textcoords="offset points", ha="center", va="top", fontsize=7, annotation_clip=False,
                               color=colour(name) if won else "0.35", weight="bold" if won else "normal")  # fmt: skip
        below.set(xticks=[], xlim=(-0.7, len(shown) - 0.3), ylabel="logit")
    marks = [Line2D([], [], marker="o", linestyle="", color=colour("clip")),
             Line2D([], [], marker="_", linestyle="", color="0.2", markersize=10, markeredgewidth=2),
             Line2D([], [], color=colour("bsap"), linewidth=5, solid_capstyle="butt")]  # fmt: skip
    names = [
        "logit s: CLIP takes the highest",
        "bias: its level with the auxiliary prompts",
        "s − bias: BSAP takes the highest",
    ]
    figure.legend(marks, names, loc="outside lower center", ncols=3, handletextpad=0.4, handlelength=1.2)
    return figure
