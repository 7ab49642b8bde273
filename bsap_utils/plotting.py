"""One style for all figures: colour-blind-safe, one colour a method everywhere, sized for a paper's columns.

Importing this module sets the defaults of matplotlib and pandas' HTML. Dollars are text; `parse_math=True` reads them.
"""

import io
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, BboxImage
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .datasets import XYWH, ReferDataset, write_file
from .evaluation import pick
from .regions import Pairs, box_iou, decode_masks

DOUBLE_COLUMN = 7.0  # inches
# name -> label and colour, of Okabe and Ito's palette, completed from Paul Tol's: told apart with every kind of colour vision
METHODS = {
    "clip": ("CLIP", "#D55E00"), "bsap": ("BSAP", "#0072B2"), "bsap_h": ("BSAP-H", "#56B4E9"), "tas": ("As TAS", "#117733"),
    "bsap_minmax": ("BSAP min–max", "#009E73"), "bsap_zscore": ("BSAP z-score", "#332288"), "nnn": ("NNN", "#CC79A7"),
    "bsap_calibrated": ("BSAP, weight w*", "#000000"), "subtraction": ("Subtraction", "#E69F00"), "csls": ("CSLS", "#AA4499"),
    "dn": ("Distribution norm.", "#999933"), "qb_norm": ("QB-Norm, static", "#882255"), "sinkhorn": ("Sinkhorn", "#661100"),
    "qb_norm_dynamic": ("QB-Norm, dynamic", "#CC6677"), "db_norm": ("DB-Norm", "#DDAA33"), "chance": ("Chance", "#9A9A9A"),
    "centred": ("Centred features", "#44AA99"), "oracle": ("Best candidate", "#9A9A9A"), "bsap_half": ("BSAP, w = ½", "#666666"),
}  # fmt: skip
SERIES = ("#009E73", "#CC79A7", "#E69F00", "#332288", "#56B4E9", "#999933", "#882255", "#44AA99")  # what is no method
TRUTH_COLOUR, BLANK = "#FFFFFF", {"frame_on": False, "xticks": [], "yticks": []}
KIND_COLOURS = {"object": "#004488", "part or loose box": "#DDAA33", "bare ground": "#BB5566"}  # Tol's high contrast
COLUMN_LABELS = {
    "n": "expressions", "accuracy": "accuracy, %", "delta_vs_clip": "Δ to CLIP, points", "p_value": "p",
    "p_holm": "p (Holm)", "oiou": "oIoU, %", "miou": "mIoU, %", "delta_oiou_vs_clip": "Δ oIoU", "visual_prompts": "shown",
    "delta_miou_vs_clip": "Δ mIoU", "recall_1": "R@1, %", "recall_5": "R@5, %", "recall_10": "R@10, %",
    "median_rank": "median rank", "aux_bank": "bank", **{f"p{at}": f"P@0.{at // 10}" for at in range(50, 100, 10)},
}  # fmt: skip
mpl.rcParams.update({
    "font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.linewidth": 0.7, "lines.linewidth": 1.4, "figure.dpi": 110, "savefig.dpi": 200,
    "figure.constrained_layout.use": True, "svg.hashsalt": "bsap", "svg.fonttype": "none", "legend.frameon": False,
    "text.parse_math": False,
})  # fmt: skip
pd.set_option("display.html.use_mathjax", False, "styler.html.mathjax", False)
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # an emoji is drawn as a box, without a word each


def label(method: str) -> str:
    """Return a method's name for readers; of one that is not in the table, the name itself."""
    return METHODS[method][0] if method in METHODS else plain(method)


def colour(method: str) -> str:
    """Return a method's colour; grey for one that is not in the table."""
    return METHODS[method][1] if method in METHODS else "0.45"


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: its own where methods are among them, else one of `SERIES`."""
    names = list(dict.fromkeys(names))
    return {name: colour(name) if METHODS.keys() & names else SERIES[i % len(SERIES)] for i, name in enumerate(names)}


def plain(text: Any, width: int = 0, lines: int = 2) -> str:
    """Return `text` as it can be drawn: no half characters or controls, wrapped at `width` to so many lines at most."""
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) if width else text


def show_table(frame: pd.DataFrame, digits: int = 1) -> Any:
    """Return one of our tables for readers: labelled, intervals in brackets, "–" where a number is missing."""
    shown = pd.DataFrame(index=frame.index.map(lambda name: label(name) if isinstance(name, str) else name))
    for name in frame.columns[~frame.columns.str.endswith(("_low", "_high"))]:
        stems = {"accuracy": "ci", "delta_vs_clip": "delta_ci"}
        stem = stems.get(name, name.removesuffix("_vs_clip"))
        columns = [name, f"{stem}_low", f"{stem}_high"] if f"{stem}_low" in frame else [name]
        words = "{} [{}, {}]" if len(columns) == 3 else "{}"
        cells = frame[columns].map(_written, digits=digits + 3 * name.startswith("p_"), sign=name.startswith("delta"))
        shown[COLUMN_LABELS.get(name, name.replace("_", " "))] = [words.format(*row) for row in cells.to_numpy()]
    style = shown.style.format(escape="html").format_index(escape="html")
    return style.hide(axis="index") if isinstance(frame.index, pd.RangeIndex) else style


def _written(value: Any, digits: int, sign: bool = False) -> str:
    """A cell in words: a number in so many digits, a method's label, a dash where nothing is known."""
    form = f"{'+' * sign}.{digits}f" if isinstance(value, float | np.floating) else ""
    if not form or pd.isna(value):
        return "–" if pd.isna(value) else label(str(value))
    return format(round(float(value), digits) + 0.0, form).replace("-", "−")  # 0.0: no "−0.0"


def save(figure: Figure, stem: Path | str, caption: str) -> None:
    """Write `figure` to `stem`.png, in few colours, and `stem`.svg if no picture is in it, with its caption; same bytes."""
    drawn, info, meta = io.BytesIO(), PngInfo(), {"Date": None, "Description": plain(caption)}
    figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")
    if figure.findobj(lambda artist: isinstance(artist, AxesImage | BboxImage)):  # dithered, it is half as large
        # PIL dithers only onto a palette that it is given, and finding one among all 16 million colours would take a minute
        coarse = ImageOps.posterize(picture, 5).point(lambda value: value * 255 // 248)
        palette = coarse.quantize(128, Image.Quantize.MAXCOVERAGE)  # median cut would lose what is small and bright
        few = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    else:
        few = picture.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=3)  # without it pale areas change their tint
        write_file(Path(f"{stem}.svg"), lambda path: figure.savefig(path, format="svg", metadata=meta))
    info.add_itxt("Description", plain(caption))
    options = {"optimize": True, "pnginfo": info, "dpi": picture.info["dpi"]}
    write_file(Path(f"{stem}.png"), lambda path: few.save(path, "PNG", **options))


def intervals(table: pd.DataFrame, value: str = "accuracy", low: str = "ci_low", high: str = "ci_high",
              row: str = "method", hue: str | None = None, axis: plt.Axes | None = None, zero: bool = False,
              digits: int = 1, **labels: Any) -> Figure:  # fmt: skip
    """Return the figure of points with intervals: a line a level of `row`, from the top, in it one a level of `hue`.

    `zero` draws the line of no difference and signs the numbers; `labels` (title, xlabel) go to `Axes.set`.
    """
    rows, groups = list(dict.fromkeys(table[row])), list(dict.fromkeys(table[hue])) if hue else [""]
    shifts = {group: 0.7 * ((number + 0.5) / len(groups) - 0.5) for number, group in enumerate(groups)}
    axis = axis or plt.subplots(figsize=(0.72 * DOUBLE_COLUMN, 0.12 * len(rows) * (1 + len(groups)) + 0.85))[1]
    names = axis.yaxis.major.__dict__.setdefault("names", [label(str(level)) for level in rows])  # one order, if shared
    paint = colours(table[hue or row]) if hue or METHODS.keys() & rows else dict.fromkeys(rows, colour("bsap"))
    if zero:
        axis.axvline(0, color="0.35", linewidth=1, zorder=0)
    for entry in table.to_dict("records"):
        y = names.index(label(str(entry[row]))) + shifts[entry[hue] if hue else ""]
        tone, text = paint[entry[hue or row]], _written(float(entry[value]), digits, zero)
        axis.plot([entry[low], entry[high]], [y, y], color=tone, linewidth=1.3, solid_capstyle="butt")
        axis.plot(entry[value], y, "o", color=tone, markersize=4.5)
        axis.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=7.5, color=tone)  # fmt: skip
    measure = "difference to CLIP, points" if zero else COLUMN_LABELS.get(value, value)
    axis.set(yticks=range(len(names)), yticklabels=names, axisbelow=True, ylim=(len(names) - 0.4, -0.6))
    return _finish(axis, "x", {"xlabel": f"{measure}, 95 % interval"} | labels, paint if hue else {}, "o")


def curves(table: pd.DataFrame, x: str, y: str, hue: str | None = None, low: str | None = None, high: str | None = None,
           axis: plt.Axes | None = None, log: str = "", marker: str = "o", **labels: Any) -> Figure:  # fmt: skip
    """Return the figure of lines with bands from `low` to `high`; log="x" puts an infinite x at the right end."""
    axis = axis or plt.subplots(figsize=(DOUBLE_COLUMN * 0.62, 2.6))[1]
    finite = np.unique(table[x][np.isfinite(table[x])].to_numpy(float))
    end = finite[-1] * (finite[-1] / finite[0]) ** 0.12 if log else np.inf
    paint = colours(table[hue]) if hue else {"": colour("bsap")}
    for name, tone in paint.items():
        part = (table[table[hue] == name] if hue else table).sort_values(x)
        at, known = part[x].clip(upper=end), np.isfinite(part[x])
        axis.plot(at[known], part[y][known], marker=marker, markersize=3, color=tone)
        axis.plot(at[-2:], part[y][-2:], "" if known.all() else ":", marker=marker, markersize=3, color=tone)
        if low and high:
            axis.fill_between(at, part[low], part[high], color=tone, alpha=0.14, linewidth=0)
    if log:
        axis.set(xscale="log")
        axis.xaxis.set(major_formatter="{x:,.10g}", minor_formatter="")
    if np.isinf(table[x]).any():
        few = finite if len(finite) <= 9 else finite[np.isclose(np.log10(finite) % 1, [[0], [1]]).any(0)]
        axis.set_xticks([*few, end], [*map("{:,.10g}".format, few), "∞"])
        axis.minorticks_off()
    words = {"xlabel": x, "ylabel": COLUMN_LABELS.get(y, y)} | labels
    return _finish(axis, "y", words, paint if hue else {}, marker, "-")


def _finish(axis: Any, grid: Any, words: dict, paint: Mapping[str, str], marker: str, line: Any = "") -> Figure:
    """Write the words and name the colours, above a figure of one panel or in each of several. Return the figure."""
    axis.grid(axis=grid, color="0.92")
    axis.set(**words)
    marks = [plt.Line2D([], [], color=tone, marker=marker, markersize=4, linestyle=line) for tone in paint.values()]
    figure, names = axis.get_figure(root=True), [label(str(name)) for name in paint]
    if marks and len(figure.axes) == 1:
        figure.legend(marks, names, loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)
    elif marks:
        axis.legend(marks, names, handletextpad=0.4)
    return figure


def heat_map(frame: pd.DataFrame, measure: str = "accuracy, %", centre: float | None = None, **labels: Any) -> Figure:
    """Show numbers as colours, that diverge from `centre`; the middle of row i and column j is (j + 0.5, i + 0.5)."""
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN, min(4.2, 0.3 * len(frame) + 1.1)))
    sns.heatmap(frame, ax=axis, annot=frame.size <= 80, fmt=".1f", annot_kws={"size": 7}, cbar_kws={"label": measure},
                cmap="cividis" if centre is None else "PuOr", center=centre, xticklabels=False, yticklabels=False)  # fmt: skip
    for names, set_ticks in ((frame.columns, axis.set_xticks), (frame.index, axis.set_yticks)):
        step = -(-len(names) // 12)
        shown = sorted({*range(0, len(names) - step // 2, step), len(names) - 1})
        words = [name if isinstance(name, str) else f"{float(f'{name:.2g}'):,.10g}" for name in names[shown]]
        set_ticks(np.add(shown, 0.5), [label(word).replace("inf", "∞") for word in words], rotation=0)
    axis.axvline(len(frame.columns) - 1, color="white", linewidth=3 if frame.columns[-1] == np.inf else 0)
    axis.set(**{"xlabel": "temperature T", "ylabel": ""} | labels)
    return figure


def picture_grid(pictures: Sequence, captions: Sequence[str], columns: int = 6, titles: Sequence[str] = ()) -> Figure:
    """Show pictures ([H, W, 3] or PIL) in a grid, each over its caption; `titles` name the rows."""
    rows, size = -(-len(pictures) // columns), DOUBLE_COLUMN / columns
    captions = [plain(line, int(17 * size), 3) for line in captions]
    height = rows * (size + 0.13 * max(line.count("\n") + 1 for line in captions) + (0.2 if titles else 0.05))
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE_COLUMN, height), squeeze=False, subplot_kw=BLANK)
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.text(0.5, -0.03, caption, transform=axis.transAxes, fontsize=7, ha="center", va="top")
    for axis, title in zip(axes[:, 0], titles, strict=False):
        axis.set_title(plain(title), fontsize=8).set_in_layout(False)
    return figure


def outline(axis: plt.Axes, box: Sequence[float], colour: str, label: str = "", dashed: bool = False, below: bool = False,
            avoid: Sequence[Sequence[float]] = (), mask: np.ndarray | None = None) -> None:  # fmt: skip
    """Draw a box (xywh), or a mask [H, W], its label in the picture, off boxes, labels and what to `avoid` if possible."""
    x, y, w, h = box
    for width, edge in ((2.8, "black"), (1.4, colour)) if dashed else ((3.0, "white"), (1.8, colour)):
        line: Any = (0, (7 / width, 6 / width)) if dashed else "-"  # in units of the width; a pick shows in the gaps
        if mask is None:
            axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, edgecolor=edge, linewidth=width, linestyle=line))
        elif mask.any() and not mask.all():
            axis.contour(mask, [0.5], colors=[edge], linewidths=width, linestyles=[line])
    if not label:
        return
    (left, right), (low, high) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    point = (right - left) / axis.get_window_extent().width * axis.figure.dpi / 72  # in pixels of the picture
    wide, tall = (4.3 * len(label) + 5) * point, 11 * point
    levels = [y + h, y - tall, y + h - tall, y] if below else [y - tall, y + h, y, y + h - tall]
    places = [(at, level) for level in levels for at in (x, x + w - wide)]
    places += [(at, level) for level in (y, y + h - tall) for at in (x + w, x - wide)]
    spots = [(max(min(a, right - wide), left), max(min(b, high - tall), low), wide, tall) for a, b in places]
    taken = [*avoid, box, *(text.spot for text in axis.texts if hasattr(text, "spot"))]
    x, y, *_ = spot = spots[int(box_iou(np.array(spots)[:, None], np.array(taken)).sum(1).argmin())]
    text = axis.text(x + wide / 2, y + tall / 2, plain(label), ha="center", va="center", fontsize=6.5, color="white",
                     bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"})  # fmt: skip
    text.spot = spot  # type: ignore[attr-defined]


def thumbnail(ds: ReferDataset, candidates: pd.DataFrame, row: int, side: int = 96) -> Image.Image:
    """Cut one candidate out of its picture and fit it into a white square."""
    x, y, w, h = candidates.loc[row, XYWH]
    picture = ds.load_image(candidates.loc[row, "image_id"]).crop((x, y, x + max(w, 1), y + max(h, 1)))
    return ImageOps.pad(picture, (side, side), color="white")


def scene_panel(ds: ReferDataset, candidates: pd.DataFrame, pairs: Pairs, scores: Mapping[str, Tensor], rows: Sequence[int],
                method: str = "bsap") -> Figure:  # fmt: skip
    """Show expressions (row numbers): the target in white dashes, and the picks of `method` and of the first of `scores`."""
    picks = {name: pick(pairs, scores[name]) for name in dict.fromkeys([next(iter(scores)), method])}
    shape = -(-len(rows) // 3), 3
    figure, axes = plt.subplots(*shape, figsize=(7, shape[0] * 6.65 / 3), squeeze=False, subplot_kw=BLANK)
    for axis, row in zip(axes.flat, map(int, rows), strict=False):
        _draw_scene(axis, ds, candidates, pairs, row, {name: int(best[row]) for name, best in picks.items()})
    return figure


def _draw_scene(axis: Any, ds: ReferDataset, candidates: pd.DataFrame, pairs: Pairs, row: int, chosen: dict) -> None:
    """Draw an expression's picture with its target and the candidates in the `chosen` rows of `pairs`, method → row."""
    asked = ds.expressions.iloc[row]
    image, target = ds.load_image(asked["image_id"]), ds.annotations.loc[asked["ann_id"]]
    regions = [*(candidates.loc[int(pairs.candidate[pair])] for pair in chosen.values()), target]
    masks: Any = [None] * len(regions)
    axis.imshow(image)
    if pairs.intersection is not None:
        masks = decode_masks([region["segmentation"] for region in regions], image.height, image.width)
        tint = np.full((*masks.shape[1:], 4), (0.72, 0.72, 0.72, 0.55))  # pale, but for the masks
        tint[masks.any(0)] = 0
        axis.imshow(tint)
    boxes = [region[XYWH].tolist() for region in regions]
    for number, name in enumerate(chosen):
        outline(axis, boxes[number], colour(name), label(name), below=number > 0, avoid=boxes[-1:], mask=masks[number])
    outline(axis, boxes[-1], TRUTH_COLOUR, dashed=True, mask=masks[-1])
    axis.set_title(plain(f"“{asked['text']}”", 36), fontsize=8)
    overlaps = ", ".join(f"{label(name)} {float(pairs.iou[pair]):.2f}" for name, pair in chosen.items())
    axis.text(0.5, -0.02, f"IoU: {overlaps}", transform=axis.transAxes, ha="center", va="top", fontsize=7, color="0.3")


def hero(ds: ReferDataset, candidates: pd.DataFrame, pairs: Pairs, s: Tensor, bias: Tensor, rows: Sequence) -> Figure:
    """Show why CLIP and BSAP (`bias` [C]) pick differently, a column an expression (row numbers), with its eight best."""
    bias = bias[pairs.candidate]
    picks = {"clip": pick(pairs, s), "bsap": pick(pairs, s - bias)}
    figure = plt.figure(figsize=(DOUBLE_COLUMN, 4.7))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.98))  # what hangs below the ladders is not reckoned with
    above, below = figure.subplots(2, len(rows), height_ratios=(2, 1), squeeze=False)
    for scene, ladder, row in zip(above, below, map(int, rows), strict=True):
        chosen = {name: int(best[row]) for name, best in picks.items()}
        _draw_scene(scene, ds, candidates, pairs, row, chosen)
        scene.axis("off")
        own = (pairs.expression == row).nonzero()[:, 0].tolist()
        shown = list(dict.fromkeys([*sorted(own, key=lambda pair: -s[pair])[:8], chosen["bsap"]]))
        crops = [np.asarray(thumbnail(ds, candidates, int(pairs.candidate[pair]), 80)) for pair in shown]
        places = {name: shown.index(pair) for name, pair in chosen.items()}
        _draw_ladder(ladder, s[shown].double().numpy(), bias[shown].numpy(), crops, places)
    figure.legend(*ladder.get_legend_handles_labels(), loc="outside lower center", ncols=3, handletextpad=0.4)
    return figure


def _draw_ladder(axis: Any, s: np.ndarray, bias: np.ndarray, crops: Sequence, picks: Mapping[str, int]) -> None:
    """Draw logit and bias [N] of each candidate, its picture and the two numbers below; `picks`: positions."""
    place: Any = {"xycoords": axis.get_xaxis_transform(), "annotation_clip": False}
    tones, x = {x: colour(name) for name, x in picks.items()}, picks["bsap"]
    axis.plot(s, "o", color=colour("clip"), markersize=6, label="logit s: CLIP takes the highest")
    axis.plot(bias, "_", color="0.2", markersize=14, markeredgewidth=2, label="bias: its level with auxiliary prompts")
    axis.vlines(range(len(s)), s, bias, "0.82", linewidth=5, zorder=1)
    axis.vlines(x, s[x], bias[x], colour("bsap"), linewidth=5, zorder=1, label="s − bias: BSAP takes the highest")
    for x, (logit, gap, crop) in enumerate(zip(s, s - bias, crops, strict=True)):
        edge = {"edgecolor": tones.get(x, "0.72"), "linewidth": 2}
        axis.add_artist(AnnotationBbox(OffsetImage(crop, zoom=0.25), (x, 0), (0, -15), boxcoords="offset points",
                                       pad=0.15, bboxprops=edge, **place))  # fmt: skip
        for name, number, down in (("clip", _written(logit, 1), -29), ("bsap", _written(gap, 1, True), -39)):
            tone, weight = (colour(name), "bold") if x == picks[name] else ("0.35", "normal")
            axis.annotate(number, (x, 0), (0, down), textcoords="offset points", ha="center", va="top", fontsize=7,
                          color=tone, weight=weight, **place)  # fmt: skip
    axis.set(xticks=[], xlim=(-0.7, len(s) - 0.3), ylabel="logit")
