"""`refshapes`: generated scenes with referring expressions, the sample benchmark that ships with this repository.

A scene looks like a small photograph: objects of 20 kinds, 10 colours, 3 patterns and 4 sizes lie on a textured, lit, noisy
surface and partly cover each other. Expressions come in the three kinds people use: attributes ("striped blue fish"), place
("mug on the left") and relation ("key above the red house"), each true of exactly one object of its scene. The benchmark is
written in the UNC layout, so that the loader of RefCOCO reads it unchanged. It is a *model* of the problem: no number measured
on it is a claim about RefCOCO.

Everything is a function of a seed:

>>> scene = draw_scene(np.random.default_rng(0))
>>> scene.image.shape, scene.objects[0].phrase() != ""
((240, 320, 3), True)
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from scipy import ndimage
from tqdm.auto import tqdm

WIDTH, HEIGHT = 320, 240
SIZES = {"tiny": 36, "small": 50, "medium": 68, "large": 94}  # longest side before jitter, pixels
EXPRESSIONS = 6  # of an image
UNSAID = ("plain", "medium")
PATTERNS = ("plain", "striped", "dotted")
COLOURS = {
    "red": (205, 38, 38), "blue": (38, 84, 200), "white": (238, 236, 230), "green": (44, 150, 62), "black": (38, 36, 40),
    "yellow": (240, 206, 40), "brown": (124, 76, 38), "pink": (244, 140, 184), "orange": (240, 128, 24), "purple": (126, 58, 170),
}  # fmt: skip
# Each surface: dark tint, light tint, grain along x and y in pixels (long grain along one axis reads as wood or water).
SURFACES = {
    "grass": ((58, 92, 40), (132, 160, 84), (3, 5)), "sand": ((186, 160, 116), (226, 206, 168), (4, 4)),
    "water": ((52, 104, 134), (128, 178, 196), (46, 5)), "wood": ((116, 78, 48), (184, 140, 96), (90, 4)),
    "stone": ((112, 112, 114), (178, 176, 172), (12, 12)), "carpet": ((104, 72, 92), (152, 120, 138), (3, 3)),
    "snow": ((196, 206, 220), (236, 240, 246), (30, 16)), "linen": ((176, 166, 148), (212, 204, 190), (3, 8)),
}  # fmt: skip


def _circle_of(count: int, radius: float, start: float = -np.pi / 2) -> np.ndarray:
    angle = start + np.arange(count) * 2 * np.pi / count
    return np.stack([0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)], 1)


def _star() -> list[float]:
    points = np.empty((10, 2))
    points[0::2], points[1::2] = _circle_of(5, 0.5), _circle_of(5, 0.21, start=-np.pi / 2 + np.pi / 5)
    return points.ravel().tolist()


def _heart() -> list[float]:
    t = np.linspace(0, 2 * np.pi, 60)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([0.5 + x / 34, 0.46 - y / 32], 1).ravel().tolist()


def _leaf() -> list[float]:
    t = np.linspace(0, 1, 30)
    bulge = 0.36 * np.sin(np.pi * t**0.8)
    one, other = (np.stack([t + side * bulge, 1 - t + side * bulge], 1) for side in (-0.7, 0.7))
    return np.clip(np.concatenate([one, other[::-1]]), 0.01, 0.99).ravel().tolist()


# A kind is drawn on a unit canvas: "add" and "cut" build the silhouette, "detail" is drawn darker on top of it.
KINDS: dict[str, list[tuple[str, str, list[float]]]] = {
    "star": [("add", "polygon", _star())],
    "fish": [("add", "ellipse", [0.02, 0.22, 0.76, 0.78]),
             ("add", "polygon", [0.6, 0.5, 0.98, 0.16, 0.88, 0.5, 0.98, 0.84]),
             ("detail", "ellipse", [0.14, 0.38, 0.23, 0.47]), ("detail", "arc", [0.12, 0.3, 0.4, 0.7])],
    "mug": [("add", "ellipse", [0.54, 0.28, 0.98, 0.76]), ("cut", "ellipse", [0.66, 0.4, 0.87, 0.64]),
            ("add", "round", [0.06, 0.1, 0.72, 0.94]), ("detail", "ellipse", [0.1, 0.11, 0.68, 0.22])],
    "key": [("add", "ellipse", [0.02, 0.26, 0.46, 0.74]), ("cut", "ellipse", [0.14, 0.39, 0.33, 0.61]),
            ("add", "rectangle", [0.42, 0.44, 0.98, 0.56]), ("add", "rectangle", [0.7, 0.5, 0.79, 0.76]),
            ("add", "rectangle", [0.88, 0.5, 0.98, 0.7])],
    "house": [("add", "polygon", [0.02, 0.48, 0.5, 0.04, 0.98, 0.48]), ("add", "rectangle", [0.12, 0.46, 0.88, 0.96]),
              ("detail", "rectangle", [0.43, 0.64, 0.6, 0.96]), ("detail", "rectangle", [0.2, 0.56, 0.34, 0.7]),
              ("detail", "rectangle", [0.68, 0.56, 0.81, 0.7])],
    "heart": [("add", "polygon", _heart())],
    "tree": [("detail", "rectangle", [0.43, 0.76, 0.57, 0.99]),
             ("add", "polygon", [0.5, 0.01, 0.82, 0.38, 0.18, 0.38]),
             ("add", "polygon", [0.5, 0.18, 0.9, 0.6, 0.1, 0.6]),
             ("add", "polygon", [0.5, 0.36, 0.98, 0.82, 0.02, 0.82])],
    "car": [("add", "round", [0.01, 0.44, 0.99, 0.76]),
            ("add", "polygon", [0.18, 0.48, 0.32, 0.2, 0.7, 0.2, 0.86, 0.48]),
            ("detail", "ellipse", [0.13, 0.62, 0.36, 0.88]), ("detail", "ellipse", [0.64, 0.62, 0.87, 0.88]),
            ("detail", "polygon", [0.27, 0.45, 0.36, 0.26, 0.48, 0.26, 0.48, 0.45]),
            ("detail", "polygon", [0.54, 0.45, 0.54, 0.26, 0.67, 0.26, 0.76, 0.45])],
    "flower": [*(("add", "ellipse", [x - 0.2, y - 0.2, x + 0.2, y + 0.2]) for x, y in _circle_of(6, 0.29)),
               ("detail", "ellipse", [0.36, 0.36, 0.64, 0.64])],
    "bird": [("add", "ellipse", [0.16, 0.34, 0.82, 0.82]), ("add", "ellipse", [0.58, 0.12, 0.92, 0.48]),
             ("add", "polygon", [0.88, 0.24, 1.0, 0.32, 0.88, 0.38]),
             ("add", "polygon", [0.28, 0.48, 0.0, 0.28, 0.06, 0.66]),
             ("detail", "ellipse", [0.75, 0.22, 0.82, 0.29]), ("detail", "arc", [0.24, 0.3, 0.66, 0.68]),
             ("detail", "rectangle", [0.42, 0.8, 0.46, 0.97]), ("detail", "rectangle", [0.56, 0.8, 0.6, 0.97])],
    "boat": [("add", "polygon", [0.02, 0.68, 0.98, 0.68, 0.8, 0.96, 0.2, 0.96]),
             ("detail", "rectangle", [0.47, 0.04, 0.52, 0.7]),
             ("add", "polygon", [0.55, 0.08, 0.94, 0.62, 0.55, 0.62]),
             ("add", "polygon", [0.44, 0.18, 0.14, 0.62, 0.44, 0.62])],
    "hat": [("add", "round", [0.0, 0.64, 1.0, 0.84]), ("add", "round", [0.22, 0.16, 0.78, 0.78]),
            ("detail", "rectangle", [0.22, 0.54, 0.78, 0.65])],
    "leaf": [("add", "polygon", _leaf()),
             ("detail", "line", [0.02, 0.98, 0.88, 0.12]), ("detail", "line", [0.36, 0.64, 0.34, 0.34]),
             ("detail", "line", [0.4, 0.6, 0.68, 0.64]), ("detail", "line", [0.6, 0.4, 0.58, 0.2])],
    "bottle": [("add", "round", [0.26, 0.4, 0.74, 0.99]), ("add", "rectangle", [0.41, 0.04, 0.59, 0.46]),
               ("add", "polygon", [0.41, 0.28, 0.59, 0.28, 0.74, 0.52, 0.26, 0.52]),
               ("detail", "rectangle", [0.4, 0.03, 0.6, 0.11]),
               ("detail", "rectangle", [0.27, 0.62, 0.73, 0.66]), ("detail", "rectangle", [0.27, 0.84, 0.73, 0.88])],
    "moon": [("add", "ellipse", [0.04, 0.02, 0.98, 0.98]), ("cut", "ellipse", [0.34, -0.06, 1.14, 0.82])],
    "umbrella": [("add", "chord", [0.01, 0.04, 0.99, 1.04]), ("cut", "ellipse", [0.03, 0.47, 0.34, 0.68]),
                 ("cut", "ellipse", [0.35, 0.47, 0.65, 0.68]), ("cut", "ellipse", [0.66, 0.47, 0.97, 0.68]),
                 ("detail", "rectangle", [0.475, 0.5, 0.525, 0.92]), ("detail", "arc", [0.36, 0.78, 0.53, 0.98])],
    "apple": [("add", "ellipse", [0.06, 0.24, 0.6, 0.96]), ("add", "ellipse", [0.4, 0.24, 0.94, 0.96]),
              ("detail", "line", [0.5, 0.32, 0.56, 0.06]),
              ("add", "polygon", [0.56, 0.16, 0.72, 0.03, 0.9, 0.06, 0.74, 0.2])],
    "crown": [("add", "polygon", [0.04, 0.92, 0.02, 0.28, 0.27, 0.54, 0.5, 0.08, 0.73, 0.54, 0.98, 0.28, 0.96, 0.92]),
              ("detail", "rectangle", [0.05, 0.76, 0.95, 0.82]), ("detail", "ellipse", [0.44, 0.56, 0.56, 0.68])],
    "mushroom": [("add", "round", [0.36, 0.46, 0.64, 0.97]), ("add", "chord", [0.02, 0.04, 0.98, 1.06]),
                 ("detail", "ellipse", [0.2, 0.32, 0.34, 0.45]), ("detail", "ellipse", [0.44, 0.14, 0.58, 0.27]),
                 ("detail", "ellipse", [0.66, 0.32, 0.8, 0.45])],
    "bell": [("add", "ellipse", [0.42, 0.8, 0.58, 0.98]), ("add", "chord", [0.2, 0.06, 0.8, 0.76]),
             ("add", "ellipse", [0.44, 0.01, 0.56, 0.13]),
             ("add", "polygon", [0.2, 0.4, 0.8, 0.4, 0.84, 0.7, 0.97, 0.84, 0.03, 0.84, 0.16, 0.7]),
             ("detail", "rectangle", [0.12, 0.7, 0.88, 0.75])],
}  # fmt: skip
GLYPH = 192  # pixels of the canvas a kind is drawn on, before it is resized into a scene


@cache
def glyph(kind: str) -> Image.Image:
    """Return kind `kind` as an RGB image whose bands are silhouette, detail and relief shading (128 = flat), each 0..255."""
    silhouette, detail = Image.new("L", (GLYPH, GLYPH)), Image.new("L", (GLYPH, GLYPH))
    for role, shape, unit in KINDS[kind]:
        points = [value * (GLYPH - 1) for value in unit]
        for canvas, value in [(silhouette, 0 if role == "cut" else 255)] + [(detail, 255)] * (role == "detail"):
            draw = ImageDraw.Draw(canvas)
            if shape == "chord":  # the upper half of an ellipse
                draw.chord(points, 180, 360, fill=value)
            elif shape == "arc":
                draw.arc(points, -80, 80, fill=value, width=GLYPH // 28)
            elif shape == "line":
                draw.line(points, fill=value, width=GLYPH // 28)
            elif shape == "round":
                draw.rounded_rectangle(points, GLYPH // 16, fill=value)
            else:
                getattr(draw, shape)(points, fill=value)
    height = silhouette.filter(ImageFilter.GaussianBlur(GLYPH / 14))
    relief = ImageChops.subtract(ImageChops.offset(height, -7, -7), ImageChops.offset(height, 7, 7), 2, 128)
    return Image.merge("RGB", (silhouette, detail, relief))


@dataclass
class SceneObject:
    """One object of a scene: `mask` [height, width] is its visible part, `box` the tight box of that, xywh in pixels."""

    kind: str
    colour: str
    pattern: str
    size: str
    mask: np.ndarray
    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box: x, y in pixels."""
        x, y, w, h = self.box
        return x + w / 2, y + h / 2

    def phrase(self, words: tuple[str, ...] = ("pattern", "colour")) -> str:
        """Name the object with the attributes in `words`; "plain" and "medium" go without saying."""
        said = [getattr(self, word) for word in ("size", "pattern", "colour") if word in words]
        return " ".join([word for word in said if word not in UNSAID] + [self.kind])


@dataclass
class Scene:
    """A drawn scene: `image` [240, 320, 3] uint8 and its objects, the back-most first."""

    image: np.ndarray
    surface: str
    objects: list[SceneObject]


def _fractal_noise(rng: np.random.Generator, grain: tuple[int, int]) -> np.ndarray:
    """Smooth noise in about 0..1, [height, width]: three octaves of random grids, resized."""
    total = np.zeros((HEIGHT, WIDTH), np.float32)
    for octave, strength in ((4, 0.5), (2, 0.3), (1, 0.35)):
        shape = (max(2, HEIGHT // (grain[1] * octave)), max(2, WIDTH // (grain[0] * octave)))
        grid = Image.fromarray(rng.random(shape, np.float32))
        total += strength * (np.asarray(grid.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) - 0.5)
    return np.clip(total + 0.5, 0, 1)


def _background(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    def surface(name: str) -> np.ndarray:
        dark, light, grain = SURFACES[name]
        tint = rng.normal(0, 7, 3)
        mix = _fractal_noise(rng, grain)[..., None]
        return np.array(dark, np.float32) * (1 - mix) + np.array(light, np.float32) * mix + tint.astype(np.float32)

    ground, back = rng.choice(list(SURFACES), 2, replace=False)
    canvas = surface(ground)
    if rng.random() < 0.5:  # a wall, a shore or a table's edge behind the ground
        horizon = rng.integers(HEIGHT // 5, HEIGHT // 2)
        slope = rng.normal(0, 0.04) * (np.arange(WIDTH) - WIDTH / 2)
        above = np.clip(horizon + slope[None] - np.arange(HEIGHT)[:, None], 0, 1)[..., None].astype(np.float32)
        canvas = canvas * (1 - above) + (surface(back) * 0.6 + 70) * above
    return canvas, str(ground)


def _paint(canvas: np.ndarray, thing: SceneObject, rng: np.random.Generator, centre: tuple[float, float],
           taken: list[SceneObject]) -> bool:  # fmt: skip
    """Draw `thing` around `centre` into `canvas` (with its shadow) and set its mask.

    False, and nothing drawn, when it does not fit the picture or would cover over 30 % of an object: a little occlusion
    is part of life, more makes the referent unclear.
    """
    side = SIZES[thing.size] * rng.uniform(0.88, 1.12)
    w, h = int(side * rng.uniform(0.86, 1.0)), int(side * rng.uniform(0.86, 1.0))
    picture = glyph(thing.kind)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.resize((w, h), Image.Resampling.BOX)
    picture = picture.rotate(rng.normal(0, 9), Image.Resampling.BICUBIC, expand=True, fillcolor=(0, 0, 128))
    left, top = int(centre[0] - picture.width / 2), int(centre[1] - picture.height / 2)
    margin = 6  # the shadow needs it
    if left < 0 or top < 0 or left + picture.width + margin > WIDTH or top + picture.height + margin > HEIGHT:
        return False
    bands = np.asarray(picture, np.float32) / 255
    rows, columns = slice(top, top + picture.height), slice(left, left + picture.width)
    covers = bands[..., 0] > 0.5
    if any((other.mask[rows, columns] & covers).sum() > 0.3 * other.mask.sum() for other in taken):
        return False
    thing.mask[rows, columns] = covers
    alpha, detail, relief = bands[..., 0:1], bands[..., 1:2], bands[..., 2:3]

    base = np.array(COLOURS[thing.colour], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    bright = base.mean() > 150
    second = base * 0.5 if bright else base * 0.25 + 255 * 0.75
    y, x = np.mgrid[: picture.height, : picture.width].astype(np.float32) / side
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period = rng.uniform(4.2, 5.6) * 2 * np.pi
    if thing.pattern == "striped":
        ink = np.clip(np.sin(period * along) * 4 + 0.5, 0, 1)
    elif thing.pattern == "dotted":
        ink = np.clip((np.sin(period * along) * np.sin(period * across) - 0.3) * 5, 0, 1)
    else:
        ink = np.zeros_like(along)
    skin = base * (1 - ink[..., None]) + second * ink[..., None]
    skin = skin * (1 - 0.62 * detail) + (60 if thing.colour == "black" else 0) * detail
    skin = skin * (0.96 + 1.1 * (relief - 0.5)) + 90 * np.clip(relief - 0.62, 0, 1)

    shade = Image.new("L", (picture.width + margin, picture.height + margin))
    shade.paste(picture.getchannel(0), (margin // 2 + 1, margin // 2 + 1))
    shadow = np.asarray(shade.filter(ImageFilter.GaussianBlur(3)), np.float32)[..., None] / 255
    canvas[top : top + shadow.shape[0], left : left + shadow.shape[1]] *= 1 - 0.5 * shadow
    canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + skin * alpha
    return True


def _choose_attributes(rng: np.random.Generator, others: list[SceneObject], long_tail: bool) -> dict[str, str]:
    kinds, colours = list(KINDS), list(COLOURS)
    if long_tail:  # as on the web: few things are common, and each has colours that it usually comes in
        kind = kinds[rng.choice(len(kinds), p=_zipf(len(kinds)))]
        usual = [(3 * kinds.index(kind)) % 10, (3 * kinds.index(kind) + 4) % 10]
        colour = colours[rng.choice(usual) if rng.random() < 0.5 else rng.choice(len(colours), p=_zipf(len(colours)))]
    else:
        kind, colour = str(rng.choice(kinds)), str(rng.choice(colours))
        if others and rng.random() < 0.4:  # a second of its kind makes its other attributes matter
            kind = others[rng.integers(len(others))].kind
        elif others and rng.random() < 0.3:
            colour = others[rng.integers(len(others))].colour
    pattern = str(rng.choice(PATTERNS, p=[0.5, 0.25, 0.25]))
    size = str(rng.choice(list(SIZES), p=[0.2, 0.3, 0.3, 0.2]))
    return {"kind": kind, "colour": colour, "pattern": pattern, "size": size}


def _zipf(count: int) -> np.ndarray:
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


def draw_scene(rng: np.random.Generator, long_tail: bool = False) -> Scene:
    """Draw a scene of 4 to 9 objects.

    `long_tail` draws kinds by a Zipf law and gives each kind two usual colours (the training world of `clip-refshapes`);
    otherwise kinds and colours are uniform, and scenes repeat kinds so that one word is seldom enough to tell two objects apart.
    """
    canvas, surface = _background(rng)
    objects: list[SceneObject] = []
    wanted = rng.integers(4, 10)
    for _ in range(60):
        if len(objects) == wanted:
            break
        attributes = _choose_attributes(rng, objects, long_tail)
        thing = SceneObject(**attributes, mask=np.zeros((HEIGHT, WIDTH), bool))  # type: ignore[arg-type]
        if not _paint(canvas, thing, rng, (rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)), objects):
            continue
        for other in objects:
            other.mask &= ~thing.mask
        objects.append(thing)
    for thing in objects:
        rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
        thing.box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
    y, x = np.ogrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    light = 1.04 + x * rng.normal(0, 0.07) + y * rng.normal(0, 0.05) - 0.14 * (x**2 + y**2)  # lamp and vignette
    canvas = canvas * light[..., None].astype(np.float32) + 3.5 * rng.standard_normal(canvas.shape, np.float32)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), surface, objects)


PLACES = {"on the left": lambda x, y: x < WIDTH * 0.36, "on the right": lambda x, y: x > WIDTH * 0.64,
          "at the top": lambda x, y: y < HEIGHT * 0.36, "at the bottom": lambda x, y: y > HEIGHT * 0.64,
          "in the middle": lambda x, y: abs(x - WIDTH / 2) < WIDTH * 0.13 and abs(y - HEIGHT / 2) < HEIGHT * 0.2}  # fmt: skip
RELATIONS = {"above": lambda dx, dy: dy < -20 and abs(dx) < 60, "below": lambda dx, dy: dy > 20 and abs(dx) < 60,
             "left of": lambda dx, dy: dx < -20 and abs(dy) < 50, "right of": lambda dx, dy: dx > 20 and abs(dy) < 50,
             "next to": lambda dx, dy: abs(dx) < 75 and abs(dy) < 45}  # fmt: skip
ATTRIBUTE_CHOICES = ((), ("colour",), ("pattern",), ("pattern", "colour"), ("size",), ("size", "colour"),
                     ("size", "pattern", "colour"))  # fmt: skip


def describe(scene: Scene, target: SceneObject, kind: str, rng: np.random.Generator) -> str | None:
    """Return an expression of `kind` ("attributes", "place" or "relation") true of `target` alone; None when there is none.

    Truth is checked against every object of the scene, with the attributes that are said.
    """

    def matches(words: tuple[str, ...], one: SceneObject) -> list[SceneObject]:
        return [o for o in scene.objects if o.kind == one.kind and all(getattr(o, w) == getattr(one, w) for w in words)]

    def usable(one: SceneObject) -> list[tuple[str, ...]]:
        return [words for words in ATTRIBUTE_CHOICES if not any(getattr(one, word) in UNSAID for word in words)]

    found: list[str] = []
    if kind == "attributes":
        found = [target.phrase(words) for words in usable(target) if len(matches(words, target)) == 1]
    elif kind == "place":
        for words in usable(target)[:3]:
            for place, holds in PLACES.items():
                there = [o for o in matches(words, target) if holds(*o.centre)]
                if len(there) == 1 and there[0] is target:
                    found.append(f"{target.phrase(words)} {place}")
    else:
        for other in scene.objects:
            naming = [words for words in usable(other) if other is not target and len(matches(words, other)) == 1]
            for words in usable(target)[:3] if naming else []:
                for relation, holds in RELATIONS.items():
                    x, y = other.centre
                    fits = [o for o in matches(words, target) if holds(o.centre[0] - x, o.centre[1] - y)]
                    there = [o for o in fits if o is not other]
                    if len(there) == 1 and there[0] is target:
                        found.append(f"{target.phrase(words)} {relation} the {other.phrase(naming[0])}")
    found = [text for text in found if text]
    if not found:
        return None
    brevity = np.array([0.6 ** len(text.split()) for text in found])  # people are brief
    return found[rng.choice(len(found), p=brevity / brevity.sum())]


def _clip_box(x: float, y: float, w: float, h: float) -> list[float]:
    x0, y0 = max(0.0, x), max(0.0, y)
    return [round(float(v), 1) for v in (x0, y0, min(x + w, WIDTH) - x0, min(y + h, HEIGHT) - y0)]


def detect(scene: Scene, rng: np.random.Generator) -> list[list[float]]:
    """Return 5 to 20 boxes (xywh, pixels) as a detector would: jittered, some missed, some doubled, background too."""
    boxes = []
    for thing in scene.objects:
        x, y, w, h = thing.box
        for spread in (0.05, 0.16):  # the second is the looser double that non-maximum suppression left
            if rng.random() < (0.93 if spread < 0.1 else 0.3):
                dx, dy, dw, dh = rng.normal(0, spread, 4)
                boxes.append(_clip_box(x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)))
    for _ in range(max(int(rng.integers(2, 6)), 5 - len(boxes))):
        w, h = np.exp(rng.normal(3.9, 0.45, 2))
        w, h = min(w, WIDTH * 0.6), min(h, HEIGHT * 0.6)
        boxes.append(_clip_box(rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h))
    rng.shuffle(boxes)  # a detector's order says nothing about which box is which object
    return boxes[:20]


def _blob(rng: np.random.Generator) -> np.ndarray:
    """Return a wobbly disc somewhere in the picture, [height, width] bool: background taken for a thing."""
    radius, squeeze, turn = np.exp(rng.normal(3.1, 0.45)), rng.uniform(0.5, 1), rng.uniform(0, np.pi)
    y, x = np.mgrid[:HEIGHT, :WIDTH] - np.array([rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH)])[:, None, None]
    along, across = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / squeeze
    around = np.linspace(-np.pi, np.pi, 91)
    waves = rng.normal(0, 0.09, 4) * np.cos(np.arange(2, 6) * around[:, None] + rng.uniform(0, 2 * np.pi, 4))
    return np.hypot(along, across) < np.interp(np.arctan2(across, along), around, radius * (1 + waves.sum(1)))


def _halves(mask: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut `mask` in two by a line near its centre."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] - np.array(ndimage.center_of_mass(mask))[:, None, None]
    turn = rng.uniform(0, np.pi)
    side = x * np.cos(turn) + y * np.sin(turn) > rng.normal(0, 3)
    return [mask & side, mask & ~side]


def segment(scene: Scene, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Return 5 to 20 segments ([H, W] bool) and their scores, as a class-agnostic segmenter would.

    Eroded, dilated and shifted objects; some missed, some found twice, some only in two halves, some merged with a
    neighbour; and patches of background. The score is what the segmenter makes of its mask: the IoU with the best
    object, misjudged, and it likes a third of the background patches as much as things.
    """

    def roughly(mask: np.ndarray, spread: float) -> np.ndarray:
        size = np.sqrt(mask.sum())
        grow, (down, right) = rng.normal(0, spread) * size, np.rint(rng.normal(0, spread * size / 2, 2)).astype(int)
        grow = np.copysign(max(abs(grow), 1), grow)  # no outline is exact
        distance = ndimage.distance_transform_edt(~mask if grow > 0 else mask)
        mask = distance <= grow if grow > 0 else distance > -grow
        padded = np.pad(mask, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0))))
        return padded[max(-down, 0) :, max(-right, 0) :][:HEIGHT, :WIDTH]

    segments: list[np.ndarray] = []
    fates = ["found", "twice", "halves", "both", "merged", "missed"]
    for thing in scene.objects:
        fate = rng.choice(fates, p=[0.4, 0.2, 0.08, 0.12, 0.14, 0.06])
        if fate in ("halves", "both"):
            segments += [roughly(half, 0.02) for half in _halves(thing.mask, rng)]
        if fate == "merged":
            away = [np.hypot(*np.subtract(o.centre, thing.centre)) or np.inf for o in scene.objects]  # not itself
            segments.append(roughly(thing.mask | scene.objects[int(np.argmin(away))].mask, 0.02))
        if fate in ("found", "twice", "both", "merged") and (fate != "merged" or rng.random() < 0.7):
            segments.append(roughly(thing.mask, 0.035))
        if fate == "twice":
            segments.append(roughly(thing.mask, 0.1))
    for _ in range(max(int(rng.integers(2, 6)), 6 - len(segments))):
        segments.append(_blob(rng))
    scored = []
    for mask in segments:
        ious = [(mask & thing.mask).sum() / (mask | thing.mask).sum() for thing in scene.objects] if mask.any() else [0]
        best = max(ious)
        liked = rng.uniform(0.6, 0.95) if best < 0.1 and rng.random() < 0.33 else best
        if mask.sum() >= 40:  # an eroded sliver is nothing that a segmenter would report
            scored.append((mask, float(np.clip(liked + rng.normal(0, 0.08), 0.01, 0.99).round(3))))
    order = rng.permutation(len(scored))  # its order says nothing about which segment is which object
    return [scored[i] for i in order][:20]


def _run_length(mask: np.ndarray) -> dict:
    """Return COCO's compressed RLE of `mask`, as JSON has it."""
    run_length = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in mask.shape], "counts": run_length["counts"].decode("ascii")}


def write_benchmark(root: Path | str, seed: int = 2024, images_per_split: int = 160) -> None:
    """Write the benchmark under `root` in the UNC layout; same seed, same bytes.

    Beside it lie proposals: boxes as of a detector, masks as of a segmenter. Splits `train` (a source of auxiliary
    prompts only), `val` and `test` have `images_per_split` images each.
    """
    root = Path(root)
    pictures, annotations = root / "images/mscoco/images/train2014", root / "refshapes"
    pictures.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    anns: list[dict] = []
    refs: list[dict] = []
    detections: dict[str, list[list[float]]] = {}
    masks: list[dict] = []
    sentence_id = 0
    for split_number, split in enumerate(("train", "val", "test")):
        for number in range(images_per_split):
            image_id = split_number * 10_000 + number + 1
            rng = np.random.default_rng([seed, split_number, number])
            scene = draw_scene(rng)
            file_name = f"COCO_train2014_{image_id:012d}.jpg"
            Image.fromarray(scene.image).save(pictures / file_name, quality=82)
            images.append({"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT})
            detections[str(image_id)] = detect(scene, rng)
            own = np.random.default_rng([seed, split_number, number, 1])  # all else is as it would be without masks
            for mask, score in segment(scene, own):
                masks.append({"image_id": image_id, "segmentation": _run_length(mask), "score": score})
            sentences: dict[int, list[str]] = {}
            for _ in range(3 * EXPRESSIONS):
                if sum(map(len, sentences.values())) == EXPRESSIONS:
                    break
                which = int(rng.integers(len(scene.objects)))
                kind = str(rng.choice(["attributes", "place", "relation"], p=[0.5, 0.25, 0.25]))
                text = describe(scene, scene.objects[which], kind, rng)
                if text and text not in sentences.get(which, []):
                    sentences.setdefault(which, []).append(text)
            for which, thing in enumerate(scene.objects):
                category = list(KINDS).index(thing.kind) + 1
                box = list(map(float, thing.box))
                anns.append({"id": len(anns) + 1, "image_id": image_id, "category_id": category, "bbox": box,
                             "area": float(thing.mask.sum()), "iscrowd": 0, "segmentation": _run_length(thing.mask)})  # fmt: skip
                if which in sentences:
                    ids = list(range(sentence_id, sentence_id + len(sentences[which])))
                    sentence_id += len(ids)
                    refs.append({"ref_id": len(refs), "ann_id": len(anns), "image_id": image_id,
                                 "category_id": category, "split": split,
                                 "file_name": f"{file_name[:-4]}_{len(anns)}.jpg", "sent_ids": ids,
                                 "sentences": [{"sent_id": i, "sent": t, "raw": t, "tokens": t.split()}
                                               for i, t in zip(ids, sentences[which], strict=True)]})  # fmt: skip
    categories = [{"id": i, "name": kind, "supercategory": "shape"} for i, kind in enumerate(KINDS, 1)]
    info = {"description": f"refshapes: generated scenes, seed {seed}", "version": "1.0"}
    instances = {"info": info, "images": images, "annotations": anns, "categories": categories}
    (annotations / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    names = ("refshapes/instances.json", "refshapes_dets_dict.json", "refshapes_masks.json")
    for name, content in zip(names, (instances, detections, masks), strict=True):
        (root / name).write_text(json.dumps(content, separators=(",", ":")))


def training_pairs(seed: int, size: int = 64) -> Iterator[tuple[np.ndarray, str]]:
    """Yield picture–caption pairs without end: uint8 [size, size, 3] and a caption, from long-tailed scenes of seed `seed`.

    Pictures are what the web has: an object close up, an object with its surroundings, an object in focus before a blurred
    background, now and then only a surface. All are squashed to a square. Benchmark scenes have other seeds (lists of
    three numbers).
    """
    for number in range(2**62):
        rng = np.random.default_rng([seed, number])
        scene = draw_scene(rng, long_tail=True)
        picture = Image.fromarray(scene.image)
        for thing in scene.objects:
            x, y, w, h = thing.box
            style = rng.choice(["close", "around", "focus"], p=[0.55, 0.2, 0.25])
            grow = rng.uniform(-0.06, 0.2 if style == "close" else 0.7, 4)
            region = (max(0, x - grow[0] * w), max(0, y - grow[1] * h),
                      min(WIDTH, x + w + grow[2] * w), min(HEIGHT, y + h + grow[3] * h))  # fmt: skip
            words = ATTRIBUTE_CHOICES[rng.choice(len(ATTRIBUTE_CHOICES), p=[0.2, 0.3, 0.08, 0.22, 0.06, 0.08, 0.06])]
            caption = thing.phrase(words)
            if style == "focus":
                soft = picture.reduce(4).filter(ImageFilter.GaussianBlur(rng.uniform(2, 15))).resize(picture.size)
                left, top, right, bottom = map(int, region)
                soft.paste(picture.crop((left, top, right, bottom)), (left, top))
                view = soft.resize((size, size), Image.Resampling.BICUBIC)
            else:
                view = picture.resize((size, size), Image.Resampling.BICUBIC, box=region)
            if style != "close":  # surroundings invite a relation, the whole frame a place
                longer = "place" if style == "focus" else "relation"
                caption = describe(scene, thing, str(rng.choice(["attributes", longer])), rng) or caption
            yield np.asarray(view), caption
        edge = rng.uniform(0, WIDTH - 40), rng.uniform(0, HEIGHT - 40)
        window = np.s_[int(edge[1]) : int(edge[1]) + 40, int(edge[0]) : int(edge[0]) + 40]
        if rng.random() < 0.5 and not any(thing.mask[window].any() for thing in scene.objects):
            view = picture.resize((size, size), Image.Resampling.BICUBIC, box=(*edge, edge[0] + 40, edge[1] + 40))
            yield np.asarray(view), scene.surface


def _pool_chunk(seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    views, captions = zip(*itertools.islice(training_pairs(seed, size), count), strict=True)
    return np.stack(views), list(captions)


def training_pool(count: int, seed: int = 1000, size: int = 72, chunk: int = 2500) -> tuple[np.ndarray, list[str]]:
    """Draw `count` training pairs on all cores: uint8 [count, size, size, 3] and captions; same seed, same pool."""
    chunks = -(-count // chunk)
    sizes = [min(chunk, count - i * chunk) for i in range(chunks)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(_pool_chunk, range(seed, seed + chunks), sizes, [size] * chunks)
        parts = list(tqdm(drawn, total=chunks, desc="Drawing training pictures", delay=2))
    return np.concatenate([views for views, _ in parts]), [caption for _, captions in parts for caption in captions]
