"""The notebooks as files: each runs by parameter, and reads from the repository's root; running them is `make figures`."""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest
import yaml

from bsap_utils import ROOT, cli

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert "03_rec" in [path.stem for path in NOTEBOOKS]


def test_it_opens_with_its_question_and_answer(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**Question.**" in first.source and "**Answer" in first.source and "**How long.**" in first.source
    assert first.source.rstrip().endswith("<!-- /links -->")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_how_to_give_parameters_before_it_sets_them(path):
    cells = nbformat.read(path, as_version=4).cells
    place = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    text = cells[place - 1].source
    assert cells[place - 1].cell_type == "markdown" and f"`bsap run {path.stem} --list`" in text
    command, folder = re.search(r"\n    bsap (run .+)\n", text)[1].split(), re.search(r"`figures/(.+)/`", text)[1]
    given = dict(zip(command[3::3], command[4::3], strict=True))
    assert command[:2] == ["run", path.stem] and set(command[2::3]) == {"-p"}
    cli.check_known("-p", given, cli.declared(path))
    assert cli.settings(path.stem, given, cli.declared(path)).keys() == given.keys()
    said = [value if value[0].isalpha() else f"{name.lower()}-{value}" for name, value in given.items()]
    assert folder == cli.slug(said), "the folder that this command writes to"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_parameters_are_tagged_and_explained(path):
    parameters = cli.declared(path)
    assert "OUT_DIR" in parameters
    assert not [name for name, parameter in parameters.items() if not parameter.help]


def test_its_code_is_valid(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)


def test_the_kernel_is_that_of_any_machine(notebook):
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("params", sorted((ROOT / "notebooks/params").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_params_file_fits_its_notebooks(params):
    known = {path.stem: cli.declared(path) for path in NOTEBOOKS}
    content = cli.read_params(params, known)
    for stem, parameters in known.items():
        cli.settings(stem, content["all"] | content.get(stem, {}), parameters)
    assert yaml.safe_load(params.read_text())["run_name"]


SMALL = {
    "03_rec": (["-p", "LIMIT", "3"], {"table_rec.csv", "table_rec_slices.csv"}),
    "06_retrieval": (
        ["-p", "LIMIT", "5", "-p", "SIZES", "500,2000"],
        {f"table_retrieval{name}.csv" for name in ("", "_kinds", "_hubness", "_paper")},
    ),
}


@pytest.mark.parametrize("stem", SMALL)
def test_the_same_parameters_give_the_same_bytes(tmp_path, stem):
    """Tables and predictions of two runs of a whole notebook, each in a kernel of its own; but for what was timed."""
    given, expected = SMALL[stem]
    command = [
        sys.executable,
        "-m",
        "bsap_utils.cli",
        "run",
        stem,
        *given,
        "-p",
        "METHODS",
        "clip,bsap",
        "-p",
        "OUT_DIR",
    ]
    folders = [tmp_path / "a", tmp_path / "b"]
    runs = [subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for out in folders]
    for run in runs:
        errors = run.communicate()[1]
        assert run.returncode == 0, errors
    tables = [{file.name: file.read_bytes() for file in out.glob("*.csv")} for out in folders]
    timed = [of_run.pop("table_retrieval_costs.csv", None) for of_run in tables]
    assert tables[0] == tables[1]
    assert set(tables[0]) == expected
    if stem == "06_retrieval":
        assert all(timed), "what searching costs is a table of its own"
        assert b"clip" in tables[0]["table_retrieval.csv"] and len(list(folders[0].glob("fig_retrieval*.png"))) == 4


def test_a_model_without_weights_stops_the_notebook_kindly(tmp_path):
    """The two lines of the README, on a machine that has neither the weights nor a network."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    given = ["-p", "MODEL", "ViT-B-32", "-p", "PRETRAINED", "openai", "-p", "OUT_DIR", str(tmp_path / "out")]
    command = [sys.executable, "-m", "bsap_utils.cli", "run", "03_rec", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "ModelError: The weights of ViT-B-32 openai are not on this machine" in done.stderr
    assert not list((tmp_path / "out").glob("*"))
