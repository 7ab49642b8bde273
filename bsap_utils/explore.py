"""What `notebooks/00_explore.ipynb` does: one picture and one expression under all methods, with controls for a person.

Regions are encoded once; a change costs a few text features, small matrix products and one drawing.
"""

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

from . import plotting
from .aux_prompts import BANKS, auxiliary_prompts
from .datasets import XYWH, ReferDataset, open_picture
from .evaluation import pick
from .normalization import METHODS, calibrated_weight, pool
from .regions import box_iou, pair_up
from .scoring import TEMPLATE

SHOWN = [name for name in METHODS if name not in ("tas", "db_norm")]  # those two need banks of their own
SOURCES = ["a scene of the data set", "a picture of my own"]
BOX = ["x", "y", "width", "height"]
MARK = '<div style="margin: -10px 75px 0 105px"><nobr style="margin-left: {:.1f}%">▲ w* = {:.2f}</nobr></div>'
TAG = {"boxstyle": "square,pad=0.12", "facecolor": "0.2", "edgecolor": "none"}
UNSEEN = '<div role="status">This CLIP has only ever seen drawn shapes: of a photograph it knows nothing.</div>'
LINES = """from bsap_utils import *; from bsap_utils.explore import Explorer, Setting
whole, scorer = load_refer({root!r}, {dataset!r}), load_scorer({models!r}, {pretrained!r})
ds = whole.select({split!r}, {limit}); candidates = load_candidates(ds, {proposals!r}, {root!r})
explorer = Explorer(ds, candidates, scorer, whole, {explorer.visual_prompts})
{scene}
print(explorer.table(scene, {setting}))"""
FIELDS: dict[str, Any] = {  # name: kind of widget, label, tooltip, traits
    "scene": (ui.IntSlider, "Scene", "Which picture", {"min": 1}),
    "known": (ui.Dropdown, "Known texts", "What the data set says of it; a choice fills the field below", {}),
    "text": (ui.Text, "Expression", "What is looked for", {}),
    "template": (ui.Text, "Template", "What stands around all texts; {} is their place", {}),
    "bank": (ui.Combobox, "Bank", "A name, or prompts with commas between them", {"options": BANKS}),
    "method": (ui.Dropdown, "In focus", "The method that is drawn", {"options": [(plotting.label(x), x) for x in SHOWN]}),
    "temperature": (ui.FloatLogSlider, "Temperature", "Low: the largest logit counts; high: the mean",
                    {"step": 0.05, "min": -1, "max": 3, "readout_format": ".3g"}),
    "weight": (ui.FloatSlider, "Weight", "Of the bias that BSAP takes off", {"max": 1.5, "step": 0.01}),
    "code": (ui.Textarea, "As Python", "Copy these six lines: they repeat what is shown", {"rows": 7}),
}  # fmt: skip


class Setting(NamedTuple):
    """What is asked and how: `bank` is a name, a text file or prompts with commas between them, `method` is in focus."""

    text: str = ""
    template: str = TEMPLATE
    bank: str = "categories"
    method: str = "bsap"
    temperature: float = 1.0
    weight: float = 1.0


class Explorer:
    """The scenes of `ds` with their `candidates`, all encoded; `whole` is the data set that banks are made from.

    A scene is a picture, its candidates' boxes (xywh [N, 4]) and their rows [N] in features [V, C, D], and its expressions.
    """

    def __init__(self, ds: ReferDataset, candidates: pd.DataFrame, scorer: Any, whole: ReferDataset,
                 visual_prompts: Any = ("crop", "blur")) -> None:  # fmt: skip
        self.ds, self.scorer, self.whole, self.visual_prompts = ds, scorer, whole, list(visual_prompts)
        self.pairs, self.image = pair_up(ds, candidates), scorer.encode_regions(ds, candidates, visual_prompts)
        self.boxes, self.figure = candidates[XYWH].to_numpy(), Figure(figsize=(plotting.DOUBLE_COLUMN, 2.9))
        self.figure.set_layout_engine("none")  # fixed places: a layout that is computed takes as long as the drawing
        self.competing = torch.from_numpy(ds.images.index.get_indexer(candidates["image_id"]))

    def scene(self, number: int) -> SimpleNamespace:
        """Return scene 1, 2, …"""
        image_id, rows = self.ds.images.index[number - 1], (self.competing == number - 1).nonzero()[:, 0]
        known = self.ds.expressions[self.ds.expressions["image_id"] == image_id]
        image = self.ds.load_image(image_id)
        return SimpleNamespace(image=image, boxes=self.boxes[rows], rows=rows, features=self.image, expressions=known)

    def own_scene(self, image: Any, boxes: Any) -> SimpleNamespace:
        """Return the scene of a picture of one's own with the boxes given (xywh, pixels)."""
        frame = pd.DataFrame(boxes, columns=XYWH, dtype=float).assign(image_id=1)
        images = pd.DataFrame([("own.png", *image.size)], columns=["file_name", "width", "height"], index=[1])
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder) / "own.png")
            ds = ReferDataset("own", "", Path(folder), images, frame, frame, {})
            features = self.scorer.encode_regions(ds, frame, self.visual_prompts)
        rows, known, boxes = torch.arange(len(frame)), self.ds.expressions[:0], frame[XYWH].to_numpy()
        return SimpleNamespace(image=image, boxes=boxes, rows=rows, features=features, expressions=known)

    def logits(self, texts: Any, setting: Setting, features: Any = None) -> torch.Tensor:
        """Return logits [C, T] of all candidates, or of other `features`."""
        features = self.image if features is None else features
        return self.scorer.logits(features, self.scorer.encode_texts(texts, setting.template))

    def prompts(self, bank: str) -> list[str]:
        """Return the texts typed with commas between them, or those of a bank or a text file."""
        typed = [text.strip() for text in bank.split(",") if text.strip()]
        return typed if typed and "," in bank else auxiliary_prompts(bank, self.whole)

    def calibrated(self, setting: Setting) -> float:
        """Return w* at the setting's temperature, from train expressions; NaN where the data set has none."""
        if "train" not in self.whole.splits:
            return float("nan")
        unlabelled = self.logits(auxiliary_prompts("expressions", self.whole), setting).mean(1)
        pooled = pool(self.logits(self.prompts(setting.bank), setting), setting.temperature)
        return calibrated_weight(pooled, unlabelled, self.competing)

    def score(self, name: str, s: torch.Tensor, a: torch.Tensor, pairs: Any, setting: Setting) -> torch.Tensor:
        """Return a method's scores of pairs [P]: BSAP has the setting's temperature and weight, or w*."""
        t = {"bsap_h": setting.temperature, "qb_norm": self.scorer.logit_scale / 20}.get(name)
        if name not in ("bsap", "bsap_calibrated"):
            return METHODS[name](s, a, pairs, **({"temperature": t} if t else {}))
        weight = setting.weight if name == "bsap" else self.calibrated(setting)
        return s - weight * pool(a, setting.temperature)[pairs.candidate]

    def right(self, setting: Setting) -> torch.Tensor:
        """Return for each expression of all scenes whether CLIP and the method in focus find it, [2, E] bool."""
        text = self.scorer.encode_texts(self.ds.expressions["text"], setting.template)
        s, a = self.scorer.pair_logits(self.image, text, self.pairs), self.logits(self.prompts(setting.bank), setting)
        scores = [self.score(name, s, a, self.pairs, setting) for name in ("clip", setting.method)]
        return self.pairs.iou[torch.stack([pick(self.pairs, one) for one in scores])] > 0.5

    def table(self, scene: SimpleNamespace, setting: Setting) -> pd.DataFrame:
        """Return a row a method: pick (from 1), right (✓, ✗, –: not known), margin to the second-best."""
        s, a = (self.logits(texts, setting, scene.features) for texts in ([setting.text], self.prompts(setting.bank)))
        pairs = SimpleNamespace(expression=0 * scene.rows, candidate=scene.rows)
        known = scene.expressions["ann_id"][scene.expressions["text"].str.lower() == setting.text.lower()]
        truth = self.ds.annotations.loc[known, XYWH].to_numpy()[:1]
        scores = torch.stack([self.score(name, s[scene.rows, 0], a, pairs, setting).double() for name in SHOWN], 1)
        best, place = (values.numpy() for values in scores.topk(min(2, len(scores)), 0))
        table = pd.DataFrame({"pick": place[0] + 1, "right": "–", "margin": best[0] - best[-1]}, SHOWN)
        if len(truth):
            table["right"] = np.where(box_iou(scene.boxes[place[0]], truth) > 0.5, "✓", "✗")
        return table[table["margin"].notna()]  # without w* where there is none

    def draw(self, scene: SimpleNamespace, setting: Setting, table: pd.DataFrame) -> bytes:
        """Return a PNG: the picture with the picks of CLIP and of the method in focus, and what makes their biases."""
        self.figure.clear()
        left, right = self.figure.add_axes((0.01, 0.02, 0.53, 0.9)), self.figure.add_axes((0.71, 0.15, 0.28, 0.68))
        small, (width, height) = scene.image.reduce(max(1, max(scene.image.size) // 800)), scene.image.size
        left.imshow(small, extent=(0, width, height, 0))
        left.set(title=plotting.plain(f"“{setting.text}”", 60, 1), **plotting.BLANK)
        for number, (x, y, w, h) in enumerate(scene.boxes, 1):
            left.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=0.8))
            left.text(x + w, y + h, str(number), ha="right", va="bottom", fontsize=6, color="white", bbox=TAG)
        picks = {name: table.at[name, "pick"] - 1 for name in dict.fromkeys(["clip", setting.method])}
        prompts, t, picked = self.prompts(setting.bank), setting.temperature, scene.rows[list(picks.values())]
        s, a = (self.logits(texts, setting, scene.features[:, picked]).double() for texts in ([setting.text], prompts))
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
        FigureCanvasAgg(self.figure).print_png(png := io.BytesIO(), pil_kwargs={"compress_level": 1})
        return png.getvalue()


def show(explorer: Explorer, setting: Setting, number: int = 1, **data: Any) -> None:
    """Display the controls where a person can move them, else picture and table; `data` is what `LINES` names."""
    scene, kernel = explorer.scene(number), getattr(get_ipython(), "kernel", None)
    setting = setting._replace(text=setting.text or scene.expressions["text"].iloc[0])
    table = explorer.table(scene, setting)
    png = explorer.draw(scene, setting, table)
    if kernel and kernel.get_parent().get("content", {}).get("allow_stdin"):  # papermill and nbconvert cannot answer
        page = Controls(explorer, setting, number, data).page
        display(page._repr_mimebundle_() | {"image/png": base64.b64encode(png).decode()}, raw=True)
    else:
        display(Image(png), plotting.show_table(table, 2))


class Controls(SimpleNamespace):
    """The widgets by name, `page` holding all; each change is drawn at once, and what is wrong is said on the page."""

    def __init__(self, explorer: Explorer, start: Setting, number: int, data: dict[str, Any]) -> None:
        self.explorer, self.data, self.busy, self.row = explorer, data, False, -1
        self.uploaded: Any = None
        wide = {"style": {"description_width": "95px"}, "layout": {"width": "98%"}}
        for name, (kind, label, tip, traits) in FIELDS.items():
            setattr(self, name, kind(description=label, tooltip=tip, **wide, **traits))
        self.buttons = [ui.Button(description=name) for name in ("Next win", "Next loss", "Random", "Find candidates")]
        self.win, self.loss, self.random, self.find = self.buttons
        self.mark, self.table, self.message, self.picture, self.total = (ui.HTML() for _ in range(5))
        self.source = ui.ToggleButtons(options=SOURCES, style={"button_width": "180px"})
        self.upload = ui.FileUpload(description="Choose a picture", accept="image/*", layout={"width": "180px"})
        self.boxes = BBoxWidget(classes=["box"], hide_buttons=True, layout={"display": "none"})
        self.scene.max, self.scene.value = len(explorer.ds.images), number
        self.asked = [getattr(self, name) for name in Setting._fields]
        for widget, value in zip(self.asked, start, strict=True):
            widget.value = value
        self.of_scene = ui.VBox([self.scene, self.known, ui.HBox(self.buttons[:3])])
        self.of_own = ui.VBox([ui.HBox([self.upload, self.find]), self.boxes])
        left = ui.VBox([self.of_scene, self.of_own, *self.asked, self.mark], layout={"width": "58%"})
        parts = [self.source, ui.HBox([left, self.table]), self.message, self.picture, self.total, self.code]
        self.page = ui.VBox(parts, layout={"max_width": "940px"})
        for widget in (self.source, self.scene, self.known, self.upload, self.boxes, *self.asked):
            widget.observe(lambda change: self.respond(change["owner"]), ["value", "bboxes"])
        for button in self.buttons:
            button.on_click(self.respond)
        self.shown = explorer.scene(number)
        self.respond(self.text)

    def respond(self, changed: Any) -> None:
        """Do what a widget asks for; say what is wrong, and fade the picture until that is mended."""
        if self.busy:  # what is set along with something else needs no drawing of its own
            return
        self.busy = True
        try:
            self.update(changed)
        except Exception as error:  # nothing that a person types or uploads may end in a traceback
            words = html.escape(str(error) or repr(error))
            self.message.value = f'<div role="alert" style="color: #B00020">{words}</div>'
            self.picture.value = self.picture.value.replace("opacity: 1", "opacity: 0.3", 1)
        self.busy = False

    def update(self, changed: Any) -> None:
        """Take the scene and the text that are asked for, and draw."""
        own = self.source.index == 1
        self.of_scene.layout.display, self.of_own.layout.display = ("none", "") if own else ("", "none")
        if changed in self.buttons[:3]:
            self.go_on(changed)
        if changed not in self.asked:
            self.shown = self.own_scene(changed) if own else self.explorer.scene(self.scene.value)
        texts = self.shown.expressions["text"].tolist()
        if changed is self.known or changed in (self.scene, self.source) and not own:
            self.text.value = self.known.value if changed is self.known else texts[0]
        self.known.options, self.known.value = texts, self.text.value if self.text.value in texts else None
        if not self.text.value.strip():
            raise ValueError("Type an expression, such as: red star.")
        self.answer(Setting(*(widget.value for widget in self.asked)), own)

    def answer(self, setting: Setting, own: bool) -> None:
        """Show the answers of all methods, the picture, and what else follows from a setting."""
        table, weight = self.explorer.table(self.shown, setting), self.explorer.calibrated(setting)
        png = base64.b64encode(self.explorer.draw(self.shown, setting, table)).decode()
        picks = ", ".join(f"{plotting.label(name)} picks {table.at[name, 'pick']}" for name in ("clip", setting.method))
        self.picture.value = f'<img style="width: 100%; opacity: 1" alt="{picks}" src="data:image/png;base64,{png}">'
        self.message.value = UNSEEN if own and "clip-refshapes" in str(self.data["models"]) else ""
        self.table.value = plotting.show_table(table, 2).to_html()
        scene = f"scene = explorer.scene({self.scene.value})"
        if own:
            picture = f"open_picture({self.upload.value[0]['name']!r}, upright=True)"
            scene = f"boxes = {self.shown.boxes.round(1).tolist()}; scene = explorer.own_scene({picture}, boxes)"
        self.code.value = LINES.format(**self.data, explorer=self.explorer, scene=scene, setting=setting)
        self.mark.value = MARK.format(100 * weight / self.weight.max, weight) if weight == weight else ""
        clip, mine = 100 * self.explorer.right(setting).double().mean(1)
        self.total.value = f"This setting on all scenes: <b>{mine:.1f} %</b> right (CLIP {clip:.1f} %)."

    def own_scene(self, changed: Any) -> SimpleNamespace:
        """Return the scene of the uploaded picture with the boxes that are drawn on it or found."""
        if changed is self.upload:
            self.uploaded = open_picture(bytes(self.upload.value[0]["content"]), upright=True)
            self.uploaded.save(stream := io.BytesIO(), "jpeg", quality=85)
            self.boxes.image_bytes, self.boxes.bboxes, self.boxes.layout.display = stream.getvalue(), [], ""
        if self.uploaded is None:
            raise ValueError("Choose a picture: a PNG or JPEG file.")
        if changed is self.find:
            from .segmenters import coco, felzenszwalb  # here, since scikit-image takes a second to import

            masks = felzenszwalb(self.uploaded, top_k=15)[0]
            found = coco.toBbox(masks) if masks else [[0, 0, *self.uploaded.size]]
            self.boxes.bboxes = pd.DataFrame(found, columns=BOX).assign(label="box").to_dict("records")
        boxes = pd.DataFrame(self.boxes.bboxes, columns=BOX).query("width >= 2 and height >= 2")
        if boxes.empty:
            raise ValueError("Draw boxes on the picture with the mouse, or press Find candidates.")
        return self.explorer.own_scene(self.uploaded, boxes.to_numpy())

    def go_on(self, changed: Any) -> None:
        """Take the next expression where only the method in focus is right, only CLIP is, or any."""
        clip, mine = self.explorer.right(Setting(*(widget.value for widget in self.asked))).numpy()
        wanted = {self.win: mine & ~clip, self.loss: clip & ~mine, self.random: clip | True}[changed].nonzero()[0]
        if not len(wanted):
            raise ValueError("There is none in these scenes.")
        after = np.random.default_rng().permutation(wanted) if changed is self.random else wanted[wanted > self.row]
        self.row = int([*after, wanted[0]][0])
        found = self.explorer.ds.expressions.iloc[self.row]
        self.scene.value, self.text.value = self.explorer.ds.images.index.get_loc(found["image_id"]) + 1, found["text"]
