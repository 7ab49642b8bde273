"""One function a figure, one style for all: colour-blind-safe, one colour per method everywhere, sized for a paper's columns.

Every function returns a matplotlib figure; `save` writes it as PNG (200 dpi) and SVG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL.Image import Dither, Image, Quantize
from PIL.ImageOps import posterize

from .datasets import XYWH, ReferDataset
from .proposals import decode_masks
from .visual_prompts import VISUAL_PROMPTS, patch_masks, show_regions, squash

SINGLE_COLUMN, DOUBLE_COLUMN = 3.4, 7.0  # inches
METHOD_LABELS = {
    "clip": "CLIP", "bsap": "BSAP", "bsap_h": "BSAP-H", "bsap_minmax": "BSAP min–max", "bsap_zscore": "BSAP z-score",
    "subtraction": "Subtraction", "dn": "Distribution norm.", "nnn": "NNN", "qb_norm": "QB-Norm",
    "oracle": "Best candidate", "family": "Family",
}  # fmt: skip
# Okabe and Ito's palette, completed from Paul Tol's: told apart with every common kind of colour vision.
METHOD_COLOURS = {
    "clip": "#D55E00", "bsap": "#0072B2", "bsap_h": "#56B4E9", "bsap_minmax": "#009E73", "bsap_zscore": "#332288",
    "subtraction": "#E69F00", "dn": "#999933", "nnn": "#CC79A7", "qb_norm": "#882255", "oracle": "#9A9A9A", "family": "#000000",
}  # fmt: skip
TRUTH_COLOUR = "#FFFFFF"

STYLE = {
    "font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.linewidth": 0.7, "lines.linewidth": 1.4, "figure.dpi": 110, "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "bsap", "svg.fonttype": "none", "legend.frameon": False,
}  # fmt: skip
mpl.rcParams.update(STYLE)  # type: ignore[arg-type]


def save(figure: Figure, stem: Path | str) -> None:
    """Write `figure` to `stem`.png and `stem`.svg; the same figure gives the same bytes."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(stem.with_name(stem.name + suffix), metadata=metadata)


def with_palette(picture: Image, colours: int = 128) -> Image:
    """Return a photograph in few colours, dithered: much the same to the eye, and a PNG of it is half as large or less."""
    # the default, median cut, loses what is small and bright; and PIL dithers only onto a palette that it is given, which
    # of all 16 million colours would take a minute: so of 32,768, white among them
    picture = picture.convert("RGB")
    coarse = posterize(picture, 5).point(lambda value: value * 255 // 248)
    palette = coarse.quantize(colours, Quantize.MAXCOVERAGE)
    return picture.quantize(palette=palette, dither=Dither.FLOYDSTEINBERG)


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> Figure:
    """Show pictures [H, W, 3] in a grid, each over its caption."""
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(DOUBLE_COLUMN, rows * (DOUBLE_COLUMN / columns + 0.25)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.set_title("\n".join(textwrap.wrap(caption, 15)[:3]), fontsize=6, loc="center", y=-0.02, va="top")
    return figure


def visual_prompt_sheet(
    image: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, labels: Sequence[str], grid: tuple[int, int] = (7, 7)
) -> Figure:
    """Show regions of one image under every visual prompt, squashed to a square as CLIP gets them.

    `image` [3, H, W] uint8, `boxes` [N, 4] xywh in pixels, `masks` [N, H, W] bool, `labels` a name for each region,
    `grid` the patches of the model (rows, columns). Two rows a region: the first picture has its box, and in the last,
    global_local, the patches that are hidden are dark (its other half is mask_crop).
    """
    size, columns = 224, 6
    names = [name for name in VISUAL_PROMPTS if name != "global_local"]
    whole = squash(image, size)
    kept = torch.nn.functional.interpolate(patch_masks(masks, grid).view(-1, 1, *grid).float(), size=(size, size)) > 0
    hidden = torch.where(kept, whole, (whole * 0.25).byte())
    shown = [whole.expand(len(boxes), -1, -1, -1), *show_regions(image, boxes, names, size, masks), hidden]
    pictures = torch.stack(shown, 1).permute(0, 1, 3, 4, 2).cpu().numpy()
    rows = len(boxes) * (len(shown) // columns)
    height = rows * (DOUBLE_COLUMN / columns + 0.22)
    figure, axes = plt.subplots(rows, columns, figsize=(DOUBLE_COLUMN, height), squeeze=False)
    corners = boxes.cpu() * size / torch.tensor([image.shape[2], image.shape[1]] * 2)
    cells_of_region = axes.reshape(len(boxes), -1)
    for of_region, box, label, cells in zip(pictures, corners.tolist(), labels, cells_of_region, strict=True):
        for axis, picture, caption in zip(cells, of_region, [label, *names, "global_local"], strict=True):
            axis.imshow(picture)
            weight = "bold" if axis is cells[0] else "normal"
            axis.set_title(caption, fontsize=8, fontweight=weight, loc="center", pad=3)
            axis.axis("off")
        for width, colour in ((2.4, "white"), (1.2, METHOD_COLOURS["bsap"])):
            cells[0].add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=colour, linewidth=width))
    return figure


def training_curve(losses: Sequence[float], window: int = 50) -> Figure:
    """Show the loss of each step (thin) and its running mean."""
    figure, axis = plt.subplots(figsize=(SINGLE_COLUMN, 2.2))
    loss = pd.Series(losses)
    axis.plot(loss, color="0.8", linewidth=0.6)
    axis.plot(loss.rolling(min(window, len(loss)), min_periods=1).mean(), color="0.2")
    axis.set(xlabel="step", ylabel="contrastive loss", title="Training loss")
    return figure


def accuracy_bars(table: pd.DataFrame, title: str, chance: float | None = None, oracle: float | None = None) -> Figure:
    """Show accuracy with its 95 % interval, a bar a method, from `evaluation.rec_table`. `chance` and `oracle` are in percent."""
    table = table.iloc[::-1]
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.72, 0.3 * len(table) + 0.9))
    error = np.abs(table[["ci_low", "ci_high"]].to_numpy().T - table["accuracy"].to_numpy())
    position = np.arange(len(table))
    axis.barh(position, table["accuracy"], xerr=error, color=[METHOD_COLOURS[m] for m in table["method"]], height=0.72,
              error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "0.15"})  # fmt: skip
    axis.set_yticks(position, [METHOD_LABELS[m] for m in table["method"]])
    for y, accuracy, high in zip(position, table["accuracy"], table["ci_high"], strict=True):
        axis.text(high + 1, float(y), f"{accuracy:.1f}", va="center", fontsize=8)
    for value, name in ((chance, "chance"), (oracle, "best candidate")):
        if value is not None:
            axis.plot([value, value], [-0.5, len(table) - 0.4], color="0.35", linestyle=":", linewidth=1)
            axis.text(
                value, len(table) - 0.35, f"{name} {value:.1f}", ha="center", va="bottom", fontsize=7, color="0.35"
            )
    axis.set(xlim=(0, min(100, max(table["ci_high"].max() + 8, (oracle or 0) + 2))), ylim=(-0.6, len(table) - 0.2))
    axis.set(xlabel="accuracy, % of expressions (IoU > 0.5), 95 % interval")
    axis.set_title(title, pad=16)
    return figure


def _outline(
    axis: plt.Axes, box: Sequence[float], colour: str, label: str, dashed: bool = False, below: bool = False
) -> None:
    x, y, w, h = box
    for width, edge in ((2.4, "black"), (1.3, colour)) if dashed else ((3.4, "white"), (2.0, colour)):
        line = (0, (3, 2)) if dashed and edge == colour else "-"
        axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=edge, linewidth=width, linestyle=line))
    if label:
        at = (x, y + h) if below else (x, y)
        axis.annotate(label, at, xytext=(0, -2 if below else 2), textcoords="offset points",
                      va="top" if below else "bottom", fontsize=6.5, color="white", annotation_clip=False,
                      bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"})  # fmt: skip


def scene_panel(ds: ReferDataset, scenes: pd.DataFrame, method: str = "bsap", columns: int = 3) -> Figure:
    """Show scenes with the truth (white dashes), CLIP's choice and that of `method`, each under its expression.

    `scenes` has one row a scene: image_id, text, outcome (a word for the title), and boxes xywh in pixels in the columns truth,
    clip and `method`; scores to print with the boxes, if any, in clip_score and `method`_score.
    """
    rows = -(-len(scenes) // columns)
    outcomes = {"win": f"only {METHOD_LABELS[method]} is right", "loss": "only CLIP is right"}
    figure, axes = plt.subplots(
        rows, columns, figsize=(DOUBLE_COLUMN, rows * DOUBLE_COLUMN / columns * 0.92), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (_, scene) in zip(axes.flat, scenes.iterrows(), strict=False):
        axis.imshow(ds.load_image(scene["image_id"]))
        axis.set_autoscale_on(False)
        _outline(axis, scene["truth"], TRUTH_COLOUR, "", dashed=True)
        for name in dict.fromkeys(["clip", method]):
            score = scene.get(f"{name}_score")
            label = METHOD_LABELS[name] + ("" if score is None else f" {score:.2g}")
            same = name != "clip" and tuple(scene[name]) == tuple(scene["clip"])
            _outline(axis, scene[name], METHOD_COLOURS[name], label, below=same or name != "clip")
        axis.set_title("\n".join(textwrap.wrap(f"“{scene['text']}”", 34)), fontsize=8)
        axis.text(
            0.5,
            -0.02,
            outcomes.get(scene["outcome"], scene["outcome"]),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=7,
            color="0.3",
        )
    return figure


def hero(ds: ReferDataset, regions: pd.DataFrame, scenes: Sequence[dict[str, Any]], most: int = 8) -> Figure:
    """Show why CLIP and BSAP pick differently, a column for each of `analysis.typical_scenes`: the picture, and under it
    the `most` candidates with the highest logits (and BSAP's pick), each with its logit, its bias and what lies between.
    """
    figure = plt.figure(figsize=(DOUBLE_COLUMN, 4.7), layout=ConstrainedLayoutEngine(h_pad=0.07))
    panels: Any = figure.subplots(2, len(scenes), height_ratios=(2, 1), squeeze=False)
    for (above, below), scene in zip(panels.T, scenes, strict=True):
        image = posterize(ds.load_image(scene["image_id"]), 5)
        picks = {scene[name]: name for name in ("clip", "bsap")}
        scored = scene["candidates"].sort_values("logit", ascending=False)
        shown = scored[(np.arange(len(scored)) < most) | (scored.index == scene["bsap"])]
        above.imshow(image, interpolation="nearest")
        above.set_autoscale_on(False)
        above.axis("off")
        above.set_title(
            f"“{scene['text']}”: BSAP {'mends' if scene['outcome'] == 'win' else 'breaks'} it", weight="bold"
        )
        for row, name in picks.items():
            right = (name == "bsap") == (scene["outcome"] == "win")
            label = f"{METHOD_LABELS[name]}: {'right' if right else 'wrong'}"
            _outline(above, regions.loc[row, XYWH].tolist(), METHOD_COLOURS[name], label)
        _outline(above, scene["truth"], TRUTH_COLOUR, "", dashed=True)
        for x, (row, (logit, bias)) in enumerate(zip(shown.index, shown[["logit", "bias"]].to_numpy(), strict=True)):
            colour = METHOD_COLOURS.get(picks.get(row, ""), "0.72")
            below.vlines(x, logit, bias, color=colour if row == scene["bsap"] else "0.82", linewidth=5)
            below.plot(x, bias, "_", color="0.2", markersize=14, markeredgewidth=2)
            below.plot(x, logit, "o", color=METHOD_COLOURS["clip"], markersize=6)
            x0, y0, width, height = regions.loc[row, XYWH]
            crop = image.crop((x0, y0, x0 + max(width, 1), y0 + max(height, 1))).resize((40, 40))
            picture = OffsetImage(np.asarray(crop), zoom=0.5, interpolation="nearest")
            at = {"xycoords": below.get_xaxis_transform(), "annotation_clip": False}
            below.add_artist(AnnotationBbox(picture, (x, 0), (0, -15), boxcoords="offset points", pad=0.15,
                                            bboxprops={"edgecolor": colour, "linewidth": 2}, **at))  # fmt: skip
            for name, value, down in (("clip", f"{logit:.1f}", -29), ("bsap", f"{logit - bias:+.1f}", -39)):
                below.annotate(value.replace("-", "−"), (x, 0), (0, down), textcoords="offset points", ha="center", va="top",
                               fontsize=7, color=METHOD_COLOURS[name] if row == scene[name] else "0.35",
                               weight="bold" if row == scene[name] else "normal", **at)  # fmt: skip
        for name, value, down in (("clip", "s", -29), ("bsap", "s − bias", -39)):
            below.annotate(value, (0, 0), (-4, down), textcoords="offset points", ha="right", va="top", fontsize=7,
                           color=METHOD_COLOURS[name], **{**at, "xycoords": "axes fraction"})  # fmt: skip
        below.set(xticks=[], xlim=(-0.7, len(shown) - 0.3), ylabel="logit")
        below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    marks = [Line2D([], [], marker="o", linestyle="", color=METHOD_COLOURS["clip"]),
             Line2D([], [], marker="_", linestyle="", color="0.2", markersize=10, markeredgewidth=2),
             Line2D([], [], color=METHOD_COLOURS["bsap"], linewidth=5, solid_capstyle="butt")]  # fmt: skip
    said = [
        "logit s: CLIP takes the highest",
        "bias: its level with the auxiliary prompts",
        "s − bias: BSAP takes the highest",
    ]
    figure.legend(
        marks, said, loc="outside lower center", ncols=3, handletextpad=0.4, columnspacing=1.2, handlelength=1.2
    )
    return figure


def ris_bars(table: pd.DataFrame, title: str) -> Figure:
    """Show oIoU and mIoU with their 95 % intervals, a bar a method, from `evaluation.ris_table`; the ceiling hatched."""
    table = table.iloc[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE_COLUMN, 0.3 * len(table) + 0.95), sharey=True)
    position = np.arange(len(table))
    for axis, measure, name in zip(axes, ("oiou", "miou"), ("overall IoU", "mean IoU"), strict=True):
        error = np.abs(table[[f"{measure}_low", f"{measure}_high"]].to_numpy().T - table[measure].to_numpy())
        bars = axis.barh(
            position,
            table[measure],
            xerr=error,
            color=[METHOD_COLOURS[m] for m in table["method"]],
            height=0.72,
            error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "0.15"},
        )
        for y, (value, high, method) in enumerate(
            table[[measure, f"{measure}_high", "method"]].itertuples(index=False)
        ):
            axis.text(high + 1, y, f"{value:.1f}", va="center", fontsize=8)
            if method == "oracle":
                bars[y].set(facecolor="white", edgecolor=METHOD_COLOURS[method], hatch="////")
        axis.set_xlim(0, max(table["oiou_high"].max(), table["miou_high"].max()) + 12)
        axis.set(xlabel=f"{name}, %, 95 % interval", title=f"{'o' if measure == 'oiou' else 'm'}IoU")
        axis.set_yticks(position, [METHOD_LABELS[m] for m in table["method"]])
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def iou_curves(curve: pd.DataFrame, gains: pd.Series, method: str = "bsap") -> Figure:
    """Show how good the chosen masks are: precision at every IoU (`evaluation.precision_curve`), and who chose the better one.

    `gains` holds the IoU of `method` minus CLIP's, one an expression.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(DOUBLE_COLUMN, 2.7))
    styles = {"clip": "--", "oracle": ":"}
    for name, part in curve.groupby("method", sort=False):
        style, colour = styles.get(name, "-"), METHOD_COLOURS[name]
        left.plot(part["threshold"], part["precision"], style, color=colour, label=METHOD_LABELS[name])
    left.set(xlabel="IoU with the truth of at least", ylabel="expressions, %", title="Precision at every IoU")
    left.set(xlim=(0, 1), ylim=(0, 101))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=curve["method"].nunique())
    ordered = np.sort(gains.to_numpy())[::-1]
    share = np.linspace(0, 100, len(ordered))
    for sign, name in ((1, method), (-1, "clip")):
        counted = (np.sign(ordered) == sign).mean() * 100
        right.fill_between(share, ordered, where=sign * ordered >= 0, color=METHOD_COLOURS[name], linewidth=0)
        right.text(
            2 if sign > 0 else 98,
            -0.09 if sign > 0 else 0.05,
            f"{METHOD_LABELS[name]} better: {counted:.1f} %",
            ha="left" if sign > 0 else "right",
            va="top" if sign > 0 else "bottom",
            color=METHOD_COLOURS[name],
        )
    right.axhline(0, color="0.2", linewidth=0.7)
    right.set(
        xlabel="expressions, %, sorted",
        ylabel=f"IoU of {METHOD_LABELS[method]} − IoU of CLIP",
        xlim=(0, 100),
        ylim=(-1.02, 1.02),
        title="Wins and losses",
    )
    return figure


def mask_panel(ds: ReferDataset, scenes: pd.DataFrame, method: str = "bsap", columns: int = 3) -> Figure:
    """Show scenes with the masks CLIP and `method` chose (filled) and the truth (white dashes), each under its expression.

    `scenes` is `evaluation.ris_scenes`: image_id, text, outcome, the segmentations truth, clip and `method`, and their IoU.
    """
    rows = -(-len(scenes) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(DOUBLE_COLUMN, rows * DOUBLE_COLUMN / columns * 0.95), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (_, scene) in zip(axes.flat, scenes.iterrows(), strict=False):
        image = ds.load_image(scene["image_id"])
        truth, *chosen = decode_masks([scene["truth"], scene["clip"], scene[method]], image.height, image.width)
        pale = 0.3 + 0.45 * np.asarray(image.convert("L"))[..., None] / 255 + 0.25 * np.asarray(image) / 255
        shown = np.where(np.any([truth, *chosen], axis=0)[..., None], np.asarray(image) / 255, pale)
        for name, mask in zip(("clip", method), chosen, strict=True):
            colour = np.array(mpl.colors.to_rgb(METHOD_COLOURS[name]))
            shown = np.where(mask[..., None], 0.5 * shown + 0.5 * colour, shown)
        axis.imshow(shown)
        for name, mask, below in zip(("clip", method), chosen, (False, True), strict=True):
            axis.contour(mask, [0.5], colors=[METHOD_COLOURS[name]], linewidths=1.4)
            y, x = np.nonzero(mask)
            if len(x):
                edge = y.max() if below else y.min()
                inside = np.clip([x[y == edge].mean() / image.width, edge / image.height], [0.18, 0.07], [0.82, 0.93])
                axis.annotate(
                    f"{METHOD_LABELS[name]} {scene[f'{name}_iou']:.2f}",
                    inside * image.size,
                    xytext=(0, -2 if below else 2),
                    textcoords="offset points",
                    ha="center",
                    va="top" if below else "bottom",
                    fontsize=6.5,
                    color="white",
                    bbox={"boxstyle": "square,pad=0.15", "facecolor": METHOD_COLOURS[name], "edgecolor": "none"},
                )
        for width, line, style in ((2.4, "black", "solid"), (1.2, TRUTH_COLOUR, (0, (3, 2)))):
            axis.contour(truth, [0.5], colors=[line], linewidths=width, linestyles=[style])
        axis.set_title("\n".join(textwrap.wrap(f"“{scene['text']}”", 34)), fontsize=8)
        outcome = {"win": f"only {METHOD_LABELS[method]} is right", "loss": "only CLIP is right"}[scene["outcome"]]
        axis.text(0.5, -0.02, outcome, transform=axis.transAxes, ha="center", va="top", fontsize=7, color="0.3")
    return figure


def gains(breakdown: pd.DataFrame, method: str = "bsap") -> Figure:
    """Show accuracy of CLIP and `method` per slice: a dot each, joined, with intervals and the number of expressions.

    `breakdown` has the columns aspect, slice, method, n, accuracy, ci_low, ci_high (percent), in the order to show.
    """
    aspects = list(dict.fromkeys(breakdown["aspect"]))
    counts = [breakdown.loc[breakdown["aspect"] == aspect, "slice"].nunique() for aspect in aspects]
    figure, axes = plt.subplots(
        1, len(aspects), figsize=(DOUBLE_COLUMN, 2.5), sharey=True, width_ratios=counts, squeeze=False
    )
    for axis, aspect in zip(axes.flat, aspects, strict=True):
        part = breakdown[breakdown["aspect"] == aspect]
        slices = list(dict.fromkeys(part["slice"]))
        for offset, name in ((-0.13, "clip"), (0.13, method)):
            one = part[part["method"] == name].set_index("slice").loc[slices]
            error = np.abs(one[["ci_low", "ci_high"]].to_numpy().T - one["accuracy"].to_numpy())
            axis.errorbar(np.arange(len(slices)) + offset, one["accuracy"], error, fmt="o", markersize=5,
                          color=METHOD_COLOURS[name], capsize=2, label=METHOD_LABELS[name])  # fmt: skip
        n = part[part["method"] == "clip"].set_index("slice").loc[slices, "n"]
        axis.set_xticks(range(len(slices)), [f"{s}\n({k:,})" for s, k in zip(slices, n, strict=True)], fontsize=7)
        axis.set_xlim(-0.5, len(slices) - 0.5)
        axis.set_title(aspect)
        sns.despine(ax=axis, left=axis is not axes.flat[0])
        axis.grid(axis="y", color="0.92")
    axes.flat[0].set_ylabel("accuracy, %")
    axes.flat[0].set_ylim(0, 100)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, handletextpad=0.2)
    return figure


REGION_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#999933")


def worked_example(image: Image, boxes: np.ndarray, logits: pd.DataFrame, steps: pd.DataFrame) -> Figure:
    """Show one expression from logits to the pick: the picture with its regions, the logits, and each step as bars.

    `boxes` [N, 4] (xywh, pixels); `logits` [N, texts], the expression first; `steps` [N, S]: a panel a column, each with
    its highest bar filled. The index of both names the regions.
    """
    figure = plt.figure(figsize=(DOUBLE_COLUMN, 4.9))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    above, below = parts
    left, right = np.ravel(above.subplots(1, 2))
    left.imshow(image)
    left.set_autoscale_on(False)
    left.axis("off")
    left.set_title(logits.columns[0])
    for box, name, colour in zip(boxes, logits.index, REGION_COLOURS, strict=False):
        _outline(left, box, colour, str(name))
    sns.heatmap(logits, ax=right, cmap="cividis", linewidths=0.5, cbar_kws={"label": "logit", "aspect": 30})
    right.axvline(1, color="white", linewidth=4)
    columns, rows = (np.arange(count) + 0.5 for count in logits.shape[::-1])
    right.set_xticks(columns, logits.columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    right.set_yticks(rows, logits.index, rotation=0)
    right.set_title("Its logits, and those of auxiliary prompts")
    panels = np.ravel(below.subplots(1, steps.shape[1], sharey=True))
    for axis, (name, values) in zip(panels, steps.items(), strict=True):
        colours = REGION_COLOURS[: len(values)]
        filled = [c if v == values.max() else "white" for c, v in zip(colours, values, strict=True)]
        bars = axis.barh(np.arange(len(values)), values, color=filled, edgecolor=colours, linewidth=1.2)
        axis.bar_label(bars, fmt="%.2f" if values.abs().max() > 1 else "%.3f", fontsize=7, padding=2)
        axis.margins(x=0.4)
        axis.axvline(0, color="0.2", linewidth=0.7)
        axis.set_yticks(np.arange(len(values)), values.index)
        axis.set_title(name, fontsize=8)
    panels[0].invert_yaxis()
    return figure


MOST_ROWS = 20  # regions that `region_scores` lists: more could not be read


def region_scores(image: Image, boxes: np.ndarray, table: pd.DataFrame, method: str, expression: str,
                  truth: np.ndarray | None = None, right: Sequence[int] = (),
                  figure: Figure | None = None) -> Figure:  # fmt: skip
    """Show a picture with its regions, and beside it each region's logit, bias and corrected score, sorted by the logit.

    `boxes` [N, 4] (xywh, pixels); `table` [N, 3] has the columns clip, bias, score (of `method`), its index names the
    regions; `truth` [4] is the box that is meant and `right` the positions of the regions that count as it, where that is
    known. CLIP's pick and that of `method` have their method's colour. `figure` is drawn over, which is quicker than a new one.
    """
    figure = figure or Figure(figsize=(DOUBLE_COLUMN, 3.2))
    figure.clear()
    figure.set_layout_engine(
        "none"
    )  # two axes in fixed places, without ticks: it is drawn anew for each move of a slider
    picks = {"clip": int(table["clip"].argmax()), method: int(table["score"].argmax())}
    order = np.argsort(-table["clip"].to_numpy(), kind="stable")
    rows = [*order[:MOST_ROWS], *(i for i in {picks[method], *right} if i not in order[:MOST_ROWS])]
    left, panel = figure.add_axes((0.005, 0.07, 0.49, 0.84), anchor="NW"), figure.add_axes((0.535, 0.02, 0.46, 0.97))
    for axis in (left, panel):
        axis.axis("off")
    shown = image.copy()
    shown.thumbnail((800, 800))  # a photo of a camera would take most of the time
    left.imshow(shown, extent=(0, image.width, image.height, 0), interpolation="bilinear")
    left.set_autoscale_on(False)
    for i in rows:
        x, y, w, h = boxes[i]
        for width, edge in ((1.6, "black"), (0.8, "white")):
            left.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=edge, linewidth=width))
        left.text(x + w, y + h, str(table.index[i]), fontsize=6.5, color="white", ha="right", va="bottom",
                  bbox={"boxstyle": "square,pad=0.12", "facecolor": "0.15", "edgecolor": "none"})  # fmt: skip
    apart = 0.012 * max(image.size)  # frames of the same region lie around each other
    for name, i in picks.items():
        frames = (i in right) + (name == "clip" and method != "clip" and i == picks[method])
        around = boxes[i] + frames * apart * np.array([-1, -1, 2, 2])
        _outline(left, around.tolist(), METHOD_COLOURS[name], METHOD_LABELS[name], below=name != "clip")
    if truth is not None:
        _outline(left, truth.tolist(), TRUTH_COLOUR, "", dashed=True)
    title = textwrap.wrap(f"“{expression}”", 52)
    figure.text(0.005, 0.925, title[0] + (" …" if len(title) > 1 else ""), fontsize=9, va="bottom", parse_math=False)
    known = "White dashes: what is meant. ✓: overlaps it with IoU > 0.5. " if truth is not None else ""
    few = f"{len(rows)} of {len(table)} regions are listed." if len(rows) < len(table) else ""
    figure.text(0.005, 0.015, known + few, fontsize=7, color="0.35", va="bottom")

    place, height = np.arange(len(rows)), max(len(rows), 8)
    panel.set(xlim=(-0.22, 3), ylim=(height - 0.5, -0.07 * height - 0.5))
    for y, i in enumerate(rows):
        panel.text(-0.05, y, ("✓ " if i in right else "") + str(table.index[i]), va="center_baseline", ha="right")
    titles = {"clip": "CLIP's logit", "bias": "its bias", "score": METHOD_LABELS[method]}
    colours = {"clip": METHOD_COLOURS["clip"], "bias": OF_REGION, "score": METHOD_COLOURS[method]}
    picked = {"clip": [picks["clip"]], "bias": rows, "score": [picks[method]]}
    for start, (column, title_of) in enumerate(titles.items()):
        values = table[column].to_numpy()[rows]
        end = start + 0.06 + 0.5 * (values - values.min()) / (float(np.ptp(values)) or 1.0)
        fill = [colours[column] if i in picked[column] else "0.65" for i in rows]
        panel.vlines(start, -0.5, len(rows) - 0.5, color="0.2", linewidth=0.7)
        panel.hlines(place, start, end, color=fill, linewidth=1.4)
        panel.scatter(end, place, color=fill, s=14, zorder=3)
        for x, y, value, i in zip(end.tolist(), place.tolist(), values, rows, strict=True):
            weight = "bold" if column != "bias" and i in picked[column] else "normal"
            panel.text(
                x + 0.045, y, f"{value:.2f}".replace("-", "−"), va="center_baseline", fontsize=7, fontweight=weight
            )
        panel.scatter(start + 0.03, -0.045 * height - 0.5, color=colours[column], s=22)
        panel.text(start + 0.09, -0.045 * height - 0.5, title_of, va="center_baseline")
    return figure


def pool_curves(pools: pd.DataFrame) -> Figure:
    """Show what each temperature (index, ∞ last) makes of a region's auxiliary logits; a column a region."""
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.62, 2.4))
    for (name, pool), colour in zip(pools.items(), REGION_COLOURS, strict=False):
        axis.plot(range(len(pool)), pool, color=colour, label=str(name))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _temperature_ticks(axis, list(pools.index))
    axis.set(ylabel="T · log mean exp(a / T)", title="From a region's largest auxiliary logit to its mean")
    return figure


def _temperature_ticks(axis: plt.Axes, temperatures: Sequence[float]) -> None:
    """Label an axis whose positions 0, 1, … are `temperatures`: powers of ten and ∞."""
    last = len(temperatures) - 1  # the power just before ∞ would touch it
    powers = [
        i
        for i, t in enumerate(temperatures)
        if i == last or (i < last - 1 and np.isclose(np.log10(t) % 1, [0, 1]).any())
    ]
    axis.set_xticks(powers, ["∞" if np.isinf(temperatures[i]) else f"{temperatures[i]:g}" for i in powers])
    axis.set_xlabel("temperature T")


def family_map(accuracy: pd.DataFrame, unclear: np.ndarray, points: pd.DataFrame, title: str) -> Figure:
    """Show accuracy (percent) over temperatures (columns, ∞ last) and weights (index), with published methods on it.

    `unclear` [W, T] marks the settings whose difference to the best is not told from chance: they are outlined.
    `points` has a row a mark: label, temperature, weight, colour, approximate (a hollow mark); temperatures between
    columns are interpolated, and marks that (nearly) coincide share one label.
    """
    finite = np.log(np.array(accuracy.columns[:-1], dtype=float))
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN, 3.9))
    figure.colorbar(
        axis.imshow(accuracy, origin="lower", aspect="auto", cmap="cividis"), label="accuracy, %", aspect=30
    )
    edges = (-0.5, accuracy.shape[1] - 0.5, -0.5, accuracy.shape[0] - 0.5)
    if unclear.any() and not unclear.all():
        axis.contour(np.kron(unclear, np.ones((8, 8))), [0.5], colors="white", linewidths=1.2, extent=edges)
    axis.axvline(len(finite) - 0.5, color="white", linewidth=3)
    _temperature_ticks(axis, list(accuracy.columns))
    rows = np.arange(0, len(accuracy), max(1, (len(accuracy) - 1) // 4))
    axis.set_yticks(rows, [f"{accuracy.index[row]:g}" for row in rows])
    x = np.interp(np.log(np.minimum(points["temperature"], 1e300)), finite, np.arange(len(finite)))
    x = np.where(np.isinf(points["temperature"]), len(finite), x)
    y = np.interp(points["weight"], accuracy.index, np.arange(len(accuracy)))
    labelled = np.zeros(len(points), dtype=bool)
    for i, point in enumerate(points.itertuples()):
        shape, size = ("*", 13) if point.label == "chosen" else ("o", 8)
        face, edge = ("none", point.colour) if point.approximate else (point.colour, "white")
        axis.plot(x[i], y[i], shape, markersize=size, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.5,
                  clip_on=False, zorder=5)  # fmt: skip
        near = (np.abs(x - x[i]) < 0.12 * len(finite)) & (np.abs(y - y[i]) < 0.06 * len(accuracy)) & ~labelled
        if near[i]:
            labelled |= near
            side, top = ("right" if x[i] > 0.7 * len(finite) else "left"), y[i] > 0.9 * len(accuracy)
            axis.annotate(", ".join(points["label"][near]), (x[near].mean(), y[i]), va="center", ha=side, fontsize=7.5,
                          xytext=(-9 if side == "right" else 9, -12 if top else 10), textcoords="offset points", zorder=6,
                          bbox={"boxstyle": "square,pad=0.2", "facecolor": "white", "edgecolor": point.colour})  # fmt: skip
    axis.set(ylabel="weight w", title=title)
    return figure


_CLIP_COLUMNS, _OTHER_COLUMNS = ("clip_accuracy", "clip_ci_low", "clip_ci_high"), ("accuracy", "ci_low", "ci_high")


def ablation_dots(table: pd.DataFrame, title: str, default: int = 0, label: str = "BSAP") -> Figure:
    """Show an `analysis.ablation_table`: a row a level, the default in bold, with accuracies and their intervals.

    CLIP's is a band where it is the same at every level.
    """
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.8, 0.32 * len(table) + 1.0))
    shared = table["clip_accuracy"].nunique() == 1
    series = [("bsap", 0.0 if shared else 0.14, *_OTHER_COLUMNS, label)]
    if shared:
        accuracy, low, high = table[list(_CLIP_COLUMNS)].iloc[0]
        axis.axvspan(low, high, color=METHOD_COLOURS["clip"], alpha=0.13, linewidth=0)
        axis.axvline(accuracy, color=METHOD_COLOURS["clip"], label="CLIP")
    else:
        series.insert(0, ("clip", -0.14, *_CLIP_COLUMNS, "CLIP"))
    of_method = {
        text: METHOD_COLOURS[name] for name, text in METHOD_LABELS.items()
    }  # a level that is a method has its colour
    for name, shift, column, low, high, said in series:
        own = of_method if name == "bsap" else {}
        legend = None if set(own) & set(table["level"]) else said
        for y, row in table.reset_index(drop=True).iterrows():
            error = [[row[column] - row[low]], [row[high] - row[column]]]
            axis.errorbar([row[column]], [float(y) + shift], xerr=error, fmt="o", markersize=4.5, capsize=2,
                          color=own.get(row["level"], METHOD_COLOURS[name]), label=legend if y == 0 else None)  # fmt: skip
    axis.set_yticks(range(len(table)), table["level"])
    axis.get_yticklabels()[default].set_fontweight("bold")
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.grid(axis="x", color="0.92")
    axis.set(xlabel="accuracy, %, 95 % interval")
    axis.set_title(title, pad=18)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.4)
    return figure


def ablation_curve(
    table: pd.DataFrame, values: Sequence[float], title: str, default: int, label: str = "BSAP", xlabel: str = ""
) -> Figure:
    """Show an `analysis.ablation_table` along a number: accuracy with its interval as a band, CLIP's, the default dotted.

    `values` are the levels. Without an `xlabel` they are temperatures, ∞ last.
    """
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.62, 2.6))
    x = np.asarray(values) if xlabel else np.arange(len(values))
    for name, columns, marker in (("clip", _CLIP_COLUMNS, ""), ("bsap", _OTHER_COLUMNS, "o")):
        accuracy, low, high = (table[column] for column in columns)
        axis.fill_between(x, low, high, color=METHOD_COLOURS[name], alpha=0.16, linewidth=0)
        axis.plot(
            x, accuracy, color=METHOD_COLOURS[name], marker=marker, markersize=3, label=label if marker else "CLIP"
        )
    axis.axvline(x[default], color="0.4", linestyle=":", linewidth=1)
    axis.set_xlabel(xlabel)
    if not xlabel:
        _temperature_ticks(axis, values)
    axis.grid(axis="y", color="0.92")
    axis.set_ylabel("accuracy, %")
    axis.set_title(title, pad=18)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.4)
    return figure


def bank_sizes(table: pd.DataFrame, clip: float) -> Figure:
    """Show accuracy by number of auxiliary prompts, a panel a bank: mean of the draws, their range (band), interval (bars).

    `table` has the columns bank, size, accuracy, ci_low, ci_high, draw_low, draw_high; `clip` is CLIP's accuracy (percent).
    """
    banks = list(dict.fromkeys(table["bank"]))
    figure, axes = plt.subplots(1, len(banks), figsize=(DOUBLE_COLUMN, 2.5), sharex=True, sharey=True, squeeze=False)
    for axis, bank in zip(axes.flat, banks, strict=True):
        part = table[table["bank"] == bank]
        error = np.abs(part[["ci_low", "ci_high"]].to_numpy().T - part["accuracy"].to_numpy())
        colour = METHOD_COLOURS["bsap"]
        axis.fill_between(part["size"], part["draw_low"], part["draw_high"], color=colour, alpha=0.22, linewidth=0)
        axis.errorbar(part["size"], part["accuracy"], error, color=colour, marker="o", markersize=3, elinewidth=0.8)
        axis.axhline(clip, color=METHOD_COLOURS["clip"], linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axis.minorticks_off()
        axis.grid(axis="y", color="0.92")
        axis.set_title(f"{bank} ({part['size'].max()})", fontsize=8)
    axes.flat[0].text(512, clip, "CLIP", ha="right", va="bottom", color=METHOD_COLOURS["clip"])
    axes.flat[0].set_ylabel("BSAP's accuracy, %")
    figure.supxlabel("number of auxiliary prompts", fontsize=8)
    return figure


def bank_temperature_map(accuracy: pd.DataFrame, title: str) -> Figure:
    """Show accuracy (percent) by bank (index) and temperature (columns, ∞ last); each bank's best is framed."""
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN, 0.36 * len(accuracy) + 1.1))
    labels = ["∞" if np.isinf(t) else f"{t:g}" for t in accuracy.columns]
    sns.heatmap(accuracy, ax=axis, annot=True, fmt=".1f", annot_kws={"size": 7}, cmap="cividis", xticklabels=labels,
                cbar_kws={"label": "accuracy, %", "aspect": 12})  # fmt: skip
    for row, best in enumerate(accuracy.to_numpy().argmax(1)):
        frame = Rectangle((best + 0.05, row + 0.07), 0.9, 0.86, fill=False, edgecolor="white", linewidth=2)
        axis.add_patch(frame)
    axis.tick_params(axis="y", rotation=0)
    axis.set(xlabel="temperature T", ylabel="", title=title)
    return figure


# Notebook 01. Tol's high-contrast colours, no method's: what belongs to the region, what to region and text together.
OF_REGION, OF_BOTH, OF_TEXT, OF_BACKGROUND = "#BB5566", "#004488", "#D5D5D5", "#DDAA33"


def similarity_ranges(ranges: pd.DataFrame, most: int = 120, seed: int = 0) -> Figure:
    """Show the range of each region's logits over unrelated texts as a line, sorted by mean, and its own expression's logit.

    `ranges` has the columns mean, minimum, maximum (`analysis.range_statistics`) and own (the logit of an expression that
    means the region); where it has more than `most` rows, that many are drawn by `seed`. The dotted line is the median of own.
    """
    shown = ranges if len(ranges) <= most else ranges.sample(most, random_state=seed)
    shown = shown.sort_values("mean")
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN, 3.1))
    place = np.arange(len(shown))
    axis.vlines(place, shown["minimum"], shown["maximum"], color="0.78", linewidth=min(3.0, 330 / max(len(shown), 1)))
    axis.plot(place, shown["mean"], color=OF_REGION, linewidth=1.8)
    axis.plot(place, shown["own"], "o", color=OF_BOTH, markersize=3, zorder=3)
    axis.axhline(ranges["own"].median(), color="0.2", linestyle=":", linewidth=1, zorder=1)
    axis.set_xlim(-1, len(shown))
    axis.set_xticks([])
    axis.set(xlabel=f"{len(shown)} regions, sorted by their mean", ylabel="logit")
    marks = [plt.Line2D([], [], color="0.78", linewidth=3), plt.Line2D([], [], color=OF_REGION, linewidth=1.8),
             plt.Line2D([], [], color=OF_BOTH, marker="o", linestyle="none", markersize=3),
             plt.Line2D([], [], color="0.2", linestyle=":", linewidth=1)]  # fmt: skip
    names = ["unrelated texts, least to most", "their mean", "the region's own expression", "median of these"]
    figure.legend(marks, names, loc="outside upper center", ncols=4, handletextpad=0.5, columnspacing=1.4)
    return figure


def range_distributions(ranges: pd.DataFrame) -> Figure:
    """Show how regions differ in mean, spread, least and greatest logit: a histogram each, background apart where there is some.

    `ranges` has the columns mean, std, minimum, maximum and background (bool).
    """
    titles = {"mean": "mean", "std": "standard deviation", "minimum": "least", "maximum": "greatest"}
    figure, axes = plt.subplots(1, 4, figsize=(DOUBLE_COLUMN, 1.9), sharey=True)
    kinds = [(False, "frames an object", OF_BOTH), (True, "background", OF_BACKGROUND)]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        edges = np.histogram_bin_edges(ranges[name], 28)
        for background, label, colour in kinds:
            part = ranges.loc[ranges["background"] == background, name]
            if len(part):
                percent = np.full(len(part), 100 / len(part))
                axis.hist(part, edges, weights=percent, histtype="stepfilled", color=colour, alpha=0.35)
                legend = f"{label} ({len(part):,})"
                axis.hist(part, edges, weights=percent, histtype="step", color=colour, linewidth=1, label=legend)
        axis.set(title=title, xlabel="logit")
    axes[0].set_ylabel("% of regions")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def variance_bars(shares: pd.DataFrame) -> Figure:
    """Show shares of variance as stacked bars: a row of `shares` a bar, labelled by its index; columns region, interaction, text.

    Where text is NaN, region and interaction are the whole.
    """
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.85, 0.38 * len(shares) + 0.75))
    place, left = np.arange(len(shares))[::-1], np.zeros(len(shares))
    parts = {"region": (OF_REGION, "white"), "interaction": (OF_BOTH, "white"), "text": (OF_TEXT, "black")}
    for name, (colour, ink) in parts.items():
        width = 100 * shares[name].fillna(0).to_numpy()
        axis.barh(place, width, left=left, color=colour, height=0.7, label=name)
        for y, start, value in zip(place, left, width, strict=True):
            if value >= 4:
                axis.text(start + value / 2, y, f"{value:.0f}", ha="center", va="center", color=ink)
        left += width
    axis.set_yticks(place, shares.index)
    axis.set_xlim(0, 100)
    axis.set(xlabel="% of the variance of the scores")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def lorenz_curves(counts: dict[str, pd.DataFrame], table: pd.DataFrame) -> Figure:
    """Show how retrievals are spread over regions: the least retrieved share of regions against the share of retrievals it gets.

    `counts`: title → a row a region, a column a method; `table`: `analysis.hubness_table` of each, with the title in the column
    setting. The diagonal is a gallery where all regions are retrieved alike; where a curve lies on the floor, never.
    """
    figure, axes = plt.subplots(1, len(counts), figsize=(DOUBLE_COLUMN, 3.1), sharey=True, squeeze=False)
    for axis, (title, frame) in zip(axes.flat, counts.items(), strict=True):
        axis.plot([0, 100], [0, 100], color="0.6", linestyle=":", linewidth=1)
        for method in frame:
            values = np.sort(frame[method].to_numpy(float))
            curve = 100 * np.r_[0, values.cumsum()] / max(values.sum(), 1e-9)
            of = table[(table["setting"] == title) & (table["method"] == method)].set_index("measure")["value"]
            label = f"{METHOD_LABELS[method]}: Gini {of['gini']:.2f}, skewness {of['skewness']:.1f}, never {of['never']:.0%}"
            axis.plot(np.linspace(0, 100, len(curve)), curve, color=METHOD_COLOURS[method], label=label)
        axis.set(title=title, xlabel="% of regions, the least retrieved first", xlim=(0, 100), ylim=(0, 100))
        axis.legend(loc="upper left", fontsize=7.5)
    axes.flat[0].set_ylabel("% of retrievals they get")
    return figure


def hub_sheet(rows: dict[str, list[tuple[np.ndarray, str]]]) -> Figure:
    """Show regions in rows, each row under its title: (picture [H, W, 3], caption) a region."""
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(DOUBLE_COLUMN, 1.36 * len(rows)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, regions) in zip(axes, rows.items(), strict=True):
        for axis, (picture, caption) in zip(line, regions, strict=False):
            axis.imshow(picture)
            axis.text(0, -0.06, caption, transform=axis.transAxes, va="top", fontsize=7)
        line[0].set_title(title, fontsize=8).set_in_layout(False)
    return figure


def clip_errors(errors: pd.DataFrame, criteria: dict[str, str]) -> Figure:
    """Show what CLIP's errors are made of, and how many of each kind BSAP mends: a panel a criterion.

    `errors` is the second table of `analysis.classifier_retriever_tables`; `criteria`: its criterion → title.
    """
    figure, axes = plt.subplots(1, len(criteria), figsize=(DOUBLE_COLUMN, 2.1), sharey=True, sharex=True, squeeze=False)
    for axis, (criterion, title) in zip(axes.flat, criteria.items(), strict=True):
        part = errors[errors["criterion"] == criterion].iloc[::-1]
        place, share = np.arange(len(part)), 100 * part["share"].fillna(0).to_numpy()
        mended = share * part["mended"].fillna(0).to_numpy()
        error = np.abs(100 * part[["ci_low", "ci_high"]].fillna(0).to_numpy().T - share)
        whisker = {"elinewidth": 0.8, "capsize": 2, "ecolor": "0.45"}
        axis.barh(place, share, color="0.82", height=0.7, xerr=error, error_kw=whisker)
        axis.barh(place, mended, color=METHOD_COLOURS["bsap"], height=0.7)
        for y, length, high, healed in zip(place, share, share + error[1], part["mended"], strict=True):
            text = f"{length:.0f} %" + (f", {100 * healed:.0f} % mended" if length and healed else "")
            axis.text(high + 1.5, y, text, va="center", fontsize=7)
        axis.set_yticks(place, part["error"])
        axis.set_title(title)
        axis.set(xlabel="% of the expressions that CLIP gets wrong")
    axes.flat[0].set_xlim(0, min(145, 100 * errors["ci_high"].fillna(0).max() + 45))
    for axis in axes.flat:
        axis.set_xticks(range(0, min(100, int(axis.get_xlim()[1])) + 1, 20))
    marks = [plt.Rectangle((0, 0), 1, 1, color=METHOD_COLOURS["bsap"]), plt.Rectangle((0, 0), 1, 1, color="0.82")]
    figure.legend(marks, ["BSAP gets it right", "BSAP gets it wrong too"], loc="outside upper center", ncols=2)
    return figure


def hub_relations(table: pd.DataFrame) -> Figure:
    """Show rank correlations with intervals: a row a trait, a colour for each of up to three outcomes, in order of appearance.

    `table` is `analysis.spearman_table` of each outcome, with the columns outcome and label (of the trait); traits without a
    correlation are left out.
    """
    table = table[table["spearman"].notna()]
    labels, outcomes = list(dict.fromkeys(table["label"]))[::-1], list(dict.fromkeys(table["outcome"]))
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.85, 0.4 * len(labels) + 0.95))
    axis.axvline(0, color="0.5", linewidth=0.8)
    for number, (name, colour) in enumerate(zip(outcomes, (OF_REGION, "0.25", METHOD_COLOURS["bsap"]), strict=False)):
        part = table[table["outcome"] == name]
        place = np.array([labels.index(label) for label in part["label"]]) + 0.24 - 0.24 * number
        error = np.abs(part[["ci_low", "ci_high"]].to_numpy().T - part["spearman"].to_numpy())
        axis.errorbar(part["spearman"], place, xerr=error, fmt="o", markersize=4, capsize=2, color=colour, label=name)
    axis.set_yticks(range(len(labels)), labels)
    reach = min(1.0, 1.1 * table[["ci_low", "ci_high"]].abs().to_numpy().max()) if len(table) else 1.0
    axis.set_xlim(-reach, reach)
    axis.grid(axis="x", color="0.92")
    axis.set(xlabel="Spearman's ρ among the regions of an image, 95 % interval")
    figure.legend(loc="outside upper center", ncols=len(outcomes))
    return figure


def sees_and_gains(table: pd.DataFrame, without_mean: float) -> Figure:
    """Show what corrections gain over CLIP (points, with interval) against how well they see a region's mean.

    `table` has a row a correction: bank (a colour), temperature (a shape), sees (Spearman within images), gain, gain_low,
    gain_high. The dashed line, `without_mean`, is the gain when that mean itself is taken off.
    """
    figure, axis = plt.subplots(figsize=(DOUBLE_COLUMN * 0.85, 3.0))
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.axhline(without_mean, color=OF_REGION, linestyle="--", linewidth=1, label="the mean itself taken off")
    shapes = dict(zip(sorted(table["temperature"].unique()), "osD^v", strict=False))
    for (bank, of_bank), colour in zip(
        table.groupby("bank", sort=False), sns.color_palette("colorblind"), strict=False
    ):
        axis.plot(of_bank["sees"], of_bank["gain"], color=colour, linewidth=0.8, label=bank)
        for row in of_bank.itertuples():
            error = [[row.gain - row.gain_low], [row.gain_high - row.gain]]
            shape = shapes[row.temperature]
            axis.errorbar(row.sees, row.gain, error, fmt=shape, color=colour, markersize=5, elinewidth=0.7, capsize=2)
    for temperature, shape in shapes.items():
        name = "T = ∞, the mean" if np.isinf(temperature) else f"T = {temperature:g}"
        axis.plot([], [], shape, color="0.4", markersize=5, label=name)
    axis.set(xlabel="how well it sees a region's mean logit (Spearman within images)", ylabel="points gained over CLIP")
    figure.legend(loc="outside right upper")
    return figure


def recall_dots(table: pd.DataFrame, title: str) -> Figure:
    """Show recall@1, 5 and 10 and the median rank of each method with intervals: `evaluation.retrieval_table`, a panel each."""
    panels = {
        "recall_1": "recall@1, %",
        "recall_5": "recall@5, %",
        "recall_10": "recall@10, %",
        "median_rank": "median rank",
    }
    place = np.arange(len(table))[::-1]
    figure, axes = plt.subplots(1, len(panels), figsize=(DOUBLE_COLUMN, 0.24 * len(table) + 1.05), sharey=True)
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        low, high = (table[f"{name.replace('median_rank', 'median')}_{side}"] for side in ("low", "high"))
        clip = table.loc[table["method"] == "clip", name].iloc[0]
        axis.axvline(clip, color=METHOD_COLOURS["clip"], linestyle=":", linewidth=1)
        for y, method, value, left, right in zip(place, table["method"], table[name], low, high, strict=True):
            colour = METHOD_COLOURS[method]
            axis.plot([left, right], [y, y], color=colour, linewidth=1.2)
            axis.plot(value, y, "o", color=colour, markersize=4.5)
        axis.set(xlabel=label, ylim=(-0.6, len(table) - 0.4))
        axis.grid(axis="x", color="0.92")
    axes[-1].set_xlim(0, 1.12 * table["median_high"].fillna(table["median_rank"]).max())
    axes[0].set_yticks(place, [METHOD_LABELS[method] for method in table["method"]])
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def search_costs(costs: pd.DataFrame) -> Figure:
    """Show time and memory of a plain and a balanced index over their size.

    `costs` has the columns vectors, and for plain and balanced: *_ms (a query, median), *_mib; it was measured on one machine.
    """
    figure, axes = plt.subplots(1, 2, figsize=(DOUBLE_COLUMN, 2.4))
    for axis, unit, label in zip(axes, ("ms", "mib"), ("ms a query", "MiB"), strict=True):
        for name, method, style in (("plain", "clip", "o-"), ("balanced", "bsap", "s--")):
            text = f"{name} ({METHOD_LABELS[method]})"
            values = costs[f"{name}_{unit}"]
            axis.plot(costs["vectors"], values, style, color=METHOD_COLOURS[method], markersize=4, label=text)
        axis.set(xscale="log", yscale="log", xlabel="vectors in the index", ylabel=label)
        axis.grid(color="0.92")
    axes[0].set_title("Search")
    axes[1].set_title("Memory")
    axes[0].legend(loc="upper left")
    return figure
