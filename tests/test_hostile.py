"""Hostile or unlucky files, one case a kind: nothing of the user's is lost, nothing runs, and the rest of the work goes on."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import run
import torch
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from bsap_utils import ROOT, cli, normalization, regions
from bsap_utils.datasets import DatasetError, load_refer, open_picture, read_json, write_file


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with one notebook, which writes what its parameter says."""
    root = tmp_path / "clone"
    tagged = new_code_cell('FILES = ["fig_1.png"]  # x\nOUT_DIR = ""  # y', metadata={"tags": ["parameters"]})
    code = new_code_cell("from pathlib import Path\nfor n in FILES:\n    Path(OUT_DIR, n).write_text('new')")
    shown = new_code_cell(
        "from IPython.display import HTML\nHTML('<b>bold</b><script>alert(1)</script><img src=x onerror=alert(2)>')"
    )
    nb = new_notebook(cells=[tagged, code, shown])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (root / "notebooks").mkdir(parents=True)
    nbformat.write(nb, root / "notebooks/01_x.ipynb")
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setenv("MPLBACKEND", "agg")
    return root


def bsap(*args, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def test_a_run_keeps_what_is_the_users_and_its_page_runs_no_script(clone):
    (clone / "README.md").write_text("mine")
    assert "holds files that no run made" in bsap("run", "01", "-p", "OUT_DIR", ".", code=1)
    folder = clone / "figures/x"
    folder.mkdir(parents=True)
    (clone / "figures/precious.txt").write_text("mine")
    (folder / "fig_1.png").write_text("mine")  # beside a manifest that does not name it
    (folder / "changed.csv").write_text("changed since")
    (folder / "README.md").symlink_to(clone / "README.md")
    names = ["../precious.txt", str(clone / "README.md"), "changed.csv", "README.md"]
    (folder / "manifest.json").write_text(
        json.dumps({name: {"notebook": "notebooks/01_x.ipynb", "sha256": "0" * 64} for name in names})
    )
    output = bsap("run", "01", "--name", "x", "-p", "FILES", "fig_1.png,fig_2.png,README.md")
    assert "no run made them: README.md, fig_1.png" in output
    assert [(folder / name).read_text() for name in ("fig_1.png", "fig_2.png", "changed.csv")] == [
        "mine",
        "new",
        "changed since",
    ]
    assert (clone / "figures/precious.txt").read_text() == (clone / "README.md").read_text() == "mine"
    assert list(json.loads((folder / "manifest.json").read_text())) == ["fig_2.png"]
    assert sorted(p.name for p in clone.glob("runs/*/01_x-results/*")) == ["README.md", "fig_1.png"]  # the new ones
    (page,) = clone.glob("runs/*/01_x.html")
    body = page.read_text("utf-8").partition("<main>")[2]
    assert (
        "<b>bold</b>&lt;script&gt;alert(1)&lt;/script&gt;&lt;img" in body
        and "<script>alert" not in body
        and "<img src=x" not in body
    )


@pytest.mark.parametrize("name", ["runs", "figures"])
def test_dead_links_and_files_in_the_place_of_folders_are_told_before_the_work(clone, name):
    for make in (lambda place: place.symlink_to("/scratch/not/mounted"), Path.touch):
        make(clone / name)
        begin = time.monotonic()
        assert "no folder to write to" in bsap("run", "01", code=1) and time.monotonic() - begin < 5
        (clone / name).unlink()


def test_clearing_the_cache_removes_only_what_it_made(tmp_path, monkeypatch):
    cache, other = tmp_path / "cache", tmp_path / "other"
    for folder in (cache / "photos", other):
        folder.mkdir(parents=True)
        for name in ("a.json", "b.parquet", "c.safetensors", "notes.txt"):
            (folder / name).write_text("mine")
    (cache / "link").symlink_to(other)
    monkeypatch.setenv("BSAP_CACHE", str(cache))
    bsap("cache", "clear")
    assert len([p for p in (*cache.rglob("*"), *other.rglob("*")) if p.is_file()]) >= 8


def test_only_regular_files_of_a_picture_format_are_opened(tmp_path):
    (tmp_path / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )  # would start Ghostscript
    os.mkfifo(tmp_path / "fifo.jpg")
    for path in (tmp_path / "x.jpg", tmp_path / "fifo.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(DatasetError):
            open_picture(path)
    for path in (tmp_path / "fifo.jpg", Path("/dev/zero")):
        with pytest.raises(DatasetError):
            read_json(path)
        with pytest.raises(ValueError, match="no such file"):
            run.read_params(path, {})


def test_memory_from_small_files_is_bounded(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    with pytest.raises(DatasetError):
        open_picture(buffer.getvalue())
    frames = [Image.new("L", (64, 64), shade % 256) for shade in range(600)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(buffer.getvalue()).size == (64, 64)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError):
        read_json(tmp_path / "deep.json")
    for text in ("a: &a [1]\nb: *a", "all: " + "[" * 50_000, "all: " + "{a: " * 5_000):
        (tmp_path / "p.yaml").write_text(text)
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"p\.yaml: "):
            run.read_params(tmp_path / "p.yaml", {})
        assert time.monotonic() - begin < 3
    for mask in ({"size": [9, 9], "counts": [2**33, 2**33]}, {"size": [10**9, 10**9], "counts": [1]}):
        with pytest.raises((ValueError, OverflowError)):
            regions.to_rle(mask, 9, 9)


def test_pickles_run_nothing(tmp_path):
    shutil.copytree(ROOT / "data/refshapes/refshapes", tmp_path / "refshapes")
    target = tmp_path / "refshapes/refs(unc).p"

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "evil",)

    nested = b"\x80\x02]}" + b")" + b"2\x86" * 60 + b"K\x01sa."  # a key of 2**60 tuples, as a dict would hash it
    for content in (pickle.dumps([Evil()]), pickle.dumps([{frozenset({1}): 1}]), nested):
        target.write_bytes(content)
        with pytest.raises(DatasetError):
            load_refer(tmp_path, "refshapes")
        assert not (tmp_path / "evil").exists()


def test_two_processes_write_one_file_and_leave_no_parts(tmp_path):
    code = "import sys; from bsap_utils.datasets import write_file\n"
    code += "for _ in range(200): write_file(sys.argv[1], sys.argv[2].encode() * 1000)"
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "f", letter], cwd=ROOT) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "f").read_bytes() in (b"a" * 1000, b"b" * 1000)
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "f", lambda part: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(DatasetError):
        write_file(tmp_path / "link", b"x")


@pytest.mark.parametrize("temperature", [0, -1, 1e-7, 1e7, np.nan])
def test_temperatures_without_sense_are_refused(temperature):
    with pytest.raises(ValueError):
        normalization.pool(torch.zeros(2, 3), temperature)


def test_a_terminal_that_cannot_print(tmp_path):
    source = tmp_path / "фото"
    source.mkdir()
    (source / "плохо.jpg").write_bytes(b"x")
    command = [
        sys.executable,
        "-m",
        "bsap_utils.cli",
        "embed",
        source,
        tmp_path / "out",
        "--local",
        "--bank",
        "generic",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*command, "--model", "local-dir:data/clip-refshapes"], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0 and b"1 that cannot be read" in done.stdout, done.stderr


def test_broken_network_settings_are_a_sentence_that_names_them():
    broken = {"ALL_PROXY": "socks://127.0.0.1:1", "SSL_CERT_FILE": "/nowhere.pem", "HF_ENDPOINT": "http://[::1"}
    command = [sys.executable, "-m", "bsap_utils.cli", "doctor"]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = {name: subprocess.Popen(command, env={**os.environ, name: broken[name]}, **how) for name in broken}
    for name, process in begun.items():
        output = process.communicate(timeout=90)[0]
        assert "Traceback" not in output and name in output
