"""What `notebooks/00_explore.ipynb` shows: one picture and one expression under all methods. The controls are its cells."""

import io
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from . import plotting
from .aux_prompts import auxiliary_prompts, unlabelled_texts
from .datasets import XYWH, ReferDataset
from .evaluation import pick
from .normalization import METHODS, calibrated_weight, pool
from .regions import box_iou, pair_up
from .scoring import TEMPLATE

SHOWN = [name for name in METHODS if name not in ("tas", "db_norm")]  # those two need banks of their own
TAG = {"boxstyle": "square,pad=0.12", "facecolor": "0.2", "edgecolor": "none"}


class Setting(NamedTuple):
    """What is asked and how: `bank` is a name, a text file or prompts with commas between them, `method` is in focus."""

    text: str = ""
    template: str = TEMPLATE
    bank: str = "categories"
    method: str = "bsap"
    temperature: float = 1.0
    weight: float = 1.0


class Explorer:
    """The scenes of `ds` with their `candidates`, encoded once; `whole` is the data set that banks are made from.

    A scene is a picture, its candidates' boxes (xywh [N, 4]) and their rows [N] in features [V, C, D], and its expressions.
    """

    def __init__(self, ds: ReferDataset, candidates: pd.DataFrame, scorer: Any, whole: ReferDataset,
                 visual_prompts: Any = ("crop", "blur")) -> None:  # fmt: skip
        self.ds, self.scorer, self.whole, self.visual_prompts = ds, scorer, whole, list(visual_prompts)
        self.pairs, self.image = pair_up(ds, candidates), scorer.encode_regions(ds, candidates, visual_prompts)
        self.boxes, self.figure = candidates[XYWH].to_numpy(), plt.Figure(figsize=(plotting.DOUBLE_COLUMN, 2.9))
        self.figure.set_layout_engine("none")  # fixed places: a layout that is computed takes as long as the drawing
        self.competing = torch.from_numpy(ds.images.index.get_indexer(candidates["image_id"]))

    def scene(self, number: int) -> SimpleNamespace:
        """Return scene 1, 2, …"""
        image_id, rows = self.ds.images.index[number - 1], (self.competing == number - 1).nonzero()[:, 0]
        known = self.ds.expressions[self.ds.expressions["image_id"] == image_id]
        image, boxes = self.ds.load_image(image_id), self.boxes[rows.numpy()]
        return SimpleNamespace(image=image, boxes=boxes, rows=rows, features=self.image, expressions=known)

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

    def logits(self, features: torch.Tensor, texts: Any, setting: Setting) -> torch.Tensor:
        """Return logits [C, T] of candidates' features [V, C, D] (`self.image`: those of all scenes) with texts."""
        return self.scorer.logits(features, self.scorer.encode_texts(texts, setting.template))

    def prompts(self, bank: str) -> list[str]:
        """Return the texts typed with commas between them, or those of a bank or a text file."""
        typed = [text.strip() for text in bank.split(",") if text.strip()]
        return typed if typed and "," in bank else auxiliary_prompts(bank, self.whole)

    def calibrated(self, setting: Setting) -> float:
        """Return w* at the setting's temperature, from expressions that are not in the bank."""
        prompts = self.prompts(setting.bank)
        texts = unlabelled_texts(self.whole, prompts)
        a, unlabelled = (self.logits(self.image, part, setting) for part in (prompts, texts))
        return calibrated_weight(pool(a, setting.temperature), unlabelled.mean(1), self.competing)

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
        s = self.scorer.pair_logits(self.image, text, self.pairs)
        a = self.logits(self.image, self.prompts(setting.bank), setting)
        scores = [self.score(name, s, a, self.pairs, setting) for name in ("clip", setting.method)]
        return self.pairs.iou[torch.stack([pick(self.pairs, one) for one in scores])] > 0.5

    def table(self, scene: SimpleNamespace, setting: Setting) -> pd.DataFrame:
        """Return a row a method: pick (from 1), right (✓, ✗, –: not known), margin to the second-best."""
        s, a = (self.logits(scene.features, texts, setting) for texts in ([setting.text], self.prompts(setting.bank)))
        pairs = SimpleNamespace(expression=0 * scene.rows, candidate=scene.rows)
        known = scene.expressions["ann_id"][scene.expressions["text"].str.lower() == setting.text.lower()]
        truth = self.ds.annotations.loc[known, XYWH].to_numpy()[:1]
        scores = torch.stack([self.score(name, s[scene.rows, 0], a, pairs, setting).double() for name in SHOWN], 1)
        best, place = (values.numpy() for values in scores.topk(min(2, len(scores)), 0))
        table = pd.DataFrame({"pick": place[0] + 1, "right": "–", "margin": best[0] - best[-1]}, SHOWN)
        if len(truth):
            table["right"] = np.where(box_iou(scene.boxes[place[0]], truth) > 0.5, "✓", "✗")
        return table

    def draw(self, scene: SimpleNamespace, setting: Setting, table: pd.DataFrame) -> bytes:
        """Return a PNG: the picture with the picks of CLIP and of the method in focus, and what makes their biases."""
        self.figure.clear()
        left, right = self.figure.add_axes((0.01, 0.02, 0.53, 0.9)), self.figure.add_axes((0.71, 0.15, 0.28, 0.68))
        small, (width, height) = scene.image.reduce(max(1, max(scene.image.size) // 800)), scene.image.size
        left.imshow(small, extent=(0, width, height, 0))
        left.set(title=plotting.plain(f"“{setting.text}”", 60, 1), **plotting.BLANK)
        for number, (x, y, w, h) in enumerate(scene.boxes, 1):
            left.add_patch(plt.Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=0.8))
            left.text(x + w, y + h, str(number), ha="right", va="bottom", fontsize=6, color="white", bbox=TAG)
        picks = {name: table.at[name, "pick"] - 1 for name in dict.fromkeys(["clip", setting.method])}
        prompts, t, picked = self.prompts(setting.bank), setting.temperature, scene.rows[list(picks.values())]
        s, a = (self.logits(scene.features[:, picked], texts, setting).double() for texts in ([setting.text], prompts))
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
