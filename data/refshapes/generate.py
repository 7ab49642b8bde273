"""Draw `refshapes`, the sample benchmark of this repository, and the pictures its two CLIPs were trained on.

    python data/refshapes/generate.py OUT

A scene looks like a small photograph: objects of 20 kinds, 10 colours, 3 patterns and 4 sizes lie on a textured, lit,
noisy surface and partly cover each other. Expressions name attributes ("striped blue fish"), a place ("mug on the
left") or a relation ("key above the red house"), and each is true of exactly one object of its scene. The benchmark is
written in the UNC layout, so that the loader of RefCOCO reads it unchanged. It is a *model* of the problem: no number
measured on it is a claim about RefCOCO. Everything is a function of a seed.
"""

from __future__ import annotations

import argparse
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


@dataclass(eq=False)
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


def _turned_glyph(kind: str, side: float, rng: np.random.Generator) -> Image.Image:
    """Return the glyph of `kind`, about `side` pixels long, perhaps mirrored, and turned a little."""
    w, h = int(side * rng.uniform(0.86, 1.0)), int(side * rng.uniform(0.86, 1.0))
    picture = glyph(kind)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.resize((w, h), Image.Resampling.BOX)
    return picture.rotate(rng.normal(0, 9), Image.Resampling.BICUBIC, expand=True, fillcolor=(0, 0, 128))


def _skin(thing: SceneObject, bands: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """Colour, pattern, details and relief of `thing`, [h, w, 3] in 0..255; `bands` is its glyph in 0..1."""
    base = np.array(COLOURS[thing.colour], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    second = base * 0.5 if base.mean() > 150 else base * 0.25 + 255 * 0.75
    y, x = np.mgrid[: bands.shape[0], : bands.shape[1]].astype(np.float32) / side
    turn = rng.uniform(0, np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period = rng.uniform(4.2, 5.6) * 2 * np.pi
    ink = np.zeros_like(along)
    if thing.pattern == "striped":
        ink = np.clip(np.sin(period * along) * 4 + 0.5, 0, 1)
    elif thing.pattern == "dotted":
        ink = np.clip((np.sin(period * along) * np.sin(period * across) - 0.3) * 5, 0, 1)
    detail, relief = bands[..., 1:2], bands[..., 2:3]
    skin = base * (1 - ink[..., None]) + second * ink[..., None]
    skin = skin * (1 - 0.62 * detail) + (60 if thing.colour == "black" else 0) * detail
    return skin * (0.96 + 1.1 * (relief - 0.5)) + 90 * np.clip(relief - 0.62, 0, 1)


MARGIN = 6  # pixels that a shadow needs to the right of its object and below


def _shadow(picture: Image.Image) -> np.ndarray:
    shade = Image.new("L", (picture.width + MARGIN, picture.height + MARGIN))
    shade.paste(picture.getchannel(0), (MARGIN // 2 + 1, MARGIN // 2 + 1))
    return np.asarray(shade.filter(ImageFilter.GaussianBlur(3)), np.float32)[..., None] / 255


def _paint(
    canvas: np.ndarray,
    thing: SceneObject,
    rng: np.random.Generator,
    centre: tuple[float, float],
    others: list[SceneObject],
) -> bool:
    """Draw `thing` around `centre` into `canvas` (with its shadow) and set its mask.

    False, and nothing drawn, when it does not fit the picture or would cover over 30 % of an object: a little occlusion
    is part of life, more makes the target unclear.
    """
    side = SIZES[thing.size] * rng.uniform(0.88, 1.12)
    picture = _turned_glyph(thing.kind, side, rng)
    left, top = int(centre[0] - picture.width / 2), int(centre[1] - picture.height / 2)
    if left < 0 or top < 0 or left + picture.width + MARGIN > WIDTH or top + picture.height + MARGIN > HEIGHT:
        return False
    bands = np.asarray(picture, np.float32) / 255
    window = np.s_[top : top + picture.height, left : left + picture.width]
    covers = bands[..., 0] > 0.5
    if any((other.mask[window] & covers).sum() > 0.3 * other.mask.sum() for other in others):
        return False
    thing.mask[window] = covers
    skin, shadow, alpha = _skin(thing, bands, side, rng), _shadow(picture), bands[..., 0:1]
    canvas[top : top + shadow.shape[0], left : left + shadow.shape[1]] *= 1 - 0.5 * shadow
    canvas[window] = canvas[window] * (1 - alpha) + skin * alpha
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

    `long_tail` draws kinds by a Zipf law and gives each kind two usual colours (what the CLIPs are trained on); otherwise
    kinds and colours are uniform, and scenes repeat kinds, so that one word is seldom enough to tell two objects apart.
    """
    canvas, surface = _background(rng)
    objects: list[SceneObject] = []
    wanted = rng.integers(4, 10)
    for _ in range(60):
        if len(objects) == wanted:
            break
        thing = SceneObject(**_choose_attributes(rng, objects, long_tail), mask=np.zeros((HEIGHT, WIDTH), bool))
        if _paint(canvas, thing, rng, (rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)), objects):
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


PLACES = {
    "on the left": lambda x, y: x < WIDTH * 0.36,
    "on the right": lambda x, y: x > WIDTH * 0.64,
    "at the top": lambda x, y: y < HEIGHT * 0.36,
    "at the bottom": lambda x, y: y > HEIGHT * 0.64,
    "in the middle": lambda x, y: abs(x - WIDTH / 2) < WIDTH * 0.13 and abs(y - HEIGHT / 2) < HEIGHT * 0.2,
}
RELATIONS = {
    "above": lambda dx, dy: dy < -20 and abs(dx) < 60,
    "below": lambda dx, dy: dy > 20 and abs(dx) < 60,
    "left of": lambda dx, dy: dx < -20 and abs(dy) < 50,
    "right of": lambda dx, dy: dx > 20 and abs(dy) < 50,
    "next to": lambda dx, dy: abs(dx) < 75 and abs(dy) < 45,
}
ATTRIBUTE_CHOICES = (
    (), ("colour",), ("pattern",), ("pattern", "colour"), ("size",), ("size", "colour"), ("size", "pattern", "colour"),
)  # fmt: skip


def _choices(one: SceneObject) -> list[tuple[str, ...]]:
    """The sets of attributes that can be named of `one`."""
    return [words for words in ATTRIBUTE_CHOICES if not any(getattr(one, word) in UNSAID for word in words)]


def _matches(scene: Scene, words: tuple[str, ...], one: SceneObject) -> list[SceneObject]:
    """The objects of the scene that are like `one` in kind and in the attributes `words`."""
    return [o for o in scene.objects if o.kind == one.kind and all(getattr(o, w) == getattr(one, w) for w in words)]


def _by_attributes(scene: Scene, target: SceneObject) -> list[str]:
    return [target.phrase(words) for words in _choices(target) if len(_matches(scene, words, target)) == 1]


def _by_place(scene: Scene, target: SceneObject) -> list[str]:
    found = []
    for words, (place, holds) in itertools.product(_choices(target)[:3], PLACES.items()):
        if [o for o in _matches(scene, words, target) if holds(*o.centre)] == [target]:
            found.append(f"{target.phrase(words)} {place}")
    return found


def _by_relation(scene: Scene, target: SceneObject) -> list[str]:
    found = []
    for other in (o for o in scene.objects if o is not target):
        (x, y), names = other.centre, _by_attributes(scene, other)
        for words, (relation, holds) in itertools.product(_choices(target)[:3] if names else [], RELATIONS.items()):
            fitting = [o for o in _matches(scene, words, target) if holds(o.centre[0] - x, o.centre[1] - y)]
            if [o for o in fitting if o is not other] == [target]:
                found.append(f"{target.phrase(words)} {relation} the {names[0]}")
    return found


def describe(scene: Scene, target: SceneObject, kind: str, rng: np.random.Generator) -> str | None:
    """Return an expression of `kind` ("attributes", "place" or "relation") true of `target` alone; None if there is none.

    Truth is checked against every object of the scene, with the attributes that are named.
    """
    found = {"attributes": _by_attributes, "place": _by_place, "relation": _by_relation}[kind](scene, target)
    if not found:
        return None
    brevity = np.array([0.6 ** len(text.split()) for text in found])  # people are brief
    return found[rng.choice(len(found), p=brevity / brevity.sum())]


def _expressions(scene: Scene, rng: np.random.Generator) -> dict[int, list[str]]:
    """Return six expressions (fewer when the scene is hard to speak about) by the number of their target."""
    found: dict[int, list[str]] = {}
    for _ in range(3 * EXPRESSIONS):
        if sum(map(len, found.values())) == EXPRESSIONS:
            break
        which = int(rng.integers(len(scene.objects)))
        kind = str(rng.choice(["attributes", "place", "relation"], p=[0.5, 0.25, 0.25]))
        text = describe(scene, scene.objects[which], kind, rng)
        if text and text not in found.get(which, []):
            found.setdefault(which, []).append(text)
    return found


def _clip_box(x: float, y: float, w: float, h: float) -> list[float]:
    x0, y0 = max(0.0, x), max(0.0, y)
    return [round(float(v), 1) for v in (x0, y0, min(x + w, WIDTH) - x0, min(y + h, HEIGHT) - y0)]


def _jittered(box: tuple[float, ...], spread: float, rng: np.random.Generator) -> list[float]:
    """Move and stretch `box` at random by about `spread` of its sides."""
    x, y, w, h = box
    dx, dy, dw, dh = rng.normal(0, spread, 4)
    return _clip_box(x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh))


def _ground_box(rng: np.random.Generator) -> list[float]:
    """A box anywhere, about 50 pixels wide, most of them on bare ground."""
    w, h = np.exp(rng.normal(3.9, 0.45, 2))
    w, h = min(w, WIDTH * 0.6), min(h, HEIGHT * 0.6)
    return _clip_box(rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h)


def propose(scene: Scene, rng: np.random.Generator) -> list[list[float]]:
    """Return 5 to 20 boxes (xywh, pixels) as class-agnostic region proposals: some missed, many doubled, much ground."""
    boxes = []
    for thing in scene.objects:
        for spread in (0.05, 0.16):  # the second is the looser double that non-maximum suppression left
            if rng.random() < (0.93 if spread < 0.1 else 0.3):
                boxes.append(_jittered(thing.box, spread, rng))
    boxes += [_ground_box(rng) for _ in range(max(int(rng.integers(2, 6)), 5 - len(boxes)))]
    rng.shuffle(boxes)  # the order tells nothing about which box is which object
    return boxes[:20]


def detect(scene: Scene, rng: np.random.Generator) -> list[list[float]]:
    """Return boxes (xywh, pixels) as of a class-labelled detector, such as MAttNet's: nearly all of them on objects.

    It misses objects, small ones more often, finds a few twice (under two labels), now and then a part of one or two
    neighbours as one, and takes bare ground for a thing in a third of the pictures.
    """
    boxes = []
    for thing in scene.objects:
        found = rng.random() < (0.78 if thing.size == "tiny" else 0.92)
        boxes += [_jittered(thing.box, 0.05, rng)] * found
        boxes += [_jittered(thing.box, 0.12, rng) for _ in range(rng.binomial(1, 0.1))]
        boxes += [_part_box(thing.box, rng) for _ in range(rng.binomial(1, 0.05))]
    boxes += [_joint_box(scene, rng) for _ in range(rng.binomial(1, 0.3))]
    boxes += [_ground_box(rng) for _ in range(max(rng.binomial(1, 0.33), 3 - len(boxes)))]
    rng.shuffle(boxes)
    return boxes


def _part_box(box: tuple[float, ...], rng: np.random.Generator) -> list[float]:
    """Half of `box`: left, right, upper or lower."""
    x, y, w, h = box
    where, upright = rng.integers(2), rng.random() < 0.5
    part = (x, y + where * h / 2, w, h / 2) if upright else (x + where * w / 2, y, w / 2, h)
    return _jittered(part, 0.05, rng)


def _joint_box(scene: Scene, rng: np.random.Generator) -> list[float]:
    """One box around an object and its nearest neighbour."""
    one = scene.objects[rng.integers(len(scene.objects))]
    near = sorted(scene.objects, key=lambda o: np.hypot(*np.subtract(o.centre, one.centre)))[:2]
    corners = np.array([[x, y, -(x + w), -(y + h)] for x, y, w, h in (o.box for o in near)]).min(0)
    return _jittered((*corners[:2], -corners[2] - corners[0], -corners[3] - corners[1]), 0.05, rng)


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


def _roughly(mask: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Grow or shrink `mask` and shift it a little, by about `spread` of its size."""
    size = np.sqrt(mask.sum())
    grow, (down, right) = rng.normal(0, spread) * size, np.rint(rng.normal(0, spread * size / 2, 2)).astype(int)
    grow = np.copysign(max(abs(grow), 1), grow)  # no outline is exact
    distance = ndimage.distance_transform_edt(~mask if grow > 0 else mask)
    mask = distance <= grow if grow > 0 else distance > -grow
    padded = np.pad(mask, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0))))
    return padded[max(-down, 0) :, max(-right, 0) :][:HEIGHT, :WIDTH]


def _segments_of(thing: SceneObject, objects: list[SceneObject], rng: np.random.Generator) -> list[np.ndarray]:
    """What a segmenter makes of one object: nothing, itself once or twice, its halves, itself with a neighbour."""
    segments = []
    fate = rng.choice(["found", "twice", "halves", "both", "merged", "missed"], p=[0.4, 0.2, 0.08, 0.12, 0.14, 0.06])
    if fate in ("halves", "both"):
        segments += [_roughly(half, 0.02, rng) for half in _halves(thing.mask, rng)]
    if fate == "merged":
        away = [np.hypot(*np.subtract(o.centre, thing.centre)) or np.inf for o in objects]  # not itself
        segments.append(_roughly(thing.mask | objects[int(np.argmin(away))].mask, 0.02, rng))
    if fate in ("found", "twice", "both", "merged") and (fate != "merged" or rng.random() < 0.7):
        segments.append(_roughly(thing.mask, 0.035, rng))
    if fate == "twice":
        segments.append(_roughly(thing.mask, 0.1, rng))
    return segments


def _confidence(mask: np.ndarray, objects: list[SceneObject], rng: np.random.Generator) -> float:
    """The IoU with the best object, misjudged; a third of the patches of ground are liked as much as things."""
    best = max((mask & thing.mask).sum() / (mask | thing.mask).sum() for thing in objects) if mask.any() else 0
    liked = rng.uniform(0.6, 0.95) if best < 0.1 and rng.random() < 0.33 else best
    if mask.sum() < 40:
        return 0.0
    return float(np.clip(liked + rng.normal(0, 0.08), 0.01, 0.99).round(3))


def segment(scene: Scene, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Return 5 to 20 segments ([H, W] bool) and their scores, as a class-agnostic segmenter would."""
    segments = [mask for thing in scene.objects for mask in _segments_of(thing, scene.objects, rng)]
    segments += [_blob(rng) for _ in range(max(int(rng.integers(2, 6)), 6 - len(segments)))]
    scored = [(mask, _confidence(mask, scene.objects, rng)) for mask in segments]
    scored = [(mask, score) for mask, score in scored if score]  # no segmenter reports an eroded sliver
    return [scored[i] for i in rng.permutation(len(scored))][:20]


def _run_length(mask: np.ndarray) -> dict:
    """Return COCO's compressed RLE of `mask`, as JSON has it."""
    run_length = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in mask.shape], "counts": run_length["counts"].decode("ascii")}


SPLITS = ("train", "val", "test")


class Benchmark:
    """The files of the benchmark, as they grow image by image."""

    def __init__(self) -> None:
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.attributes = ["ann_id,kind,colour,pattern,size"]  # lines of a CSV: what is true of a thing, said or not
        self.refs: list[dict] = []
        self.detections: dict[str, list[list[float]]] = {}
        self.rpn: dict[str, list[list[float]]] = {}
        self.masks: list[dict] = []
        self.sentences = 0

    def add_image(self, seed: list[int], split: str, image_id: int, pictures: Path) -> None:
        """Draw the scene of `seed` into the folder `pictures`, and keep what there is to know about it."""
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(pictures / file_name, quality=82)
        self.images.append({"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT})
        self.rpn[str(image_id)] = propose(scene, rng)
        texts = _expressions(scene, rng)
        # Masks and detections have seeds of their own: all else is as it would be without them.
        for mask, score in segment(scene, np.random.default_rng([*seed, 1])):
            self.masks.append({"image_id": image_id, "segmentation": _run_length(mask), "score": score})
        self.detections[str(image_id)] = detect(scene, np.random.default_rng([*seed, 2]))
        for number, thing in enumerate(scene.objects):
            annotation = self._add_annotation(thing, image_id)
            if number in texts:
                self._add_ref(annotation, split, file_name, texts[number])

    def _add_annotation(self, thing: SceneObject, image_id: int) -> dict:
        self.annotations.append({
            "id": len(self.annotations) + 1, "image_id": image_id, "category_id": list(KINDS).index(thing.kind) + 1,
            "bbox": list(map(float, thing.box)), "area": float(thing.mask.sum()), "iscrowd": 0,
            "segmentation": _run_length(thing.mask),
        })  # fmt: skip
        self.attributes.append(f"{len(self.annotations)},{thing.kind},{thing.colour},{thing.pattern},{thing.size}")
        return self.annotations[-1]

    def _add_ref(self, annotation: dict, split: str, file_name: str, texts: list[str]) -> None:
        ids = list(range(self.sentences, self.sentences + len(texts)))
        self.sentences += len(texts)
        self.refs.append({
            "ref_id": len(self.refs), "ann_id": annotation["id"], "image_id": annotation["image_id"],
            "category_id": annotation["category_id"], "split": split,
            "file_name": f"{file_name[:-4]}_{annotation['id']}.jpg", "sent_ids": ids,
            "sentences": [{"sent_id": i, "sent": t, "raw": t, "tokens": t.split()} for i, t in zip(ids, texts, strict=True)],
        })  # fmt: skip

    def instances(self, seed: int) -> dict:
        """What COCO's instances.json holds."""
        categories = [{"id": i, "name": kind, "supercategory": "shape"} for i, kind in enumerate(KINDS, 1)]
        info = {"description": f"refshapes: generated scenes, seed {seed}", "version": "1.0"}
        return {"info": info, "images": self.images, "annotations": self.annotations, "categories": categories}


def write_benchmark(root: Path | str, seed: int = 2024, images_per_split: int = 160) -> None:
    """Write the benchmark under `root` in the UNC layout; same seed, same bytes.

    Beside it lie proposals: boxes as of a class-labelled detector (dets) and as class-agnostic region proposals (rpn),
    masks as of a segmenter. Each of the splits `train`, `val` and `test` has `images_per_split` images.
    """
    root = Path(root)
    pictures = root / "images/mscoco/images/train2014"
    pictures.mkdir(parents=True, exist_ok=True)
    (root / "refshapes").mkdir(exist_ok=True)
    made = Benchmark()
    for (i, split), number in itertools.product(enumerate(SPLITS), range(images_per_split)):
        made.add_image([seed, i, number], split, i * 10_000 + number + 1, pictures)
    (root / "refshapes/refs(unc).p").write_bytes(pickle.dumps(made.refs, protocol=2))
    (root / "refshapes/attributes.csv").write_text("\n".join([*made.attributes, ""]))
    for name, content in {
        "refshapes/instances.json": made.instances(seed),
        "refshapes_dets_dict.json": made.detections,
        "refshapes_rpn_dict.json": made.rpn,
        "refshapes_masks.json": made.masks,
    }.items():
        (root / name).write_text(json.dumps(content, separators=(",", ":")))


def _caption(thing: SceneObject, rng: np.random.Generator) -> str:
    """Name an object as captions do: mostly by its kind alone or with its colour."""
    choice = rng.choice(len(ATTRIBUTE_CHOICES), p=[0.2, 0.3, 0.08, 0.22, 0.06, 0.08, 0.06])
    return thing.phrase(ATTRIBUTE_CHOICES[choice])


def view(picture: Image.Image, size: int, window: tuple[float, ...] | None = None) -> np.ndarray:
    """A window (left, top, right, bottom; pixels) of the picture, or all of it, squashed to a square."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=window))


def _in_focus(picture: Image.Image, window: tuple[float, ...], rng: np.random.Generator) -> Image.Image:
    """The picture blurred all around a window."""
    soft = picture.reduce(4).filter(ImageFilter.GaussianBlur(rng.uniform(2, 15))).resize(picture.size)
    left, top, right, bottom = map(int, window)
    soft.paste(picture.crop((left, top, right, bottom)), (left, top))
    return soft


def _close_pair(scene: Scene, thing: SceneObject, size: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    picture, (x, y, w, h) = Image.fromarray(scene.image), thing.box
    style = rng.choice(["close", "around", "focus"], p=[0.55, 0.2, 0.25])
    grow = rng.uniform(-0.06, 0.2 if style == "close" else 0.7, 4)
    window = (max(0, x - grow[0] * w), max(0, y - grow[1] * h),
              min(WIDTH, x + w + grow[2] * w), min(HEIGHT, y + h + grow[3] * h))  # fmt: skip
    caption = _caption(thing, rng)
    shown = view(_in_focus(picture, window, rng), size) if style == "focus" else view(picture, size, window)
    if style != "close":  # surroundings invite a relation, the whole frame a place
        longer = "place" if style == "focus" else "relation"
        caption = describe(scene, thing, str(rng.choice(["attributes", longer])), rng) or caption
    return shown, caption


def close_pairs(seed: int, size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield picture-caption pairs of single objects without end: uint8 [size, size, 3] and a caption.

    An object close up, with its surroundings, or in focus before a blurred background; now and then only a surface.
    """
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        scene = draw_scene(rng, long_tail=True)
        yield from (_close_pair(scene, thing, size, rng) for thing in scene.objects)
        left, top = rng.uniform(0, WIDTH - 40), rng.uniform(0, HEIGHT - 40)
        patch = np.s_[int(top) : int(top) + 40, int(left) : int(left) + 40]
        if rng.random() < 0.5 and not any(thing.mask[patch].any() for thing in scene.objects):
            yield view(Image.fromarray(scene.image), size, (left, top, left + 40, top + 40)), scene.surface


def loose_frame(thing: SceneObject, rng: np.random.Generator) -> tuple[float, ...]:
    """Return a square window (left, top, right, bottom; pixels) of which `thing` fills 30 to 75 %, lengthwise."""
    x, y, w, h = thing.box
    side = min(max(w, h) / rng.uniform(0.3, 0.75), HEIGHT)
    left = rng.uniform(max(0, x + w - side), min(x, WIDTH - side))
    top = rng.uniform(max(0, y + h - side), min(y, HEIGHT - side))
    return left, top, left + side, top + side


def web_pairs(seed: int, size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Yield picture-caption pairs as a photographer takes them, without end: uint8 [size, size, 3] and a caption.

    The whole scene, captioned with one to three of its objects, and three loose framings, each of one object and
    captioned with it. No tight crop and no blur: this CLIP never saw what a visual prompt shows it of a region.
    """
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        scene = draw_scene(rng, long_tail=True)
        picture, objects = Image.fromarray(scene.image), [scene.objects[i] for i in rng.permutation(len(scene.objects))]
        *first, last = [_caption(thing, rng) for thing in objects[: rng.integers(1, 4)]]
        yield view(picture, size), " and ".join([", ".join(first), last] if first else [last])
        for thing in objects[:3]:
            yield view(picture, size, loose_frame(thing, rng)), _caption(thing, rng)


PAIRS = {"close": close_pairs, "web": web_pairs}
# The first seed of a recipe's scenes, one seed a chunk. None may be the benchmark's: to numpy [2024, 1] is [2024, 1, 0].
FIRST_SEED = {"close": 1000, "web": 3000}


def _pool_chunk(recipe: str, seed: int, count: int, size: int) -> tuple[np.ndarray, list[str]]:
    views, captions = zip(*itertools.islice(PAIRS[recipe](seed, size), count), strict=True)
    return np.stack(views), list(captions)


def training_pool(recipe: str, count: int, size: int, chunk: int = 2500) -> tuple[np.ndarray, list[str]]:
    """Draw `count` training pairs on all cores: uint8 [count, size, size, 3] and captions; same arguments, same pool."""
    chunks = -(-count // chunk)
    sizes = [min(chunk, count - i * chunk) for i in range(chunks)]
    seeds = range(FIRST_SEED[recipe], FIRST_SEED[recipe] + chunks)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(_pool_chunk, [recipe] * chunks, seeds, sizes, [size] * chunks)
        parts = list(tqdm(drawn, total=chunks, desc="Drawing training pictures", delay=2))
    return np.concatenate([views for views, _ in parts]), [caption for _, captions in parts for caption in captions]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the benchmark refshapes into a folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--images", type=int, default=160, help="images a split")
    options = parser.parse_args()
    write_benchmark(options.out, options.seed, options.images)
