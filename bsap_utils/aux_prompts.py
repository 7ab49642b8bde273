"""Banks of auxiliary prompts: the texts that every region is scored against, so that its own similarity range is known.

The paper's bank is not known to us; the bank is therefore a parameter that the notebooks study. A bank is a list of texts
without a template; the scorer puts them into the same template as the expressions.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from . import ROOT
from .datasets import DatasetError, ReferDataset, read_bytes, reading

WORDS = ROOT / "data/banks"  # coco80, generic, and the eleven basic colour terms of English (Berlin and Kay 1969)
BANKS = ("categories", "coco80", "attributes", "generic", "expressions")
EXPRESSIONS = 256  # drawn unless a size is given: the train expressions of RefCOCO alone are 120,000


def auxiliary_prompts(bank: str, ds: ReferDataset | None = None, size: int | None = None, seed: int = 0) -> list[str]:
    """Return the distinct prompts of a bank: one of `BANKS`, or the path of a text file with one prompt a line.

    `ds` is the whole data set, for the banks made from it: `categories` are its category names, `attributes` those with each
    basic colour, `expressions` those of its train split in lower case. `size` draws that many prompts at random by `seed`, in
    the bank's order; None keeps all (256 of `expressions`). ValueError for an unknown or too small bank, or no train split.

    >>> auxiliary_prompts("generic", size=2, seed=1)
    ['a picture', 'a blurry photo']
    """
    file = WORDS / f"{bank}.txt" if bank in ("coco80", "generic") else Path(bank)
    if bank in ("categories", "attributes", "expressions"):
        if ds is None:
            raise ValueError(f"The bank {bank!r} is made from a data set: pass ds=load_refer(...), all splits.")
        texts = ds.categories
        if bank == "attributes":
            colours = (WORDS / "colours.txt").read_text().splitlines()
            texts = [f"{colour} {category}" for category in texts for colour in colours]
        elif bank == "expressions":
            texts = sorted({*ds.expressions.loc[ds.expressions["split"] == "train", "text"].str.lower()})
            if not texts:
                raise DatasetError(f"{ds.name} has no split train to sample (before select): take another bank.")
    elif file.is_file():
        with reading(file, "a text file in UTF-8, a prompt a line"):
            texts = read_bytes(file).decode("utf-8-sig").splitlines()
    else:
        raise ValueError(f"Unknown bank of auxiliary prompts {bank!r}: use {', '.join(BANKS)}, or a text file's path.")
    prompts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    wanted = size or (min(EXPRESSIONS, len(prompts)) if bank == "expressions" else len(prompts))
    if not 1 <= wanted <= len(prompts):
        raise ValueError(f"The bank {bank!r} has {len(prompts)} prompts, too few for {max(wanted, 1)}: take another.")
    return [prompts[i] for i in np.sort(np.random.default_rng(seed).permutation(len(prompts))[:wanted])]


def unlabelled_texts(ds: ReferDataset, bank: Iterable[str], size: int = 256, seed: int = 0) -> list[str]:
    """Return up to `size` expressions of `ds`' train split, lower case, drawn by `seed`: texts for `calibrated_weight`.

    None is in `bank`, unless all are: w* would be 1. Without a train split, of all splits: asked of all candidates.
    """
    train = ds.expressions.loc[ds.expressions["split"] == "train", "text"]
    texts = {*(train if len(train) else ds.expressions["text"]).str.lower()}
    left = sorted(texts - {text.lower() for text in bank}) or sorted(texts)
    return [left[i] for i in np.random.default_rng(seed).permutation(len(left))[:size]]
