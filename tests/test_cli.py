"""The `bsap` command on small notebooks of its own: real kernels, real papermill, real signals."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import run
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import bsap_utils
from bsap_utils import cli

PARAMETERS = """\
DATASET = "refshapes"  # the benchmark
WEIGHT = 0.5  # of BSAP-H
LIMIT = None  # expressions; None: all
BANK = ["plain", "colour"]  # texts
OUT_DIR = ""  # where to
"""
WRITE = """\
import json, os, sys
from pathlib import Path
out = Path(OUT_DIR)
facts = {"python": sys.executable, "cwd": os.getcwd(), "OUT_DIR": OUT_DIR, "values": [DATASET, WEIGHT, LIMIT, BANK]}
(out / "table_facts.csv").write_text(json.dumps(facts))
if not Path("shorter").exists():
    (out / "fig_more.svg").write_text("<svg/>")
print("no error")
"""
REC = """\
from pathlib import Path
Path(OUT_DIR, "table_rec.csv").write_text(
    "dataset,split,proposals,method,n,accuracy,ci_low,ci_high\\n"
    "refcoco,val,detections,clip,10834,40.1,39.0,41.2\\nrefcoco,testA,detections,clip,5657,49.0,48.0,50.0\\n"
    "refcoco,testB,detections,clip,3,0.0,,\\nrefcoco,test,detections,clip,3,0.0,,\\n"
    "refcoco,val,detections,bsap,10834,45.0,44.0,46.0\\n")
"""
SLEEP = "import os, time\nfrom pathlib import Path\nPath(OUT_DIR, 'fig_1.svg').write_text('half')\n"
SLEEP += "Path('pid').write_text(str(os.getpid()))\ntime.sleep(99)"


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    tagged = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    nb = new_notebook(cells=[new_markdown_cell("# Title"), *tagged, *map(new_code_cell, cells)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def git(root: Path, *args: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with notebooks; its name holds a space."""
    root = tmp_path_factory.mktemp("repo") / "a clone"
    notebook(root / "notebooks/00_explore.ipynb", "1 / 0", parameters="")
    notebook(root / "notebooks/01_first.ipynb", "from pathlib import Path; Path(OUT_DIR, 'fig_1.svg').write_text('1')")
    notebook(root / "notebooks/02_bad.ipynb", "def load(name):\n    raise ValueError('no model ' + name)\nload('X')")
    notebook(root / "notebooks/03_rec.ipynb", WRITE)
    notebook(root / "notebooks/04_ris.ipynb", REC, parameters='SPLIT = "val"\nMODEL = "B"\nOUT_DIR = ""')
    notebook(root / "notebooks/A1_slow.ipynb", SLEEP)
    (root / "data").mkdir()
    (root / "data/published_rec.csv").write_bytes((bsap_utils.ROOT / "data/published_rec.csv").read_bytes())
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROOT", root)
        patch.setenv("MPLBACKEND", "agg")  # what the command sets for its kernels is undone
        patch.setenv("JUPYTER_PATH", "")
        yield root


def bsap(*args, code: int = 0) -> str:
    """All that the command prints; the message of a failure is on stdout here, by the runner."""
    result = CliRunner().invoke(cli.app, [*map(str, args)])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def start(root: Path, *args) -> subprocess.Popen:
    """The command as a process of its own, Ctrl-C not ignored even where this test runs in the background."""
    script = "import pathlib, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from bsap_utils import ROOT, cli; sys.path.insert(0, str(ROOT / 'notebooks')); import run\n"
    script += "run.ROOT = pathlib.Path(sys.argv.pop(1)); cli.app()"
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
        patch.setenv("JUPYTER_DATA_DIR", str(kernels))
        patch.chdir(kernels)
        output = bsap("run", "03", "-p", "DATASET", "refcoco+", "-p", "WEIGHT", "1", "-p", "BANK", "a, b")
    return output, next((root / "figures").glob("refcoco+-weight-1-a,-b-*"))  # a hash: the space was changed


def test_runs_in_this_python_at_the_root_with_the_parameters(executed, root):
    facts = json.loads((executed[1] / "table_facts.csv").read_text())
    assert facts["python"] == sys.executable
    assert facts["cwd"] == str(root)
    assert facts["values"] == ["refcoco+", 1, None, ["a", "b"]]
    assert not Path(facts["OUT_DIR"]).is_absolute()  # outputs in the executed notebook show no machine's path


def test_manifest_says_what_made_each_file(executed, root):
    text = (executed[1] / "manifest.json").read_text("utf-8")
    manifest = json.loads(text)
    assert list(manifest) == ["fig_more.svg", "table_facts.csv"]
    assert sorted(p.name for p in executed[1].iterdir()) == ["fig_more.svg", "manifest.json", "table_facts.csv"]
    entry, out = manifest["table_facts.csv"], f"figures/{executed[1].name}"
    given = {"DATASET": "refcoco+", "WEIGHT": 1, "LIMIT": None, "BANK": ["a", "b"], "OUT_DIR": out}
    assert entry["notebook"] == "notebooks/03_rec.ipynb" and entry["parameters"] == given
    assert entry["commit"] == git(root, "rev-parse", "HEAD") and entry["dirty"] is False
    assert entry["versions"]["python"] == sys.version.split()[0]
    assert set(entry["versions"]) == {"python", *cli.PACKAGES} and entry["versions"]["torch"].startswith("2.")
    assert 0 < entry["seconds"] < 60 and entry["device"]
    assert entry["sha256"] == hashlib.sha256((executed[1] / "table_facts.csv").read_bytes()).hexdigest()
    assert str(root) not in text


def test_executed_notebook_and_page_are_kept(executed, root):
    folder = next(path for path in (root / "runs").iterdir() if (path / "03_rec.ipynb").exists())
    assert sorted(p.name for p in folder.iterdir()) == ["03_rec.html", "03_rec.ipynb"]  # no staging folder is left
    assert "no error" in (folder / "03_rec.html").read_text("utf-8")
    assert f"2 files to figures/{executed[1].name}/: fig_more.svg, table_facts.csv" in executed[0]
    assert f"runs/{folder.name}/03_rec.ipynb" in executed[0]


def test_pages_show_formulas_without_a_network_or_scripts(root):
    own = new_notebook(cells=[new_markdown_cell(r"$$x_1$$, $\frac{1}{2}$ and $\frac{$")])
    kept = ["It costs $5 and then $10.", "`$HOME` and `$PATH`", "```\necho $HOME\necho $PATH\n```", r"A \$ and \$5"]
    kept += [r"$\text{<script>alert(1)</script>}$", r"$\href{javascript:alert(1)}{x}$", "A $ sign.\n\nAnother $ sign."]
    nbformat.write(new_notebook(cells=[*map(new_markdown_cell, kept)]), root / "kept.ipynb")
    page = run.web_page(root / "kept.ipynb")
    assert (
        "<math" not in page and "<script" not in page and "costs $5 and then $10." in page and "Another $ sign." in page
    )
    assert all(f"<code>${name}</code>" in page for name in ("HOME", "PATH")) and "echo $HOME\necho $PATH" in page
    nbformat.write(own, root / "own.ipynb")
    for path in [*Path(bsap_utils.ROOT, "notebooks").glob("*.ipynb"), root / "own.ipynb"]:
        page = run.web_page(path)
        assert f"<title>{path.stem}</title>" in page and not re.search("<script|<link[^>]*http|\ue000", page)
        assert not re.search(r"<m\w+>[^<]*\\", page)  # a command that MathML lacks shows with its backslash
        typed = "".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
        assert page.count("<math") == typed.replace("$$", "$").count("$") // 2 - (path.stem == "own")
    assert r"and $\frac{$" in page and '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page


def test_what_a_notebook_writes_no_more_is_removed_and_what_is_not_ours_stays(executed, root):
    folder = executed[1]
    (root / "shorter").touch()
    (folder / "notes.txt").write_text("mine")
    params = root / "again.yaml"
    params.write_text(f"run_name: {folder.name}\nall: {{DATASET: refcoco}}\n03_rec:\n  LIMIT: 3\n04_ris:\n")
    bsap("run", "03_rec", "--params", params)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "notes.txt", "table_facts.csv"]
    assert list(json.loads((folder / "manifest.json").read_text())) == ["table_facts.csv"]
    assert json.loads((folder / "table_facts.csv").read_text())["values"] == ["refcoco", 0.5, 3, ["plain", "colour"]]


def test_all_stops_at_the_first_failure_and_leaves_good_figures(root, tmp_path):
    good = root / "figures/sample"
    good.mkdir(parents=True)
    (good / "fig_bad.svg").write_text("the last good one")
    (good / "manifest.json").write_text('{"fig_bad.svg": {"notebook": "notebooks/02_bad.ipynb"}}')
    (tmp_path / "sample.yaml").write_text("all: {DATASET: refshapes}\nskip: [04_ris]")
    output = bsap("run", "--all", "--params", tmp_path / "sample.yaml", code=1)
    assert "01_first took" in output and "00_explore" not in output
    assert "03_rec runs" not in output
    problem, place = output.strip().splitlines()[-2:]
    assert problem.endswith("bsap: 02_bad stopped: no model X") and place.startswith("The traceback is in runs/")
    assert "----" not in output and "ValueError" not in output
    bsap("run", "02_bad", "--name", "never", code=1)
    assert not (root / "figures/never").exists()
    assert "\x1b" not in output
    assert "Traceback" in (root / place.removeprefix("The traceback is in ")).read_text("utf-8")
    assert (good / "fig_bad.svg").read_text() == "the last good one"
    assert sorted(json.loads((good / "manifest.json").read_text())) == ["fig_1.svg", "fig_bad.svg"]


def test_an_error_that_is_not_ours_keeps_its_traceback(root):
    output = bsap("run", "00_explore", code=1)
    assert 'Exception encountered at "In [1]"' in output and "----> 1 1 / 0" in output and "\x1b" not in output
    assert "ZeroDivisionError: division by zero" in output and "\nAs far as it got: runs/" in output


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])  # Ctrl-C goes the way of the first
def test_interrupted(root, sent):
    good = root / "figures/slow"
    if not good.exists():
        bsap("run", "01_first", "--name", "slow")
    pid, deadline = root / "pid", time.monotonic() + 60
    pid.unlink(missing_ok=True)
    process = start(root, "run", "A1", "--name", "slow")
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert (good / "fig_1.svg").read_text() == "1"
    if sent == signal.SIGKILL:
        return os.kill(int(pid.read_text()), sent)  # nobody could stop the kernel
    assert process.returncode == 1
    assert "bsap: A1_slow stopped: KeyboardInterrupt" in errors and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)  # no orphan


def test_a_notebook_elsewhere_whose_kernel_dies(root, tmp_path):
    elsewhere = notebook(tmp_path / "mine.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "bsap: mine stopped: DeadKernelError" in bsap("run", elsewhere, code=1)


def test_out_dir_given_takes_the_place_of_figures(root, tmp_path):
    own = shutil.copy(root / "notebooks/01_first.ipynb", tmp_path / "own.ipynb")
    bsap("run", own, "-p", "OUT_DIR", tmp_path / "results", "-p", "DATASET", "here")
    assert (tmp_path / "results/fig_1.svg").read_text() == "1"
    entry = json.loads((tmp_path / "results/manifest.json").read_text("utf-8"))["fig_1.svg"]
    assert entry["parameters"]["OUT_DIR"] == "…/results" and entry["notebook"] == "own.ipynb"
    assert not (root / "figures/here").exists()


ROW = "{method: CLIP (ReCLIP without relations), backbones: ViT-B/32, visual_prompt: crop+blur, post_processing: none}"


def test_the_run_ends_beside_the_published_row(root, tmp_path):
    (tmp_path / "reclip.yaml").write_text(f"published: {ROW}")
    output = bsap("run", "04_ris", "--params", tmp_path / "reclip.yaml")
    assert [line for line in output.splitlines() if "measured" in line] == [
        "refcoco val: measured 40.1 [39.0, 41.2] on 10,834 expressions, published 40.58: same",
        "refcoco testA: measured 49.0 [48.0, 50.0] on 5,657 expressions, published 43.98: difference +5.0",
        "refcoco testB: measured 0.0 (too few pictures for an interval) on 3 expressions, published 37.63",
        "refcoco test: measured 0.0 (too few pictures for an interval) on 3 expressions, no published row",
    ]


def test_a_row_of_ris_or_of_another_method_is_found_by_its_own_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", bsap_utils.ROOT)
    (tmp_path / "table_ris.csv").write_text(
        "dataset,split,method,n,oiou,miou,miou_low,miou_high\nrefcoco,val,clip,10834,9.0,26.0,25.0,27.0\n"
        "refcoco,val,subtraction,10834,9.0,20.0,19.0,21.0\n")  # fmt: skip
    row, measured = {"method": "Global-Local CLIP", "masks": "FreeSOLO", "metric": "miou"}, "on 10,834 expressions"
    assert run.beside_published(row, tmp_path, ["table_ris.csv"]) == [
        f"refcoco val: measured 26.0 [25.0, 27.0] {measured}, published 26.20: same"
    ]
    assert run.beside_published(row | {"ours": "subtraction"}, tmp_path, ["table_ris.csv"]) == [
        f"refcoco val: measured 20.0 [19.0, 21.0] {measured}, published 26.20: difference -6.2"
    ]
    assert run.beside_published(row, tmp_path, ["fig_ris.svg"]) == []  # another notebook's run


def test_what_is_not_the_rows_own_setting_is_not_compared_with_it(root, tmp_path):
    (tmp_path / "reclip.yaml").write_text(f"published: {ROW}")
    for name, value, lines in (("SPLIT", "testA", 3), ("MODEL", "other", 0)):
        output = bsap("run", "04_ris", "--params", tmp_path / "reclip.yaml", "-p", name, value)
        assert output.count(", published ") == lines and ("not compared" in output) == (name == "MODEL")


def entry(name: str) -> dict:
    return {
        "notebook": name,
        "parameters": {"ROOT": "/home/me/refer", "TEXT": "https://example.org/x", "MARGIN": 1e-05},
    }


def stage(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_publish_merges_by_notebook(root, tmp_path):
    folder = tmp_path / "figures"
    run.publish(stage(tmp_path / "1", a="1", b="1"), folder, entry("one"))
    run.publish(stage(tmp_path / "2", c="2", d="2"), folder, entry("two"))
    assert run.publish(stage(tmp_path / "3", a="3", c="3"), folder, entry("one")) == (["a", "c"], [])
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert {name: e["notebook"] for name, e in manifest.items()} == {"a": "one", "c": "one", "d": "two"}
    assert sorted(p.name for p in folder.iterdir()) == ["a", "c", "d", "manifest.json"]
    assert manifest["d"]["parameters"] == {"ROOT": "…/refer", "TEXT": "https://example.org/x", "MARGIN": 1e-05}
    assert (folder / "c").read_text() == "3"


def test_publish_nothing_makes_nothing(root, tmp_path):
    assert run.publish(stage(tmp_path / "1"), tmp_path / "figures", entry("one")) == ([], [])
    assert not (tmp_path / "figures").exists()


def test_results_that_cannot_be_moved_are_safe_and_nothing_else_changes(root, tmp_path):
    """The system refuses the larger file, as it does on a full disk; it would replace one of an earlier run."""
    folder = tmp_path / "figures"
    run.publish(stage(tmp_path / "1", a="1", b="1", old="1"), folder, entry("one"))
    before = {path.name: path.read_text() for path in folder.iterdir()}
    again, limits = stage(tmp_path / "2", a="2", b="2" * 9000), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(ValueError) as error:
            run.publish(again, folder, entry("one"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{folder}/: the results" in str(error.value)
    assert f"(File too large) and are safe in {again}/:" in str(error.value)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert run.publish(again, folder, entry("one")) == (["a", "b"], []) and not again.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "manifest.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_damaged_manifest_is_told_before_the_run(root, text):
    (root / "figures/damaged").mkdir(parents=True, exist_ok=True)
    (root / "figures/damaged/manifest.json").write_text(text)
    output = bsap("run", "01", "--name", "damaged", code=1)
    assert "figures/damaged/manifest.json" in output and "runs in" not in output
    assert (root / "figures/damaged/manifest.json").read_text() == text


def test_provenance_outside_git_and_with_changes(root, tmp_path, monkeypatch):
    (root / "notebooks/new.py").touch()
    assert run.provenance()["dirty"] is True
    (root / "notebooks/new.py").unlink()
    (root / "inner").mkdir(exist_ok=True)
    for folder in (tmp_path, root / "inner"):  # a folder inside of another's repository has no commit of its own either
        monkeypatch.setattr(run, "ROOT", folder)
        assert run.provenance()["commit"] is None


def test_list_shows_every_parameter(root):
    lines = bsap("run", "03_rec", "--list").splitlines()
    assert lines[0].split() == ["DATASET", '"refshapes"', "the", "benchmark"]
    assert [line.split()[0] for line in lines] == ["DATASET", "WEIGHT", "LIMIT", "BANK", "OUT_DIR"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "give one notebook, or --all. There are:\n  00_explore\n  01_first"),
        ("run 03 --all", "give one notebook, or --all"),
        ("run 0", "0: give one notebook, or --all"),
        ("run 03_rek", "03_rek: give one notebook, or --all. There are:\n  00_explore\n  01_first"),
        ("run nowhere/x.ipynb", "nowhere/x.ipynb: give one notebook"),
        ("run 03 -p DATASE x", "no parameter DATASE. There are:\n  DATASET\n  WEIGHT"),
        ("run 03 -p WEIGHT warm", "03_rec: WEIGHT = 'warm': should be like its default, 0.5"),
        ("run 03 --params nowhere.yaml", "nowhere.yaml: there is no such file"),
    ],
)
def test_mistakes_on_the_command_line(root, arguments, message):
    assert message in bsap(*arguments.split(), code=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all:\n  DATASET: [a\n03_rec: 1", "line 3"),
        ("- 1", "should hold sections"),
        ("03_rek: {WEIGHT: 1}", "no section or notebook 03_rek. There are:\n  run_name\n  skip\n  all"),
        ("all: {WAIT: 1}", "all: no parameter WAIT. There are:\n  DATASET"),
        ("03_rec: {STEPS: 1}", "03_rec: no parameter STEPS"),
        ("04_ris: {DATASET: x}", "04_ris: no parameter DATASET"),
        ("03_rec: [WEIGHT]", "03_rec should be a dict"),
        ("skip: 03_rec", "skip should be a list"),
        ("skip: [3]", "skip: no notebook 3"),
        ("run_name: 3", "run_name should be a str"),
        ("03_rec: {DATASET: 3}", "DATASET = 3: should be like its default, 'refshapes'"),
        ("all: {WEIGHT: yes}", "WEIGHT = True: should be like its default, 0.5"),
        ("\0", "p.yaml: "),
        ("all: &a {LIMIT: 3}\n03_rec: *a", "alias"),
        ("all: " + "[" * 5000, "p.yaml: "),
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
        ("7", 1, 7), ("-1", 1, -1), (2, 1, 2), ("1e-3", 1.0, 0.001), (2, 1.0, 2), ("inf", 1.0, float("inf")),
        ("True", False, True), (True, False, True), ("no", "text", "no"), ("007", "text", "007"), ("", "text", ""),
        ("a photo, of a dog", ["x"], ["a photo", "of a dog"]), ('["a photo, of a dog"]', ["x"], ["a photo, of a dog"]),
        ("", ["x"], []), ("0.1,1,10", [1, 0.5], [0.1, 1, 10]), ([1, 2], [0.5], [1, 2]), ("1,x", [], ["1", "x"]),
        ("1", ["x"], ["1"]), ("{}", ["x"], ["{}"]), ("None", ["x"], ["None"]),
        ("None", None, None), ("0.5", None, 0.5), ("val", None, "val"), ([1, "a"], None, [1, "a"]), ("one", ["x"], ["one"]),
    ],
)  # fmt: skip
def test_typed(value, default, expected):
    result = run.typed(value, default)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "default"),
    [("x", 1), ("1.5", 1), (1.5, 1), (True, 1), (True, 1.0), ("warm", 1.0), (None, 1.0), ([1], 1.0), ("2", False)]
    + [(3, "text"), (None, "text"), (["a"], "text"), (3, ["a"])],
)
def test_typed_refuses(value, default):
    with pytest.raises(ValueError):
        run.typed(value, default)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}'])
def test_damaged_notebook(root, tmp_path, text):
    path = notebook(tmp_path / "x.ipynb")
    path.write_text(text)
    assert f"{path}: its parameters cannot be read" in bsap("run", path, code=1)


def test_slugs_are_safe_and_tell_apart_what_they_change():
    assert run.slug("", [("DATASET", "refcoco"), ("MODEL", "ViT-B-32"), ("SEED", "3")]) == "refcoco-ViT-B-32-seed-3"
    names = ["банк.txt", "слова.txt", "动物", "a b", "a-b", "../../etc", "etc", "..", "é/ü", "x" * 100, "x" * 101]
    names += ["w/x", "v/x", "local-dir:x", "local-dir:w/x", "local-dir:w/x,local-dir:v/x"]
    of_names, of_models = [run.slug(n, []) for n in names], [run.slug("", [("MODEL", n)]) for n in names]
    assert len(set(of_names)) == len(set(of_models)) == len(names)
    assert all(len(s) <= 80 and "/" not in s and s.strip(".-") for s in of_names + of_models)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("MODEL", "local-dir:/tmp/user/w/tinyA,local-dir:../tinyB/", "tinyA,tinyB"), ("MODEL", "local-dir:tinyA", "tinyA"),
        ("PROPOSALS", "/data/my boxes.json", "my-boxes.json"), ("OTHER_PROPOSALS", "a/b.json", "other_proposals-b.json"),
        ("MODEL", "hf-hub:timm/ViT-B-32", "hf-hub-timm-ViT-B-32"),
    ],
)  # fmt: skip
def test_folders_are_named_by_the_last_part_of_a_path(name, value, shown):
    assert re.fullmatch(f"refcoco-{shown}-[0-9a-f]{{8}}", run.slug("refcoco", [(name, value)]))


@pytest.mark.parametrize("pair", [("VISUAL_PROMPTS", "OTHER_PROMPTS"), ("AUX_BANK", "BANKS"), ("SPLIT", "GALLERY")])
def test_parameters_of_the_same_value_get_folders_of_their_own(root, tmp_path, pair, monkeypatch):
    path, targets = notebook(tmp_path / "x.ipynb", parameters="\n".join(f'{name} = "a"' for name in pair)), []
    monkeypatch.setattr(run, "run_one", lambda path, defaults, values, folder, target, made_by: targets.append(target))
    for name in pair:
        bsap("run", path, "-p", name, "generic")
    assert len(set(targets)) == 2


def test_doctor_says_whether_the_sample_can_be_run(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("refshapes", "clip-refshapes-web"):
        (tmp_path / "data" / name).symlink_to(bsap_utils.ROOT / "data" / name)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    output = bsap("doctor")
    assert (
        "no real data" in output
        and f"{tmp_path}/data/clip-refshapes" not in output
        and output.endswith("Next: make figures\n")
    )
    assert "ViT-B-32 openai" in output and "torch 2." in output and "ray" not in output.lower()
    (tmp_path / "data/refshapes").unlink()
    output = bsap("doctor", code=1)
    assert "no such file" in output and "Next: git checkout -- data" in output
    shutil.copytree(bsap_utils.ROOT / "data/refshapes", tmp_path / "data/refshapes")
    next((tmp_path / "data/refshapes/images").rglob("*.jpg")).unlink()
    assert "not in the clone: COCO_train2014_" in bsap("doctor", code=1)


def test_masks_are_written_once(tmp_path):
    assert "data/refshapes/refshapes_masks.json is there already" in bsap("masks", "refshapes", code=1)
    photos = bsap_utils.ROOT.parent / "shared/real/refcoco-photos"
    if not photos.is_dir():
        pytest.skip("real material lies beside the checkout of our machines only")
    given = ["masks", "refcoco", "--root", photos, "--split", "val", "--out", tmp_path / "m.json"]
    assert "masks of 2 images are in" in bsap(*given)
    assert {"image_id", "segmentation", "score"} <= json.loads((tmp_path / "m.json").read_text())[0].keys()
    assert "is there already" in bsap(*given, code=1)


def test_version_and_help():
    assert bsap("--version") == f"bsap {bsap_utils.__version__}\n"
    assert "NAME VALUE" in bsap("run", "--help")
