"""`notebook.start`, the first line of every notebook: parameters of every form, and the places results may go to."""

import json
import math
import os
import subprocess
import sys
import time

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from bsap_utils import ROOT, notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def start(**parameters):
    return notebook.start({"OUT_DIR": "runs/test-start"} | parameters)


@pytest.fixture(autouse=True)
def no_folder_is_left():
    yield
    for folder in ("runs/test-start", "figures/test-start"):
        if (ROOT / folder).is_dir():
            (ROOT / folder).rmdir()


def test_a_single_name_is_a_list_of_one_and_the_root_is_the_data_sets_own():
    found = {
        "SPLIT": "test",
        "MODEL": "ViT-B-32",
        "METHODS": ("clip", "bsap"),
        "GALLERY": "",
        "PRETRAINED": "",
        "SIZES": 10,
    }
    found |= {"DATASET": "refshapes", "DATA_ROOT": "", "SEED": 3, "OUT_DIR": "runs/test-start"}
    assert notebook.start(found) == notebook.Path("runs/test-start")
    assert (found["SPLIT"], found["MODEL"], found["METHODS"]) == (["test"], ["ViT-B-32"], ["clip", "bsap"])
    assert (found["GALLERY"], found["PRETRAINED"], found["SIZES"]) == ([], [""], [10])
    assert (found["DATA_ROOT"], found["SEED"]) == ("data/refshapes", 3)
    real = {"DATASET": "refcoco", "DATA_ROOT": "", "OUT_DIR": "runs/test-start"}
    notebook.start(real)
    assert real["DATA_ROOT"] == "data"


@pytest.mark.parametrize(
    ("name", "value", "possible"),
    [
        ("TEMPLATE", "a photo of", '"{}" once'), ("TEMPLATE", "{} and {}", '"{}" once'), ("TEMPLATE", "{noun}", '"{}" once'),
        ("TEMPLATE", "{", '"{}" once'), ("OTHER_TEMPLATES", ["{}", "a photo of %s"], '"{}" once'),
        ("DEVICE", "gpu", "auto, cuda, "),
        ("LIMIT", -1, "0 or more"), ("LIMIT", 2.5, "0 or more"), ("AUX_SIZE", -1, "0 or more"), ("SEED", "x", "0 or more"),
        ("NEIGHBOURS", 0, "over 0"), ("SIZES", [10, 0], "over 0"), ("TEMPERATURE", 0, "0.000001 to 1000000"),
        ("TEMPERATURE", 1e7, "0.000001 to 1000000"), ("TEMPERATURE", math.nan, "0.000001 to 1000000"),
        ("TEMPERATURE", math.inf, "the mean is `subtraction`"), ("METHOD", "tas", "one of clip, bsap, "),
        ("TEMPERATURES", [1.0, -1.0], "0.000001 to 1000000"), ("HYBRID_WEIGHT", 1.5, "from 0 to 1"),
        ("METHODS", ["clip", "bspa"], "clip, bsap, "), ("METHOD", "bspa", "clip, bsap, "), ("METHODS", "", "at least one"),
        ("METHODS", ["bsap", "clip", "bsap"], "each once"), ("SPLIT", ["val", "val"], "each once"), ("SPLIT", [], "at least one"),
        ("VISUAL_PROMPTS", "crob", "crop, shade, "), ("VISUAL_PROMPTS", "", "at least one"),
        ("AUX_BANK", "categorys", "categories, coco80, "), ("BANKS", ["generic", "x"], "or a text file"),
        ("PROPOSALS", "detektions", "gt, detections, rpn, masks, whole, or a JSON file"),
    ],
)  # fmt: skip
def test_what_has_not_its_form_is_refused_with_name_value_and_what_is_possible(name, value, possible):
    with pytest.raises(ValueError) as error:
        start(**{name: value})
    assert str(error.value).startswith(f"{name} = ") and possible in str(error.value)
    assert isinstance(value, list) or repr(value) in str(error.value)


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 5))
def test_numbers_are_taken_where_they_make_sense(temperature, limit):
    good = 1e-6 <= temperature <= 1e6 and limit >= 0
    try:
        start(TEMPERATURE=temperature, LIMIT=limit)
        assert good
    except ValueError:
        assert not good


def test_every_notebook_takes_its_own_defaults():
    """The forms above are those of the notebooks as they are: none refuses itself."""
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
        parameters: dict = {}
        exec(source, parameters)
        if all(
            "clip-refshapes-web" not in str(value) or (ROOT / "data/clip-refshapes-web").is_dir()
            for value in parameters.values()
        ):
            start(**{name: value for name, value in parameters.items() if name.isupper() and name != "OUT_DIR"})


@pytest.mark.parametrize(
    "place", [".", "data", "bsap_utils", "figures", "runs", "/", str(ROOT.parent), "figures/../data", "tests/new"]
)
def test_the_repositorys_own_folders_are_refused(place):
    before = sorted(os.listdir(ROOT))
    with pytest.raises(ValueError, match="holds files that no run made"):
        start(OUT_DIR=place)
    assert sorted(os.listdir(ROOT)) == before


def test_a_folder_with_files_that_no_run_made_is_refused_and_one_of_a_run_taken(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds files that no run made"):
        start(OUT_DIR=str(tmp_path))
    (tmp_path / "README.md").rename(tmp_path / "fig_1.png")
    for name in ("out.ipynb", "out.html"):  # as plain papermill leaves them where the results go, too
        (tmp_path / name).write_text("executed")
    assert start(OUT_DIR=str(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "manifest.json").write_text("{}")
    assert start(OUT_DIR=str(tmp_path)) == tmp_path
    assert start(OUT_DIR=str(tmp_path / "new/deep")).is_dir()


def test_places_that_cannot_be_written_to_are_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "not mounted")
    for place in ("file", "file/below", "dead", "dead/below"):
        with pytest.raises(ValueError, match="no folder to write to"):
            start(OUT_DIR=str(tmp_path / place))
    with pytest.raises(ValueError, match="no folder to write to"):  # it is there, and closed to root too
        notebook.usable_folder(notebook.Path("/proc"))


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_plain_papermill_takes_a_single_name_wherever_it_is_started(tmp_path, folder):
    """`papermill x.ipynb out.ipynb -p SPLIT test -p MODEL …`, in a kernel of its own; a wrong value stops it in a second."""
    source = 'SPLIT = ["val"]\nMODEL = ["ViT-B-32"]\nLIMIT = 0  # 0: all\nOUT_DIR = ""'
    tagged = new_code_cell(source, metadata={"tags": ["parameters"]})
    first = (
        "from bsap_utils import notebook\nout_dir = notebook.start(globals())\nprint(SPLIT, MODEL, notebook.Path.cwd())"
    )
    nb = new_notebook(cells=[tagged, new_code_cell(first)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, tmp_path / "x.ipynb")
    command = [
        sys.executable,
        "-m",
        "papermill",
        tmp_path / "x.ipynb",
        tmp_path / "out.ipynb",
        "-p",
        "OUT_DIR",
        tmp_path / "out",
    ]
    given = ["-p", "SPLIT", "test", "-p", "MODEL", "local-dir:data/clip-refshapes"] + ["-p", "LIMIT", "-1"] * (
        folder != "."
    )
    done = subprocess.run([*map(str, command), *given], cwd=ROOT / folder, capture_output=True, text=True)
    text = json.dumps(json.loads((tmp_path / "out.ipynb").read_text()))
    if folder == ".":
        assert done.returncode == 0, done.stderr
        assert f"['test'] ['local-dir:data/clip-refshapes'] {ROOT}" in text
    else:
        assert done.returncode and "LIMIT = -1: should be a whole number, 0 or more" in done.stderr


def test_it_takes_no_time():
    begin = time.monotonic()
    start(TEMPLATE="a photo of {}", METHODS=["clip"], DEVICE="cpu", AUX_BANK="generic")
    assert time.monotonic() - begin < 1
