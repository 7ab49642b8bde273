"""The `bsap` command on small notebooks of its own: real kernels, real papermill, real signals."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

import bsap_utils
from bsap_utils import cli

PARAMETERS = """\
DATASET = "refshapes"  # the benchmark; "refcoco" = the real one
WEIGHT = 0.5  # of BSAP-H
LIMIT: int | None = None  # expressions; None = all
BANK = ("plain", "colour")  # texts
OUT_DIR = ""
"""
WRITE = """\
import json, os, sys
from pathlib import Path
out = Path(OUT_DIR or "figures/sample")
facts = {"python": sys.executable, "cwd": os.getcwd(), "OUT_DIR": OUT_DIR, "values": [DATASET, WEIGHT, LIMIT, BANK]}
(out / "table_facts.csv").write_text(json.dumps(facts))
(out / "run_info.json").write_text(json.dumps({"device": "some GPU", "weights": "local-dir:/opt/models/clip"}))
if not Path("shorter").exists():
    (out / "fig_more.svg").write_text("<svg/>")
print("no error")
"""


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    tagged = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    nb = new_notebook(cells=[new_markdown_cell("# Title"), *tagged, *map(new_code_cell, cells)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def git(root: Path, *args: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with notebooks; its name holds what papermill would take for a parameter, and a space."""
    root = tmp_path_factory.mktemp("repo") / "a {clone}"
    notebook(root / "notebooks/00_explore.ipynb", "1 / 0", parameters="")
    notebook(
        root / "notebooks/01_first.ipynb", "from pathlib import Path", "(Path(OUT_DIR) / 'fig_1.svg').write_text('1')"
    )
    notebook(
        root / "notebooks/02_bad.ipynb", "x = 1", "def load(name):\n    raise ValueError('no model ' + name)\nload('X')"
    )
    notebook(root / "notebooks/03_rec.ipynb", WRITE)
    notebook(root / "notebooks/04_ris.ipynb", parameters='SPLIT = "val"\nOUT_DIR = ""')
    sleep = (
        "from pathlib import Path; import os, time\nPath(OUT_DIR, 'pid').write_text(str(os.getpid()))\ntime.sleep(99)"
    )
    notebook(root / "notebooks/A1_slow.ipynb", "", "x = 1", sleep)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "start")
    before, cli.ROOT = cli.ROOT, root
    yield root
    cli.ROOT = before


def bsap(*args, code: int = 0) -> str:
    """All that the command prints; for the exit code, the message of a failure is on stdout here, by the runner."""
    result = CliRunner().invoke(cli.app, [*map(str, args)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def start(root: Path, *args) -> subprocess.Popen:
    """The command as a process of its own, Ctrl-C not ignored even where this test runs in the background."""
    script = "import pathlib, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from bsap_utils import cli; cli.ROOT = pathlib.Path(sys.argv.pop(1)); cli.app()"
    command = [sys.executable, "-c", script, str(root), *args]
    return subprocess.Popen(command, cwd=bsap_utils.ROOT, stdout=-1, stderr=-1, text=True)


@pytest.fixture(scope="module")
def executed(root, tmp_path_factory):
    """03_rec, run with parameters from another folder while a "python3" kernel of another Python is registered."""
    kernels = tmp_path_factory.mktemp("jupyter")
    (kernels / "kernels/python3").mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "elsewhere", "language": "python"}
    (kernels / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernels))
        patch.chdir(kernels)
        output = bsap("run", "03", "-p", "DATASET", "refcoco+", "-p", "WEIGHT", "1", "-p", "BANK", "a, b")
    return output, root / "figures/refcoco+-weight-1-a-b"


def test_runs_in_this_python_at_the_root_with_the_parameters(executed, root):
    facts = json.loads((executed[1] / "table_facts.csv").read_text())
    assert facts["python"] == sys.executable
    assert facts["cwd"] == str(root)
    assert facts["values"] == ["refcoco+", 1.0, None, ["a", "b"]]
    assert not Path(facts["OUT_DIR"]).is_absolute()  # outputs in the executed notebook show no machine's path


def test_manifest_says_what_made_each_file(executed, root):
    text = (executed[1] / "manifest.json").read_text("utf-8")
    manifest = json.loads(text)
    assert list(manifest) == ["fig_more.svg", "table_facts.csv"]
    assert sorted(p.name for p in executed[1].iterdir()) == [
        "README.md",
        "fig_more.svg",
        "manifest.json",
        "table_facts.csv",
    ]
    entry = manifest["table_facts.csv"]
    assert entry["notebook"] == "notebooks/03_rec.ipynb"
    assert entry["parameters"] == {
        "DATASET": "refcoco+",
        "WEIGHT": 1.0,
        "LIMIT": None,
        "BANK": ["a", "b"],
        "OUT_DIR": "figures/refcoco+-weight-1-a-b",
    }
    assert entry["commit"] == git(root, "rev-parse", "HEAD")
    assert entry["dirty"] is False
    assert entry["device"] == "some GPU"
    assert entry["weights"] == "local-dir:…/clip"
    assert entry["versions"]["python"] == sys.version.split()[0]
    assert set(entry["versions"]) == {"python", *cli.PACKAGES}
    assert entry["versions"]["torch"].startswith("2.")
    assert 0 < entry["seconds"] < 60
    assert entry["sha256"] == hashlib.sha256((executed[1] / "table_facts.csv").read_bytes()).hexdigest()
    assert str(root) not in text and "/opt" not in text


def test_executed_notebook_and_page_are_kept(executed, root):
    folder = next((root / "runs").iterdir())
    assert time.strptime(folder.name, "%Y-%m-%d-%H%M%S")
    assert sorted(p.name for p in folder.iterdir()) == ["03_rec.html", "03_rec.ipynb"]  # no staging folder is left
    assert "no error" in (folder / "03_rec.html").read_text("utf-8")
    assert "no error" in (folder / "03_rec.ipynb").read_text("utf-8")
    assert "2 files to figures/refcoco+-weight-1-a-b/: fig_more.svg, table_facts.csv" in executed[0]
    assert f"runs/{folder.name}/03_rec.ipynb" in executed[0]


def test_figures_show_in_the_executed_notebook_whatever_backend_the_shell_names(root, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # as servers do, and make
    file = notebook(tmp_path / "plot.ipynb", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", parameters="A = 1")
    before = set((root / "runs").iterdir())
    bsap("run", file)
    (folder,) = set((root / "runs").iterdir()) - before
    (output,) = nbformat.read(folder / "plot.ipynb", as_version=4).cells[-1].outputs
    assert output.data["image/png"] and os.environ["MPLBACKEND"] == "agg"


def test_what_a_notebook_writes_no_more_is_removed_and_params_files_hold(executed, root):
    (root / "shorter").touch()
    (executed[1] / "notes.txt").write_text("mine")
    file = root / "refcoco+.yaml"
    file.write_text(
        "run_name: refcoco+-weight-1-a-b\nall: {DATASET: refcoco, SPLIT: test}\n03_rec:\n  LIMIT: 3\n04_ris:\n"
    )
    output = bsap("run", "03_rec", "--params", file)
    assert "writes them no more: fig_more.svg" in output
    assert sorted(p.name for p in executed[1].iterdir()) == [
        "README.md",
        "manifest.json",
        "notes.txt",
        "table_facts.csv",
    ]
    assert list(json.loads((executed[1] / "manifest.json").read_text())) == ["table_facts.csv"]
    facts = json.loads((executed[1] / "table_facts.csv").read_text())
    assert facts["values"] == ["refcoco", 0.5, 3, ["plain", "colour"]]


def test_all_stops_at_the_first_failure_and_leaves_good_figures(root, tmp_path):
    good = root / "figures/sample"
    good.mkdir(parents=True)
    (good / "fig_bad.svg").write_text("the last good one")
    (good / "manifest.json").write_text('{"fig_bad.svg": {"notebook": "notebooks/02_bad.ipynb"}}')
    (tmp_path / "sample.yaml").write_text("all: {DATASET: refshapes}\nskip: [04_ris]")
    output = bsap("run", "--all", "--params", tmp_path / "sample.yaml", code=1)
    assert "00_explore left out: no parameters cell" in output
    assert "04_ris left out: in skip" in output
    assert "01_first took" in output
    assert "02_bad failed in cell [4]: ValueError: no model X" in output
    assert "----> 3 load('X')" in output
    assert "not run: 03_rec\n" in output
    assert "\x1b" not in output
    partial = next(line for line in output.splitlines() if line.startswith("As far")).split(": ")[1].split(";")[0]
    assert "no model X" in (root / partial).read_text("utf-8")
    assert (good / "fig_bad.svg").read_text() == "the last good one"
    assert sorted(json.loads((good / "manifest.json").read_text())) == ["fig_1.svg", "fig_bad.svg"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(root, sent):
    process = start(root, "run", "A1", "--name", "slow")
    pid, deadline = [], time.monotonic() + 60
    while not (pid and pid[0].read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
        pid = list((root / "runs").glob("*/A1_slow-results/pid"))
    kernel = int(pid[0].read_text())
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "bsap: A1_slow stopped in cell [4]: interrupted" in errors
    assert "Traceback" not in errors
    assert (pid[0].parents[1] / "A1_slow.ipynb").exists()
    assert not (root / "figures/slow").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)  # no orphan
    pid[0].unlink()


def test_a_notebook_elsewhere_whose_kernel_dies(root, tmp_path):
    elsewhere = notebook(tmp_path / "mine.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    process = start(root, "run", str(elsewhere))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "bsap: mine stopped in cell [3]: DeadKernelError" in errors
    assert "Traceback" not in errors
    assert output.startswith("mine runs in runs/")


def test_out_dir_given_takes_the_place_of_figures(root, tmp_path):
    bsap("run", "01_first", "-p", "OUT_DIR", tmp_path / "results", "-p", "DATASET", "here")
    assert (tmp_path / "results/fig_1.svg").read_text() == "1"
    entry = json.loads((tmp_path / "results/manifest.json").read_text("utf-8"))["fig_1.svg"]
    assert entry["parameters"]["OUT_DIR"] == "…/results"
    assert entry["device"]  # of torch, as the notebook does not say
    assert not (root / "figures/here").exists()


def entry(name: str) -> dict:
    return {
        "notebook": name,
        "parameters": {"ROOT": "/home/me/refer", "TEXT": "https://example.org/x", "MARGIN": 1e-05},
    }


def stage(folder: Path, **files: str) -> Path:
    for name, text in {"run_info.json": '{"device": "cpu"}', **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_publish_merges_by_notebook(root, tmp_path):
    folder = tmp_path / "figures"
    cli.publish(stage(tmp_path / "1", a="1", b="1"), folder, entry("one"))
    cli.publish(stage(tmp_path / "2", c="2", **{"sub/d": "2"}), folder, entry("two"))
    assert cli.publish(stage(tmp_path / "3", a="3", c="3"), folder, entry("one")) == (["a", "c"], ["b"])
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert {name: e["notebook"] for name, e in manifest.items()} == {"a": "one", "c": "one", "sub/d": "two"}
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a", "c", "d", "manifest.json"]
    assert manifest["sub/d"]["parameters"] == {"ROOT": "…/refer", "TEXT": "https://example.org/x", "MARGIN": 1e-05}
    assert (folder / "c").read_text() == "3"


def test_publish_nothing_makes_nothing(root, tmp_path):
    assert cli.publish(stage(tmp_path / "1"), tmp_path / "figures", entry("one")) == ([], [])
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_manifest_is_told_before_the_run(root, text):
    (root / "figures/damaged").mkdir(parents=True, exist_ok=True)
    (root / "figures/damaged/manifest.json").write_text(text)
    output = bsap("run", "01", "--name", "damaged", code=1)
    assert "figures/damaged/manifest.json" in output and "runs in" not in output
    assert (root / "figures/damaged/manifest.json").read_text() == text


def test_provenance_outside_git_and_with_changes(root, tmp_path, monkeypatch):
    (root / "notebooks/new.py").touch()
    assert cli.provenance()["dirty"] is True
    (root / "notebooks/new.py").unlink()
    (root / "inner").mkdir()
    for folder in (tmp_path, root / "inner"):  # a folder inside of another's repository has no commit of its own either
        monkeypatch.setattr(cli, "ROOT", folder)
        assert cli.provenance()["commit"] is None


def test_two_runs_of_one_second_get_two_folders(root):
    assert cli.new_run_folder() != cli.new_run_folder()


def test_list_shows_every_parameter(root):
    lines = bsap("run", "03_rec", "--list").splitlines()
    assert lines[0] == "03_rec"
    assert lines[1].split() == ["DATASET", "'refshapes'", "the", "benchmark;", '"refcoco"', "=", "the", "real", "one"]
    assert [line.split()[0] for line in lines[1:]] == ["DATASET", "WEIGHT", "LIMIT", "BANK", "OUT_DIR"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "give either a notebook or --all. There are: 00_explore, 01_first"),
        ("run 03 --all", "give either a notebook or --all"),
        ("run 03_rek", "no notebook 03_rek; did you mean 03_rec? There are: 00_explore, 01_first"),
        ("run 0", "0 could be 00_explore or 01_first or"),
        ("run nowhere/x.ipynb", "no notebook nowhere/x"),
        ("run 03 -p DATASE x", "no parameter DATASE; did you mean DATASET? There are:\n  DATASET  'refshapes'"),
        ("run 03 -p weight 1", "did you mean WEIGHT? "),
        ("run 03 -p QQQ 1", "no parameter QQQ. There are:"),
        ("run 03 -p WEIGHT", "-p takes a name and a value: -p NAME VALUE"),
        ("run 03 -p WEIGHT warm", "03_rec: WEIGHT should be float like its default 0.5, not 'warm'"),
        ("run 03 --params nowhere.yaml", "cannot read nowhere.yaml"),
    ],
)
def test_mistakes_on_the_command_line(root, arguments, message):
    assert message in bsap(*arguments.split(), code=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all:\n  DATASET: [a\n03_rec: 1", "line 3"),
        ("- 1", "should hold names and values"),
        ("03_rek: {WEIGHT: 1}", "no notebook 03_rek; did you mean 03_rec? There are: run_name, skip, all, 00_explore"),
        ("all: {WAIT: 1}", "all has no parameter WAIT; did you mean WEIGHT?"),
        ("03_rec: {STEPS: 1}", "03_rec has no parameter STEPS. There are:\n  DATASET"),
        ("04_ris: {DATASET: x}", "04_ris has no parameter DATASET"),
        ("03_rec: [WEIGHT]", "03_rec should be a dict"),
        ("skip: 03_rec", "skip should be a list"),
        ("skip: [3]", "skip has no notebook 3"),
        ("run_name: 3", "run_name should be a str"),
        ("03_rec: {DATASET: 3}", "DATASET should be str like its default 'refshapes', not 3"),
        ("all: {WEIGHT: yes}", "WEIGHT should be float like its default 0.5, not True"),
        ("\0", "cannot read"),
    ],
)
def test_mistakes_in_a_params_file(root, tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    output = bsap("run", "03_rec", "--params", tmp_path / "p.yaml", code=1)
    assert message in output
    assert "p.yaml" in output or "03_rec: " in output


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("7", 1, 7),
        ("0100", 1, 100),
        ("-1", 1, -1),
        (2, 1, 2),
        ("1e-3", 1.0, 0.001),
        (2, 1.0, 2.0),
        ("YES", False, True),
        ("off", True, False),
        (True, False, True),
        ("no", "text", "no"),
        ("007", "text", "007"),
        ("", "text", ""),
        ("a photo, of a dog", ["x"], ["a photo", "of a dog"]),
        ('["a photo, of a dog"]', ["x"], ["a photo, of a dog"]),
        ("", ["x"], []),
        ("0.1,1,10", [1, 0.5], [0.1, 1.0, 10.0]),
        ([1, 2], [0.5], [1.0, 2.0]),
        ("1,x", [], [1, "x"]),
        ("{a: 1}", {}, {"a": 1}),
        ("None", None, None),
        ("null", None, None),
        ("0.5", None, 0.5),
        ("val", None, "val"),
        ([1, "a"], None, [1, "a"]),
    ],
)
def test_typed(value, default, expected):
    result = cli.typed(value, default)
    assert result == expected and type(result) is type(expected)
    if isinstance(expected, list):
        assert [type(v) for v in result] == [type(v) for v in expected]


@pytest.mark.parametrize(
    ("value", "default"),
    [("x", 1), ("1.5", 1), (1.5, 1), (True, 1), (True, 1.0), ("warm", 1.0), (None, 1.0), ([1], 1.0), ("2", False)]
    + [
        (3, "text"),
        (None, "text"),
        (["a"], "text"),
        (3, ["a"]),
        ("[1, 2]", ["a"]),
        ("a,b", [1]),
        ("x", {}),
        (["a"], {}),
    ],
)
def test_typed_refuses(value, default):
    with pytest.raises((ValueError, TypeError)):
        cli.typed(value, default)


def test_declared_reads_what_papermill_would_lose(tmp_path):
    source = 'A = 1.0  # T = 1: BSAP\nB = "#ff0000"  # colour\nC = [\n    1,  # one\n    2,\n]  # é two\n'
    source += "D = 2 * 3\nE, F = 1, 2\nG: str\n"
    found = cli.declared(notebook(tmp_path / "x.ipynb", parameters=source))
    assert {n: p.default for n, p in found.items()} == {"A": 1.0, "B": "#ff0000", "C": [1, 2], "D": None}
    assert [p.help for p in found.values()] == ["T = 1: BSAP", "colour", "é two", ""]
    assert found["D"].source == "2 * 3"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', None])
def test_damaged_notebook(root, tmp_path, text):
    path = notebook(tmp_path / "x.ipynb", parameters="A = (")
    if text is not None:
        path.write_text(text)
    assert f"cannot read the parameters of {path}" in bsap("run", path, code=1)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (["refcoco", "val", "ViT-B-32", "openai"], "refcoco-val-ViT-B-32-openai"),
        (["refcoco+"], "refcoco+"),
        (["../../etc", "a b\n"], "etc-a-b"),
        ([".."], "run"),
        (["é/ü"], "run"),
    ],
)
def test_slug(parts, name):
    assert cli.slug(parts) == name


def test_long_slugs_differ_where_they_are_cut():
    one, other = cli.slug(["x" * 100]), cli.slug(["x" * 101])
    assert one != other and len(one) == len(other) == 80


def test_without_the_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert f"no notebooks in {tmp_path}: they come with a clone of the repository" in bsap("run", "03_rec", code=1)


def test_version_and_help():
    assert bsap("--version") == f"bsap {bsap_utils.__version__}\n"
    assert "NAME VALUE" in bsap("run", "--help")
