"""The first line of every notebook, `out_dir = notebook.start(globals())`: parameters and places, before any work."""

import os
import re
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from bsap_utils import ROOT

REQUIRED = {"SPLIT", "MODEL", "PRETRAINED", "VISUAL_PROMPTS", "METHODS"}  # lists that may not be empty
LISTS = REQUIRED | {"BANKS", "CLIPS", "GALLERY", "SCORES", "SIZES", "TEMPERATURES"}
LISTS |= {"OTHER_PROMPTS", "OTHER_PROPOSALS", "OTHER_TEMPLATES"}
PROPOSALS = ("gt", "detections", "rpn", "masks", "whole")
OURS = re.compile(r"(fig|table|predictions)_.*|.*\.(ipynb|html)|run_info\.json|\..*")  # notebooks', and hidden files


def forms() -> list[tuple[str, Callable[[Any], bool], str]]:
    """Parameters of a form: their names, whether a value has it, and the form in words."""
    from bsap_utils import aux_prompts, explore, normalization, visual_prompts

    methods, prompts, banks = normalization.METHODS, visual_prompts.VISUAL_PROMPTS, aux_prompts.BANKS
    is_file = lambda v: Path(str(v)).is_file()  # noqa: E731
    whole = lambda v, least: type(v) is int and v >= least  # noqa: E731
    between = lambda v, low, high: type(v) in (int, float) and low <= v <= high  # noqa: E731
    return [
        ("TEMPLATE OTHER_TEMPLATES", lambda v: bool(re.fullmatch(r"[^{}]*\{\}[^{}]*", str(v))),
         'a text with "{}" once, the place of the expression'),
        ("LIMIT AUX_SIZE TEXTS SEED STEPS PAIRS THREADS", lambda v: whole(v, 0), "a whole number, 0 or more"),
        ("SCENE NEIGHBOURS DRAWS SIZES HALVINGS BATCH_SIZE", lambda v: whole(v, 1), "a whole number over 0"),
        ("TEMPERATURE", lambda v: between(v, 1e-6, 1e6), "a number from 0.000001 to 1000000; the mean is `subtraction`"),
        ("TEMPERATURES", lambda v: between(v, 1e-6, 1e6) or v == float("inf"), "0.000001 to 1000000, or inf (the mean)"),
        ("HYBRID_WEIGHT GLOBAL_WEIGHT HEAD_NOUN_WEIGHT", lambda v: between(v, 0, 1), "a number from 0 to 1"),
        ("DEVICE", lambda v: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(v))), "auto, cuda, cuda:1, mps or cpu"),
        ("METHODS", methods.__contains__, f"one of {', '.join(methods)}"),
        ("METHOD", explore.SHOWN.__contains__, f"one of {', '.join(explore.SHOWN)}"),
        ("VISUAL_PROMPTS OTHER_PROMPTS", prompts.__contains__, f"one of {', '.join(prompts)}"),
        ("AUX_BANK BANKS", lambda v: v in banks or is_file(v), f"one of {', '.join(banks)}, or a text file"),
        ("PROPOSALS OTHER_PROPOSALS", lambda v: v in PROPOSALS or is_file(v), f"{', '.join(PROPOSALS)}, or a JSON file"),
    ]  # fmt: skip


def start(parameters: MutableMapping[str, Any]) -> Path:
    """Check a notebook's parameters (its globals), go to the repository's root, return the folder of its results.

    A single value where a list is meant becomes a list of one, an empty DATA_ROOT the data set's own. Raises ValueError.
    """
    os.chdir(ROOT)
    for name in LISTS & parameters.keys():
        value = parameters[name]
        values = list(value) if isinstance(value, (list, tuple)) else [] if value == "" else [value]
        parameters[name] = values = values or [""] * (name == "PRETRAINED")  # models in a folder bring their own
        twice = name != "PRETRAINED" and any(values.count(one) > 1 for one in values)
        if twice or not values and name in REQUIRED:
            raise ValueError(f"{name} = {value!r}: should name {'each once' if twice else 'at least one'}.")
    for names, fits, form in forms():
        for name in parameters.keys() & set(names.split()):
            for value in parameters[name] if name in LISTS else [parameters[name]]:
                if not fits(value):
                    raise ValueError(f"{name} = {value!r}: should be {form}.")
    if parameters.get("DATASET", "refshapes") != "refshapes":
        print("What is said of results on this page is of the bundled sample; yours are in the tables and figures.")
    if parameters.get("DATA_ROOT") == "":
        parameters["DATA_ROOT"] = "data/refshapes" if parameters.get("DATASET") == "refshapes" else "data"
    return usable_folder(Path(parameters.get("OUT_DIR") or "figures/by-hand"), results=True)


def usable_folder(path: Path, results: bool = False, root: Path = ROOT) -> Path:
    """Make and try `path` below `root`; ValueError where nothing can be written, or `results` would mix with other files."""
    place, folder, home = root / path, (root / path).resolve(), root.resolve()
    elsewhere = not (folder.is_relative_to(home) or home.is_relative_to(folder))
    ours = (folder / "manifest.json").is_file() or not folder.is_dir() or all(map(OURS.fullmatch, os.listdir(folder)))
    if results and not (elsewhere and ours or {home / "figures", home / "runs"} & set(folder.parents)):
        raise ValueError(f"OUT_DIR = {str(path)!r}: holds files that no run made. Take figures/NAME, or a new folder.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{error.filename or place}: no folder to write to ({error.strerror}; dead link?).") from error
    return path
