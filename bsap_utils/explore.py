"""What `notebooks/00_explore.ipynb` does: one expression and one picture under every method, with controls for a person.

Each picture's regions are encoded once; a change of anything else costs a few text features, a small matrix product and
the drawing of `plotting.region_scores`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ipywidgets as ui
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Image as Picture
from IPython.display import Markdown, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from pycocotools import mask as coco

from . import plotting, segmenters
from .aux_prompts import BANKS, auxiliary_prompts
from .datasets import XYWH, ReferDataset, clip_boxes
from .evaluation import rec_correct
from .normalization import METHODS, default_options, family
from .scoring import TEMPLATE, ClipScorer

FAMILY = "family"  # beside the names of METHODS: any pool with any weight
OWN_PROMPTS, OWN_PICTURE = "own prompts", "a picture of my own"
PROPOSED = 15  # regions proposed in a picture that came without boxes


class Scene(NamedTuple):
    """A picture, its regions (a frame with x, y, w, h in pixels), their features [P, N, D] by each scorer, and truths.

    `truth` maps an expression, in lower case, to the box that it means (xywh); a picture of one's own has none.
    """

    image: Image.Image
    regions: pd.DataFrame
    features: list[torch.Tensor]
    truth: dict[str, np.ndarray]


class Start(NamedTuple):
    """What is shown first: a scene's number from 1, an expression ("": the scene's first), a bank, a method and its settings.

    `temperature` is for BSAP, BSAP-H and the family, as in the other notebooks; `weight` None is the method's own.
    """

    scene: int = 1
    expression: str = ""
    bank: str = "categories"
    method: str = "bsap"
    temperature: float = 1.0
    weight: float | None = None


def options_of(method: str, logit_scale: float = 100.0, start: Start | None = None) -> dict[str, Any]:
    """Return the options of a method, or of "family", with their defaults, or with those of `start` where it has them.

    QB-Norm's β = 20 is on cosines, so its temperature depends on the scale of the logits. Raises ValueError for an unknown
    method.

    >>> options_of("bsap_h"), options_of("qb_norm", logit_scale=20)
    ({'weight': 0.5, 'temperature': 1.0}, {'temperature': 1.0})
    """
    if method not in (*METHODS, FAMILY):
        raise ValueError(f"Unknown method {method!r}; there are: {', '.join(METHODS)}, {FAMILY}.")
    of_family = {"weight": 1.0, "temperature": 1.0, "nearest": None}
    known: dict[str, Any] = of_family if method == FAMILY else dict(default_options(method))
    if method == "qb_norm":
        known["temperature"] = logit_scale / 20
    elif start and "temperature" in known:
        known["temperature"] = start.temperature
    if start and start.weight is not None and "weight" in known:
        known["weight"] = start.weight
    return known


def read_picture(content: bytes) -> Image.Image:
    """Return the picture in a file's content, upright and in RGB. Raises ValueError, in words, for what is none."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError("This file is no picture that can be read. Choose a PNG or JPEG file.") from None
    except Exception as error:  # damaged bytes raise nearly anything in PIL's decoders; so does a picture too large
        raise ValueError(f"This picture cannot be read ({error}). Choose another file.") from None


def read_boxes(text: str, size: tuple[int, int]) -> pd.DataFrame:
    """Return the boxes in a text, one a line as x, y, w, h in pixels: a frame, cut to a picture of `size` (width, height).

    Raises ValueError that names the first wrong line.

    >>> read_boxes("0, 0, 30, 20", size=(20, 20)).to_numpy().tolist()
    [[0.0, 0.0, 20.0, 20.0]]
    """
    lines = [
        (f"Line {i} of the boxes, “{line.strip()}”,", line)
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    boxes = np.empty((len(lines), 4))
    for row, (name, line) in enumerate(lines):
        try:
            boxes[row] = np.array(re.split(r"[,;\s]+", line.strip(" \t,;[]()")), dtype=float).reshape(4)
        except ValueError:
            raise ValueError(f"{name} is not four numbers: x, y, width, height.") from None
    boxes, inside, _ = clip_boxes(boxes, np.tile(size, (len(boxes), 1)))
    if not inside.all():
        raise ValueError(f"{lines[inside.argmin()][0]} has no area inside the picture of {size[0]} × {size[1]} pixels.")
    return pd.DataFrame(boxes, columns=XYWH)


def propose(image: Image.Image) -> pd.DataFrame:
    """Return regions of a picture that came without boxes: the best segments by colour or, without any, the whole picture.

    One row a region: x, y, w, h in pixels and the segmentation.
    """
    masks, _ = segmenters.felzenszwalb(image, top_k=PROPOSED)
    boxes = coco.toBbox(masks) if masks else np.array([[0.0, 0, *image.size]])
    return pd.DataFrame(boxes, columns=XYWH).assign(segmentation=masks or None)


class Explorer:
    """The scenes of `ds` with their candidates `regions`, pictures of one's own, and their scores: each encoded once.

    `scorers` (their logits are averaged) see the regions under `visual_prompts`.
    """

    def __init__(
        self,
        ds: ReferDataset,
        regions: pd.DataFrame,
        scorers: Sequence[ClipScorer],
        visual_prompts: Sequence[str] = ("crop", "blur"),
    ) -> None:
        self.ds, self.scorers, self.visual_prompts = ds, list(scorers), tuple(visual_prompts)
        self.logit_scale = sum(s.logit_scale for s in self.scorers) / len(self.scorers)
        self.figure = Figure(figsize=(plotting.DOUBLE_COLUMN, 3.2))
        self.summary = ""
        self._regions_of = dict(list(regions.groupby("image_id")))
        self._scenes: dict[Any, Scene] = {}

    def scene(self, number: int) -> Scene:
        """Return scene 1, 2, … Raises ValueError where there is none, DatasetError where its picture cannot be read."""
        if not 1 <= number <= len(self.ds.images):
            raise ValueError(
                f"There is no scene {number}: {self.ds.name} has the scenes 1 to {len(self.ds.images)} here."
            )
        if number not in self._scenes:
            image_id = self.ds.images.index[number - 1]
            one = dataclasses.replace(self.ds, images=self.ds.images.loc[[image_id]])
            said = self.ds.expressions[self.ds.expressions["image_id"] == image_id]
            truth: dict[str, np.ndarray] = {}
            for text, box in zip(
                said["text"].str.lower(), self.ds.regions.loc[said["ann_id"], XYWH].to_numpy(), strict=True
            ):
                truth.setdefault(text, box)  # of equal texts the first counts
            self._scenes[number] = self._encoded(one, self._regions_of[image_id], truth)
        return self._scenes[number]

    def own_scene(self, content: bytes, boxes: str) -> Scene:
        """Return the scene of a picture file's content and of boxes (`read_boxes`: pixels), proposed where the text has none."""
        if (content, boxes) not in self._scenes:
            image = read_picture(content)
            regions = read_boxes(boxes, image.size) if boxes.strip() else propose(image)
            name = hashlib.sha256(content).hexdigest()
            image_id = int(name[:15], 16)  # as good as unique, also for a cache of features
            with tempfile.TemporaryDirectory() as folder:
                image.save(Path(folder) / f"{name}.png")
                size = {"file_name": f"{name}.png", "width": image.width, "height": image.height}
                images = pd.DataFrame([size], index=pd.Index([image_id], name="image_id"))
                one = dataclasses.replace(self.ds, name="own", image_root=Path(folder), images=images)
                self._scenes[content, boxes] = self._encoded(one, regions.assign(image_id=image_id), {})
        return self._scenes[content, boxes]

    def _encoded(self, one: ReferDataset, regions: pd.DataFrame, truth: dict[str, np.ndarray]) -> Scene:
        features = [scorer.encode_regions(one, regions, self.visual_prompts) for scorer in self.scorers]
        return Scene(one.load_image(one.images.index[0]), regions, features, truth)

    def table(self, scene: Scene, text: str, prompts: Sequence[str], method: str, **options: Any) -> pd.DataFrame:
        """Return one row a region, named 1, 2, …: clip (the logit), bias and score (of `method`, with its `options`).

        The bias is what the method's pool makes of a region's auxiliary logits (`normalization.family`), their mean
        where it has no temperature: what the methods of the family subtract, times their weight.
        """
        texts = [TEMPLATE.format(one.lower()) for one in (text, *prompts)]
        by_scorer = zip(self.scorers, scene.features, strict=True)
        logits = torch.stack([s.logits(features, s.encode_texts(texts)) for s, features in by_scorer]).mean(0)
        query, aux, group = logits[:, :1], logits[:, 1:], torch.zeros(len(logits), dtype=torch.long)
        score = family(query, aux, **options) if method == FAMILY else METHODS[method](query, aux, group, **options)
        temperature, nearest = options.get("temperature", math.inf), options.get("nearest", options.get("k"))
        bias = query - family(query, aux, 1.0, temperature, nearest)
        columns = {"clip": query, "bias": bias, "score": score}
        return pd.DataFrame({name: x[:, 0].numpy() for name, x in columns.items()}, index=range(1, len(query) + 1))

    def see(self, scene: Scene, text: str, prompts: Sequence[str], method: str, **options: Any) -> bytes:
        """Draw `figure`, say in `summary` what is picked and whether that is right, and return the figure as PNG.

        Raises ValueError where there is no expression or no auxiliary prompt.
        """
        text = " ".join(text.split())
        if not text or not prompts:
            what = (
                "at least one auxiliary prompt, with commas between several"
                if text
                else "an expression, such as: red star"
            )
            raise ValueError(f"Type {what}.")
        table = self.table(scene, text, prompts, method, **options)
        boxes, truth = scene.regions[XYWH].to_numpy(), scene.truth.get(text.lower())
        right = None
        if truth is not None:
            right = np.flatnonzero(
                rec_correct(np.arange(len(boxes)), boxes, np.tile(truth, (len(boxes), 1)))[0]
            ).tolist()
        self.summary = _verdict(table, method, right)
        plotting.region_scores(scene.image, boxes, table, method, text, truth, right or (), self.figure)
        self.figure.set_dpi(130)
        canvas, png = FigureCanvasAgg(self.figure), io.BytesIO()
        canvas.draw()  # savefig would draw it twice
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(png, "png", compress_level=1)
        return png.getvalue()


def _verdict(table: pd.DataFrame, method: str, right: list[int] | None) -> str:
    picks = {"clip": int(table["clip"].argmax()), method: int(table["score"].argmax())}
    said = []
    for name, pick in picks.items():
        known = "" if right is None else ", which is right" if pick in right else ", which is wrong"
        said.append(f"{plotting.METHOD_LABELS[name]} picks region {table.index[pick]}{known}")
    if len(picks) == 2:
        said[1] += ": the same." if len(set(picks.values())) == 1 else ": the pick changes."
    if right is None:
        said.append("What these words mean in this picture is not known, so neither is whether that is right.")
    elif not right:
        said.append("No candidate overlaps what is meant with IoU > 0.5, so no method can be right here.")
    return ". ".join(said).replace("..", ".").rstrip(".") + "."


def show(explorer: Explorer, whole: ReferDataset, start: Start, out_dir: Path) -> None:
    """Display the controls where a person is in front of the notebook, else the picture that `start` asks for.

    `whole` is the data set that banks are made from. A front end without widgets shows the picture too.
    """
    scene = explorer.scene(start.scene)
    text = start.expression or next(iter(scene.truth), "")
    options = options_of(start.method, explorer.logit_scale, start)
    png = explorer.see(scene, text, auxiliary_prompts(start.bank, whole), start.method, **options)
    if somebody_is_there():
        page = controls(explorer, whole, start, out_dir).page
        instead = {"text/plain": explorer.summary, "image/png": base64.b64encode(png).decode()}
        display(page._repr_mimebundle_() | instead, raw=True)
    else:
        display(Picture(png, alt=explorer.summary), Markdown(explorer.summary))


def somebody_is_there() -> bool:
    """Tell whether a person may move a slider: JupyterLab and its like can answer questions, papermill and nbconvert cannot."""
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel and kernel.get_parent().get("content", {}).get("allow_stdin"))


def controls(explorer: Explorer, whole: ReferDataset, start: Start, out_dir: Path) -> SimpleNamespace:
    """Return the controls as widgets by name, `page` being all of them; each change is drawn at once.

    What is wrong with an input is said on the page, and the picture fades until that is mended.
    """

    def make(kind: Callable, name: str, tip: str, **traits: Any) -> Any:
        style = {} if kind is ui.FileUpload else {"description_width": "135px"}
        return kind(description=name, tooltip=tip, layout={"width": "98%"}, style=style, **traits)

    methods = [(plotting.METHOD_LABELS[name], name) for name in (*METHODS, FAMILY)]
    banks = list(dict.fromkeys([*BANKS, start.bank, OWN_PROMPTS]))
    power = math.log10(start.temperature)
    w = SimpleNamespace(
        source=ui.ToggleButtons(options=["a scene of the data set", OWN_PICTURE], style={"button_width": "190px"}),
        scene=make(ui.IntSlider, "Scene", "Which picture of the split", min=1, max=len(explorer.ds.images), value=start.scene),
        known=make(ui.Dropdown, "Known expressions", "What the data set says of this picture; a choice fills the field below"),
        upload=make(ui.FileUpload, "Choose a picture", "A PNG or JPEG file", accept="image/*"),
        boxes=make(ui.Textarea, "Boxes", "In pixels, one box a line; without any, regions are proposed", rows=4,
                   placeholder="x, y, width, height\n…\nLeft empty, regions are proposed.", continuous_update=False),
        text=make(ui.Text, "Expression", "What is looked for, in your own words", placeholder="such as: red star"),
        bank=make(ui.Dropdown, "Auxiliary prompts", "What each region is asked about too", options=banks, value=start.bank),
        own=make(ui.Textarea, "Own prompts", "Words or phrases, with commas between them", rows=2, value="fish, star, key"),
        method=make(ui.Dropdown, "Method", "What is compared with CLIP", options=methods, value=start.method),
        temperature=make(ui.FloatLogSlider, "Temperature", "Low: a region's largest auxiliary logit counts; high: their mean",
                         min=min(-1.0, power), max=max(3.0, power), step=0.05, readout_format=".3g"),
        weight=make(ui.FloatSlider, "Weight", "Of the bias that is taken off; in BSAP-H of CLIP's softmax", max=1.5, step=0.05),
        nearest=make(ui.IntSlider, "Nearest prompts", "Only that many of a region's auxiliary logits count, the largest", min=1),
    )  # fmt: skip
    inputs = list(vars(w).values())
    w.message, w.summary, w.picture = ui.HTML(), ui.HTML(), ui.HTML()
    w.save = ui.Button(description="Save the picture", icon="save", tooltip=f"As fig_explore.png and .svg in {out_dir}")
    place = {"temperature": w.temperature, "weight": w.weight, "k": w.nearest, "nearest": w.nearest}

    def set_options(options: dict[str, Any]) -> None:
        w.weight.max = 1.0 if w.method.value == "bsap_h" else 1.5
        for widget in place.values():  # a value that plays no part would mislead
            widget.disabled, widget.layout.visibility = True, "hidden"
        for name, value in options.items():
            place[name].disabled, place[name].layout.visibility = False, "visible"
            place[name].value = w.nearest.max if value is None else value

    def update(changed: Any) -> None:
        uploaded = w.source.value == OWN_PICTURE
        shown = {
            w.scene: not uploaded,
            w.known: not uploaded,
            w.upload: uploaded,
            w.boxes: uploaded,
            w.own: w.bank.value == OWN_PROMPTS,
        }
        for widget, there in shown.items():
            widget.layout.display = "" if there else "none"
        if uploaded and not w.upload.value:
            raise ValueError("Choose a picture: a PNG or JPEG file.")
        if changed in (w.source, w.scene, w.upload, w.boxes):
            w.message.value = "Encoding the regions …"
        scene = (
            explorer.own_scene(bytes(w.upload.value[0]["content"]), w.boxes.value)
            if uploaded
            else explorer.scene(w.scene.value)
        )
        if changed is w.scene:
            w.known.options, w.known.index = list(scene.truth), 0 if scene.truth else None
        if changed in (w.scene, w.known):
            w.text.value = w.known.value or ""
        typed = [part.strip() for part in re.split(r"[,\n]", w.own.value) if part.strip()]
        prompts = list(dict.fromkeys(typed)) if w.bank.value == OWN_PROMPTS else auxiliary_prompts(w.bank.value, whole)
        w.nearest.max = max(len(prompts), 1)
        if changed is w.method:
            set_options(options_of(w.method.value, explorer.logit_scale))
        png = explorer.see(
            scene, w.text.value, prompts, w.method.value, **{o: place[o].value for o in options_of(w.method.value)}
        )
        said, encoded = html.escape(explorer.summary), base64.b64encode(png).decode()
        w.message.value, w.summary.value = "", f'<div role="status">{said}</div>'
        w.picture.value = f'<img style="width: 100%; opacity: 1" alt="{said}" src="data:image/png;base64,{encoded}">'

    busy = [False]

    def on_change(change: dict[str, Any]) -> None:
        if busy[0]:  # what is set along with something else needs no drawing of its own
            return
        busy[0] = True
        try:
            update(change["owner"])
        except Exception as error:  # nothing that a person types or uploads may end in a traceback
            meant = isinstance(error, (ValueError, RuntimeError, OSError))
            words = str(error) if meant else f"This went wrong: {type(error).__name__}: {error}"
            w.message.value = f'<div role="alert" style="color: #B00020">{html.escape(words)}</div>'
            w.summary.value, w.picture.value = "", w.picture.value.replace("opacity: 1", "opacity: 0.3", 1)
        finally:
            busy[0] = False

    def on_save(_: Any) -> None:
        plotting.save(explorer.figure, out_dir / "fig_explore")
        w.message.value = f'<div role="status">Saved: {html.escape(str(out_dir / "fig_explore.png"))} and .svg</div>'

    on_change({"owner": w.scene})
    busy[0] = True
    set_options(options_of(start.method, explorer.logit_scale, start))
    busy[0] = False
    for widget in inputs:
        widget.observe(on_change, "value")
    w.text.value = start.expression or w.text.value
    w.save.on_click(on_save)
    halves = [
        [w.scene, w.known, w.upload, w.boxes, w.text],
        [w.bank, w.own, w.method, w.temperature, w.weight, w.nearest],
    ]
    columns = ui.HBox([ui.VBox(half, layout={"width": "50%"}) for half in halves])
    w.page = ui.VBox([w.source, columns, w.message, w.summary, w.picture, w.save], layout={"max_width": "920px"})
    return w
