"""Banks of auxiliary prompts: the texts that every region is scored against, so that its own similarity range is known.

The paper's exact bank is not known to us; the bank is therefore a parameter that the notebooks study. A bank is a list
of texts without the template; `ClipScorer` sees them in the same template as the expressions.

>>> auxiliary_prompts("generic", size=3, seed=1) == auxiliary_prompts("generic", size=3, seed=1)
True
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from .datasets import DatasetError, ReferDataset

# The eleven basic colour terms of English (Berlin and Kay 1969).
COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
GENERIC = ("a photo", "a picture", "an image", "an object", "a thing", "something", "a part of a picture", "the background",
           "a close-up", "a scene", "a texture", "a surface", "a blurry photo", "an item", "a shape", "nothing")  # fmt: skip
COCO_CATEGORIES = tuple(
    name for name in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name not in ("__background__", "N/A")
)


def _needs_data(ds: ReferDataset | None, bank: str) -> ReferDataset:
    if ds is None:
        raise ValueError(f"The bank {bank!r} is made from a data set: pass ds=load_refer(...), with all its splits.")
    return ds


def categories(ds: ReferDataset | None) -> list[str]:
    """The category names of the data set's annotations. Raises ValueError without a data set, as all banks made from one."""
    return _needs_data(ds, "categories").categories


def attributes(ds: ReferDataset | None) -> list[str]:
    """Every category name with every basic colour word: "red star", "orange star", …"""
    return [f"{colour} {category}" for category in categories(ds) for colour in COLOUR_WORDS]


def train_expressions(ds: ReferDataset | None) -> list[str]:
    """The distinct expressions of the *train* split, lower-cased; never those of a split that is evaluated.

    Raises DatasetError for a data set without any, such as a selection of another split, ValueError for none.
    """
    ds = _needs_data(ds, "expressions")
    texts = ds.expressions.loc[ds.expressions["split"] == "train", "text"]
    if texts.empty:
        raise DatasetError(
            f"The bank 'expressions' samples train expressions, and {ds.name} as passed has none "
            f"(splits: {sorted(set(ds.expressions['split']))}). Pass the data set as loaded, before select(split=…)."
        )
    return sorted(set(texts.str.lower()))


BANKS: dict[str, Callable[[ReferDataset | None], list[str]]] = {
    "categories": categories,
    "coco80": lambda ds: list(COCO_CATEGORIES),
    "attributes": attributes,
    "generic": lambda ds: list(GENERIC),
    "expressions": train_expressions,
}
DEFAULT_SIZES = {"expressions": 256}  # the train expressions of RefCOCO alone are 120,000


def auxiliary_prompts(bank: str, ds: ReferDataset | None = None, size: int | None = None, seed: int = 0) -> list[str]:
    """Return the distinct prompts of a bank: one of `BANKS`, or the path of a text file with one prompt a line.

    `ds` is the whole data set, for the banks made from it. `size` draws that many prompts at random (by `seed`), in
    the bank's order; None keeps all (256 for `expressions`). Raises ValueError for an unknown bank, an empty one, or
    one smaller than `size`.
    """
    if bank in BANKS:
        prompts = BANKS[bank](ds)
    elif Path(bank).is_file():
        try:
            prompts = Path(bank).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{bank}: not a UTF-8 text file ({error}). Save it as UTF-8, one prompt a line.") from None
    else:
        raise ValueError(
            f"Unknown bank of auxiliary prompts {bank!r}: use one of {', '.join(BANKS)}, or the path of a text file."
        )
    prompts = list(dict.fromkeys(text.strip() for text in prompts if text.strip()))
    if not prompts:
        raise ValueError(f"The bank {bank!r} has no prompts.")
    if size is None:
        size = min(DEFAULT_SIZES.get(bank, len(prompts)), len(prompts))
    if not 1 <= size <= len(prompts):
        raise ValueError(f"The bank {bank!r} has {len(prompts)} prompts; a size of {size} cannot be drawn from it.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(prompts))[:size])
    return [prompts[i] for i in chosen]
