"""What `notebooks/00_explore.ipynb` does: one picture and one expression under all methods, with controls for a person.

Regions are encoded once; a change costs a few text features, small matrix products and one drawing.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ipywidgets as ui
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Image, display
from jupyter_bbox_widget import BBoxWidget
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as Pillow
from torch import Tensor

from . import plotting
from .aux_prompts import BANKS, auxiliary_prompts
from .datasets import XYWH, ReferDataset, open_picture
from .evaluation import pick
from .normalization import METHODS, calibrated_weight, pool
from .regions import box_iou, pair_up
from .scoring import TEMPLATE

SHOWN = [name for name in METHODS if name not in ("tas", "db_norm")]  # those two need banks of their own
BOX = ("x", "y", "width", "height")
MARK = '<div style="margin: -10px 75px 0 105px"><span style="margin-left: {:.1f}%">▲ w* = {:.2f}</span></div>'
UNSEEN = "This CLIP has only ever seen drawn shapes: what it makes of a photograph means nothing."


class Setting(NamedTuple):
    """What is asked and how: `bank` is a name, a text file or prompts with commas between them, `method` is in focus."""

    text: str = ""
    template: str = TEMPLATE
    bank: str = "categories"
    method: str = "bsap"
    temperature: float = 1.0
    weight: float = 1.0


class Scene(NamedTuple):
    """A picture, its candidates' boxes (xywh [N, 4]) and their rows [N] in `features`; the expressions known of it."""

    image: Pillow.Image
    boxes: np.ndarray
    rows: Tensor
    features: Any
    expressions: pd.DataFrame


def encode_picture(scorer: Any, image: Pillow.Image, boxes: Any, visual_prompts: Any = ("crop", "blur")) -> Any:
    """Return the features [V, N, D] of boxes (xywh, pixels) of one picture that belongs to no data set."""
    frame = pd.DataFrame(np.asarray(boxes, float).reshape(-1, 4), columns=XYWH).assign(image_id=1)
    images = pd.DataFrame([("own.png", *image.size)], columns=["file_name", "width", "height"], index=[1])
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder) / "own.png")
        ds = ReferDataset("own", "", Path(folder), images, frame, frame, {})
        return scorer.encode_regions(ds, frame, visual_prompts)


class Explorer:
    """The scenes of `ds` with their `candidates`, all encoded; `whole` is the data set that banks are made from."""

    def __init__(self, ds: ReferDataset, candidates: pd.DataFrame, scorer: Any, whole: ReferDataset,
                 visual_prompts: Any = ("crop", "blur")) -> None:  # fmt: skip
        self.ds, self.scorer, self.whole, self.visual_prompts = ds, scorer, whole, list(visual_prompts)
        self.pairs, self.image = pair_up(ds, candidates), scorer.encode_regions(ds, candidates, visual_prompts)
        self.boxes, self.figure = candidates[XYWH].to_numpy(), Figure(figsize=(plotting.DOUBLE_COLUMN, 2.9))
        self.competing = torch.from_numpy(ds.images.index.get_indexer(candidates["image_id"]))
        self.weights: dict[tuple, float] = {}

    def scene(self, number: int) -> Scene:
        """Return scene 1, 2, …"""
        image_id, rows = self.ds.images.index[number - 1], torch.nonzero(self.competing == number - 1)[:, 0]
        known = self.ds.expressions[self.ds.expressions["image_id"] == image_id]
        return Scene(self.ds.load_image(image_id), self.boxes[rows], rows, self.image, known)

    def own_scene(self, image: Pillow.Image, boxes: Any) -> Scene:
        """Return the scene of a picture of one's own with the boxes given (xywh, pixels)."""
        features = encode_picture(self.scorer, image, boxes, self.visual_prompts)
        return Scene(image, np.asarray(boxes, float), torch.arange(len(boxes)), features, self.ds.expressions[:0])

    def prompts(self, bank: str) -> list[str]:
        """Return the texts of a bank, or those typed."""
        typed = [text.strip() for text in bank.split(",") if text.strip()]
        if not typed:
            raise ValueError("Type auxiliary prompts, with commas between them, or the name of a bank.")
        return auxiliary_prompts(bank, self.whole) if bank in BANKS or Path(bank).is_file() else typed

    def logits(self, texts: Any, setting: Setting, features: Any = None) -> Tensor:
        """Return logits [C, T] of all candidates, or of other `features`."""
        features = self.image if features is None else features
        return self.scorer.logits(features, self.scorer.encode_texts(texts, setting.template))

    def calibrated(self, setting: Setting) -> float:
        """Return w* at the setting's temperature, from train expressions; NaN where the data set has none."""
        key, train = (setting.template, setting.bank, setting.temperature), "train" in self.whole.splits
        if train and key not in self.weights:
            pooled = pool(self.logits(self.prompts(setting.bank), setting), setting.temperature)
            unlabelled = self.logits(auxiliary_prompts("expressions", self.whole), setting)
            self.weights[key] = calibrated_weight(pooled, unlabelled.mean(1), self.competing)
        return self.weights[key] if train else float("nan")

    def score(self, name: str, s: Tensor, a: Tensor, pairs: Any, setting: Setting) -> tuple[Tensor, str]:
        """Return a method's scores of pairs [P], and their formula: BSAP has the setting's temperature and weight, or w*."""
        weight = self.calibrated(setting) if name == "bsap_calibrated" else setting.weight if name == "bsap" else 1.0
        name, t = name.removesuffix("_calibrated"), setting.temperature
        options = {"bsap": t, "bsap_h": t, "qb_norm": self.scorer.logit_scale / 20}
        given = {"temperature": options[name]} if name in options else {}
        scores, formula = METHODS[name](s, a, pairs, **given), f"METHODS[{name!r}](s, a, pairs, **{given})"
        return (scores, formula) if weight == 1 else (s + weight * (scores - s), f"s + {weight:.6g} * ({formula} - s)")

    def right(self, name: str, setting: Setting) -> Tensor:
        """Return for each expression of all scenes whether a method finds it, [E] bool."""
        text = self.scorer.encode_texts(self.ds.expressions["text"], setting.template)
        s, a = self.scorer.pair_logits(self.image, text, self.pairs), self.logits(self.prompts(setting.bank), setting)
        return self.pairs.iou[pick(self.pairs, self.score(name, s, a, self.pairs, setting)[0])] > 0.5

    def table(self, scene: Scene, setting: Setting) -> pd.DataFrame:
        """Return a row a method: pick (from 1), right (✓, ✗, –: not known), margin to the second-best, formula."""
        s, a = (self.logits(texts, setting, scene.features) for texts in ([setting.text], self.prompts(setting.bank)))
        known, rows = scene.expressions[scene.expressions["text"].str.lower() == setting.text.lower()], {}
        truth = self.ds.annotations.loc[known["ann_id"], XYWH].to_numpy()[:1]
        for name in SHOWN:
            whole = name == "sinkhorn"  # which looks at all candidates there are, the others at each by itself
            pairs = SimpleNamespace(
                expression=0 * scene.rows, candidate=scene.rows if whole else torch.arange(len(scene.rows))
            )
            scores, formula = self.score(name, s[scene.rows, 0], a if whole else a[scene.rows], pairs, setting)
            if not scores.isnan().any():
                best, place = (values.tolist() for values in scores.topk(min(2, len(scores))))
                right = "✗✓"[int(box_iou(scene.boxes[place[0]], truth[0]) > 0.5)] if len(truth) else "–"
                rows[name] = (place[0] + 1, right, best[0] - best[-1], formula)
        return pd.DataFrame.from_dict(rows, orient="index", columns=["pick", "right", "margin", "formula"])

    def draw(self, scene: Scene, setting: Setting, table: pd.DataFrame) -> bytes:
        """Return a PNG: the picture with the picks of CLIP and of the method in focus, and what makes their biases."""
        self.figure.clear()
        self.figure.set_layout_engine("none")  # fixed places: a layout that is computed takes as long as the drawing
        left, right = self.figure.add_axes((0.01, 0.02, 0.53, 0.9)), self.figure.add_axes((0.71, 0.15, 0.28, 0.68))
        small = scene.image.reduce(max(1, max(scene.image.size) // 800))
        left.imshow(np.asarray(small), extent=(0, scene.image.width, scene.image.height, 0))
        left.set(xticks=[], yticks=[], title=plotting.plain(f"“{setting.text}”", 60, 1), frame_on=False)
        tag = {"boxstyle": "square,pad=0.12", "facecolor": "0.2", "edgecolor": "none"}
        for number, (x, y, w, h) in enumerate(scene.boxes, 1):
            left.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=0.8))
            left.text(x + w, y + h, str(number), ha="right", va="bottom", fontsize=6, color="white", bbox=tag)
        picks = {name: table.at[name, "pick"] - 1 for name in dict.fromkeys(["clip", setting.method])}
        prompts, t, picked = self.prompts(setting.bank), setting.temperature, scene.rows[list(picks.values())]
        s, a = (self.logits(texts, setting, scene.features)[picked].double() for texts in ([setting.text], prompts))
        shares, bias = (100 * (a / t).softmax(1)).numpy(), pool(a, t)
        top, weight = shares.max(0).argsort()[:-9:-1], f" − {setting.weight:.2f} ·" if setting.method == "bsap" else ","
        for k, (name, row) in enumerate(picks.items()):
            colour, label = plotting.colour(name), plotting.label(name)
            plotting.outline(left, scene.boxes[row], colour, label, below=name != "clip")
            words = f"{label}'s pick, {row + 1}: logit {float(s[k]):.2f}{weight} bias {bias[k]:.2f}"
            right.barh(np.arange(len(top)) + 0.4 * k - 0.2, shares[k, top], 0.38, color=colour, label=words)
        right.set_yticks(range(len(top)), [plotting.plain(prompts[i], 24, 1) for i in top])
        right.set(xlabel=f"share of the bias at T = {t:.3g}, %", ylim=(len(top) - 0.4, -0.6))
        right.legend(loc="lower right", bbox_to_anchor=(1, 1))
        canvas, png = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()
        Pillow.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(png, "png", compress_level=1)
        return png.getvalue()

    def code(self, scene: Scene, setting: Setting, formula: str, data: dict[str, Any]) -> str:
        """Return six lines of Python that repeat a pick."""
        bank = f"auxiliary_prompts({setting.bank!r}, whole)"
        bank = bank if setting.bank in BANKS or Path(setting.bank).is_file() else f"{self.prompts(setting.bank)}"
        lines = (f"ds = whole.select({data['split']!r}, {data['limit']}); candidates = load_candidates(ds, "
                 f"{data['proposals']!r}, {data['root']!r})", "scorer.encode_regions(ds, candidates")  # fmt: skip
        if scene.features is not self.image:
            boxes = f"boxes = {scene.boxes.round(1).tolist()}"
            lines = (
                f"{boxes}; picture = open_picture({data['file']!r}, upright=True)",
                "encode_picture(scorer, picture, boxes",
            )
        return f"""from bsap_utils import *; from bsap_utils.explore import SimpleNamespace, encode_picture, torch
whole, scorer = load_refer({data["root"]!r}, {data["dataset"]!r}), load_scorer({data["models"]}, {data["pretrained"]})
{lines[0]}
image, rows = {lines[1]}, {self.visual_prompts}), torch.arange({int(scene.rows[0])}, {int(scene.rows[-1]) + 1})
s, a = [scorer.logits(image, scorer.encode_texts(x, {setting.template!r})) for x in ([{setting.text!r}], {bank})]
s, pairs = s[rows, 0], SimpleNamespace(expression=0 * rows, candidate=rows); print(1 + int(({formula}).argmax()))"""


def show(explorer: Explorer, setting: Setting, number: int = 1, **data: Any) -> None:
    """Display the controls where a person can move them, and where not the picture and the table.

    `data` is what *As Python* names: root, dataset, split, limit, proposals, models, pretrained.
    """
    scene = explorer.scene(number)
    setting = setting._replace(text=setting.text or scene.expressions["text"].iloc[0])
    table = explorer.table(scene, setting)
    png, kernel = explorer.draw(scene, setting, table), getattr(get_ipython(), "kernel", None)
    if kernel and kernel.get_parent().get("content", {}).get("allow_stdin"):  # papermill and nbconvert cannot answer
        page = controls(explorer, setting, number, data).page
        display(page._repr_mimebundle_() | {"image/png": base64.b64encode(png).decode()}, raw=True)
    else:
        display(Image(png), plotting.show_table(table.drop(columns="formula"), 2))


def controls(explorer: Explorer, start: Setting, number: int, data: dict[str, Any]) -> SimpleNamespace:
    """Return the controls as widgets by name, `page` holding all; each change is drawn at once.

    What is wrong with an input is said on the page, and the picture fades until that is mended.
    """

    def make(kind: Any, name: str, tip: str, **traits: Any) -> Any:
        return kind(
            description=name, tooltip=tip, style={"description_width": "95px"}, layout={"width": "98%"}, **traits
        )

    w = SimpleNamespace(
        source=ui.ToggleButtons(options=["a scene of the data set", "a picture of my own"], style={"button_width": "180px"}),
        scene=make(ui.IntSlider, "Scene", "Which picture", min=1, max=len(explorer.ds.images), value=number),
        known=make(ui.Dropdown, "Known texts", "What the data set says of it; a choice fills the field below"),
        win=ui.Button(description="Next win"), loss=ui.Button(description="Next loss"), random=ui.Button(description="Random"),
        upload=ui.FileUpload(description="Choose a picture", accept="image/*", layout={"width": "180px"}),
        find=ui.Button(description="Find candidates"),
        boxes=BBoxWidget(classes=["box"], hide_buttons=True, layout={"display": "none"}),
        text=make(ui.Text, "Expression", "What is looked for", value=start.text),
        template=make(ui.Text, "Template", "What stands around all texts; {} is their place", value=start.template),
        bank=make(ui.Combobox, "Bank", "A name, or prompts with commas between them", value=start.bank, options=BANKS),
        method=make(ui.Dropdown, "In focus", "The method that is drawn", value=start.method,
                    options=[(plotting.label(name), name) for name in SHOWN]),
        temperature=make(ui.FloatLogSlider, "Temperature", "Low: the largest logit counts; high: the mean", step=0.05,
                         value=start.temperature, min=-1, max=3, readout_format=".3g"),
        weight=make(ui.FloatSlider, "Weight", "Of the bias that BSAP takes off", value=start.weight, max=1.5, step=0.01),
        code=make(ui.Textarea, "As Python", "Copy these six lines: they repeat what is shown", rows=7),
        mark=ui.HTML(), table=ui.HTML(), message=ui.HTML(), picture=ui.HTML(), total=ui.HTML(),
    )  # fmt: skip
    state = SimpleNamespace(busy=False, row=-1, image=None, scene=explorer.scene(number))
    of_scene = ui.VBox([w.scene, w.known, ui.HBox([w.win, w.loss, w.random])])
    of_own = ui.VBox([ui.HBox([w.upload, w.find]), w.boxes])
    asked = [getattr(w, name) for name in Setting._fields]

    def own_scene(changed: Any) -> Scene:
        if not w.upload.value:
            raise ValueError("Choose a picture: a PNG or JPEG file.")
        if changed is w.upload:
            state.image, w.boxes.bboxes = open_picture(bytes(w.upload.value[0]["content"]), upright=True), []
            state.image.save(stream := io.BytesIO(), "jpeg", quality=85)
            w.boxes.image_bytes, w.boxes.layout.display = stream.getvalue(), ""
        if changed is w.find:
            from .segmenters import coco, felzenszwalb  # here, since scikit-image takes a second to import

            masks = felzenszwalb(state.image, top_k=15)[0]
            found = coco.toBbox(masks).tolist() if masks else [[0, 0, *state.image.size]]
            w.boxes.bboxes = [dict(zip(BOX, box, strict=True)) | {"label": "box"} for box in found]
        boxes = [[box[side] for side in BOX] for box in w.boxes.bboxes if min(box["width"], box["height"]) >= 2]
        if not boxes:
            raise ValueError("Draw boxes on the picture with the mouse, or press Find candidates.")
        return explorer.own_scene(state.image, boxes)

    def go_on(changed: Any, setting: Setting) -> None:
        """Take the next expression where only the method in focus is right, only CLIP is, or any."""
        clip, mine = explorer.right("clip", setting), explorer.right(setting.method, setting)
        wanted = {w.win: mine & ~clip, w.loss: clip & ~mine}.get(changed, clip | True).nonzero()[:, 0].tolist()
        if not wanted:
            raise ValueError("There is none in these scenes.")
        after = [row for row in wanted if row > state.row] or wanted
        state.row = int(np.random.default_rng().choice(wanted)) if changed is w.random else after[0]
        found = explorer.ds.expressions.iloc[state.row]
        w.scene.value, w.text.value = explorer.ds.images.index.get_loc(found["image_id"]) + 1, found["text"]

    def update(changed: Any) -> None:
        own = w.source.index == 1
        of_scene.layout.display, of_own.layout.display = ("none", "") if own else ("", "none")
        if changed in (w.win, w.loss, w.random):
            go_on(changed, Setting(*(widget.value for widget in asked)))
        if changed not in asked:
            state.scene = own_scene(changed) if own else explorer.scene(w.scene.value)
        texts = state.scene.expressions["text"].tolist()
        if changed is w.known or changed in (w.scene, w.source) and not own:
            w.text.value = w.known.value if changed is w.known else texts[0]
        w.known.options, w.known.value = texts, w.text.value if w.text.value in texts else None
        setting = Setting(*(widget.value for widget in asked))
        if not setting.text.strip():
            raise ValueError("Type an expression, such as: red star.")
        table = explorer.table(state.scene, setting)
        png = base64.b64encode(explorer.draw(state.scene, setting, table)).decode()
        picks = ", ".join(f"{plotting.label(name)} picks {table.at[name, 'pick']}" for name in ("clip", setting.method))
        w.picture.value = f'<img style="width: 100%; opacity: 1" alt="{picks}" src="data:image/png;base64,{png}">'
        w.message.value = (
            f'<div role="status">{UNSEEN}</div>' if own and "clip-refshapes" in str(data["models"]) else ""
        )
        w.table.value = plotting.show_table(table.drop(columns="formula"), 2).to_html()
        names, weight = data | {"file": w.upload.value[0]["name"] if own else ""}, explorer.calibrated(setting)
        w.code.value = explorer.code(state.scene, setting, table.at[setting.method, "formula"], names)
        w.mark.value = MARK.format(100 * weight / w.weight.max, weight) if weight == weight else ""
        mine, clip = (100 * explorer.right(name, setting).double().mean() for name in (setting.method, "clip"))
        w.total.value = f"This setting on all scenes: <b>{mine:.1f} %</b> right (CLIP {clip:.1f} %)."

    def on_change(changed: Any) -> None:
        if state.busy:  # what is set along with something else needs no drawing of its own
            return
        state.busy = True
        try:
            update(changed)
        except Exception as error:  # nothing that a person types or uploads may end in a traceback
            words = str(error) if isinstance(error, (ValueError, RuntimeError, OSError)) else repr(error)
            w.message.value = f'<div role="alert" style="color: #B00020">{html.escape(words)}</div>'
            w.picture.value = w.picture.value.replace("opacity: 1", "opacity: 0.3", 1)
        finally:
            state.busy = False

    on_change(w.text)
    for widget in (w.source, w.scene, w.known, w.upload, w.boxes, *asked):
        widget.observe(lambda change: on_change(change["owner"]), "bboxes" if widget is w.boxes else "value")
    for button in (w.win, w.loss, w.random, w.find):
        button.on_click(on_change)
    left = ui.VBox([of_scene, of_own, *asked, w.mark], layout={"width": "58%"})
    parts = [w.source, ui.HBox([left, w.table]), w.message, w.picture, w.total, w.code]
    w.page = ui.VBox(parts, layout={"max_width": "940px"})
    return w
