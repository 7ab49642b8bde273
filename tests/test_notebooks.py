"""The notebooks as files: short cells that a reader can follow, outputs of the code that stands there, and any parameter."""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bsap_utils import ROOT, plotting

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]  # A1 trains a model, and keeps its own outputs
MACHINE_PATH = re.compile(r"(?<![\w.:/<\"'])/(?:home|root|work|Users|tmp|usr|opt|var|mnt|srv)/\w|file:///")


def load_render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks/render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    return render


render = load_render()
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell.source for cell in cells if "parameters" not in cell.metadata.get("tags", [])]


def test_the_notebooks_of_the_design_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["00", "01", "02", "03", "04", "05", "06", "07", "A1"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_with_its_question_and_explains_its_parameters(path):
    notebook = read(path)
    first = notebook.cells[0].source
    assert first.startswith("# ") and "**Question.**" in first and "**How long.**" in first
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and "OUT_DIR" in tagged[0].source
    for statement in ast.parse(tagged[0].source).body:
        lines = tagged[0].source.splitlines()[statement.lineno - 1 : statement.end_lineno]
        comment = "".join(lines).partition("  # ")[2]
        assert comment and "=" not in comment, f"{lines[0]}: a comment, without the sign that papermill stumbles over"


def test_no_two_notebooks_write_the_same_file():
    """All write to one folder, and the later one would take the earlier one's figure away."""
    names = [name for path in RUN for name in {*re.findall(r'out_dir / f?"([^"]+)"', "\n".join(code(read(path))))}]
    assert len(names) > 50 and len(names) == len(set(names))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_short(path):
    sizes = [len(source.splitlines()) for source in code(read(path))]
    assert np.median(sizes) <= 8 and np.quantile(sizes, 0.9) <= 18 and max(sizes) <= 30, sorted(sizes)
    lines = [line for source in code(read(path)) for line in source.splitlines()]
    assert not [line for line in lines if len(line) > 100]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_code_composes_sentences(path):
    """A sentence that depends on the run is `verdict`'s; the others were written by someone who looked."""
    for source in code(read(path)):
        words = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        assert not [word for word in words if isinstance(word, str) and re.search(r"\b(better|worse) than\b", word)]
        assert "Markdown(f" not in source


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_its_outputs_are_those_of_its_code(path):
    notebook = read(path)
    assert notebook.metadata.bsap.made_with == render.fingerprint(notebook), "make render, and commit"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert not MACHINE_PATH.search(re.sub(r'"image/png": "[^"]*"', "", str(outputs)))
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and max(len(base64.b64decode(one)) for one in pictures) <= render.MOST_PICTURE_BYTES


def papermill(notebook, out, *given, cwd=ROOT):
    command = [sys.executable, "-m", "papermill", str(notebook), str(out / "out.ipynb"), "--no-progress-bar"]
    results = ["-p", "OUT_DIR", str(out / "results")]
    done = subprocess.run([*command, *given, *results], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "results"


SMALL = ["-p", "SPLIT", "test", "-p", "MODEL", "local-dir:data/clip-refshapes", "-p", "LIMIT", "4"]


def test_one_picture_in_which_bsap_mends_nothing_still_shows_the_method(tmp_path):
    out = papermill(ROOT / "notebooks/02_bsap_method.ipynb", tmp_path, "-p", "LIMIT", "1")
    assert len(pd.read_csv(out / "table_worked_example.csv")) > 1


def test_a_method_of_ones_own_is_a_line_in_a_cell_and_papermill_repeats_it_to_the_byte(tmp_path):
    """Typed as the notebook says, in the root and in notebooks/."""
    source = (ROOT / "notebooks/03_rec.ipynb").read_text(encoding="utf-8")
    comment = '# scores[\\"mine\\"] = s - a.median(1).values[pairs.candidate]'
    assert source.count(comment) == 1
    edited, tables = tmp_path / "03_edited.ipynb", []
    edited.write_text(source.replace(comment, comment.removeprefix("# ")), encoding="utf-8")
    for place in (".", "notebooks"):
        (tmp_path / "of" / place).mkdir(parents=True)
        out = papermill(edited, tmp_path / "of" / place, *SMALL, cwd=ROOT / place)
        tables.append({file.name: file.read_bytes() for file in out.glob("*.csv")})
    table = pd.read_csv(out / "table_rec.csv")
    assert tables[0] == tables[1] and (out / "fig_rec.png").is_file()
    assert set(table["split"]) == {"test"} and {"clip", "bsap", "nnn", "mine"} <= set(table["method"])


def test_a_region_that_nothing_retrieves_is_no_hub(tmp_path, monkeypatch):
    """Two pictures, a text, the region that it retrieves: the row of hubs shows no other."""
    shown, names = [], {}
    monkeypatch.setattr(plotting, "picture_grid", lambda pictures, captions, *_: shown.extend(captions) or plt.figure())
    small = {"LIMIT": 2, "TEXTS": 1, "NEIGHBOURS": 1, "METHODS": ["clip"], "OUT_DIR": str(tmp_path)}
    for source in (cell.source for cell in read(RUN[1]).cells if cell.cell_type == "code"):
        if "plotting.save" not in source or "fig_hubs" in source:
            exec(source, names)
        names |= small if source.startswith("DATASET") else {}
        if "fig_hubs" in source:
            break
    assert shown[0].endswith(" ×1") and shown[1:8] == [""] * 7
    assert len(shown) > 8 and all(caption.endswith(" ×0") for caption in shown[8:])


def test_a_notebook_needs_no_command_of_ours():
    for path in NOTEBOOKS:
        assert not re.search(r"subprocess|os\.system|^!", "\n".join(code(read(path))), re.MULTILINE)


def test_rendering_keeps_no_widget_progress_bar_or_random_name():
    new = nbformat.v4
    data = {"text/html": "<style>#T_1a2b3 td</style><table id=T_1a2b3>"}
    said = new.new_output("stream", name="stdout", text="said")
    outputs = [said, new.new_output("stream", name="stderr", text="10%| |"), new.new_output("display_data", data),
               new.new_output("display_data", {render.WIDGET: {}, "text/plain": "Box()"}),
               new.new_output("execute_result", {"text/plain": "1"}, execution_count=7)]  # fmt: skip
    notebook = new.new_notebook(cells=[new.new_code_cell("1"), new.new_markdown_cell("Text.")], metadata=KERNEL)
    executed = new.new_notebook(cells=[new.new_code_cell("X = 1", metadata={"tags": ["injected-parameters"]}),
                                       new.new_code_cell("1", outputs=outputs), notebook.cells[1]])  # fmt: skip
    rendered = render.with_outputs(notebook, executed)
    assert rendered.cells[0].outputs.pop(0) == said
    assert [output.data for output in rendered.cells[0].outputs] == [
        {"text/html": data["text/html"].replace("1a2b3", "0")},
        {"text/plain": "1"},
    ]
    assert rendered.cells[0].outputs[1].execution_count == rendered.cells[0].execution_count == 1
    executed.cells[1].outputs = [new.new_output("error", ename="ValueError", evalue="no", traceback=[])]
    with pytest.raises(ValueError, match="ValueError: no"):
        render.with_outputs(notebook, executed)


def test_data_is_escaped_on_the_results_page():
    table = pd.DataFrame({"split": ["<script>alert(1)</script>"], "n": [np.nan]})
    assert "<script>" not in render.markdown_table(table) and "| – |" in render.markdown_table(table)


def test_results_page_follows_the_notebooks(tmp_path):
    names = ["fig_hero.png", "fig_rec.png", "table_rec.csv", "fig_mine.png"]
    manifest = {name: {"notebook": "notebooks/03_rec.ipynb"} for name in names[:3]} | {
        "fig_mine.png": {"notebook": "my"}
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in names:
        shutil.copy(ROOT / "figures/sample" / name.replace("mine", "rec"), tmp_path / name)
    render.main("page", str(tmp_path), str(tmp_path / "not made"))  # 07's folder, without the real scores
    page = (tmp_path / "README.md").read_text("utf-8")
    story = ["## [my]", "fig_mine.png", "## [03 · Referring Expression Comprehension](../../notebooks/03_rec.ipynb)"]
    story += ["| split | method", "fig_rec.png", "fig_hero.png"]
    assert [page.index(part) for part in story] == sorted(page.index(part) for part in story)


def test_outputs_are_those_of_the_sample_with_the_usual_parameters(tmp_path, monkeypatch):
    """A later run of the same code on other data, or of a few pictures, is not put into the committed notebook."""
    new, path, usual = nbformat.v4, tmp_path / "notebooks/03_rec.ipynb", {"DATASET": "refshapes", "OUT_DIR": "x"}
    shutil.copytree(ROOT / "notebooks/params", tmp_path / "notebooks/params")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    notebook = new.new_notebook(cells=[new.new_code_cell("1 + 1")], metadata=KERNEL)
    nbformat.write(notebook, path)
    runs = [(given, "now", None) for given in (usual, usual, {"LIMIT": 4}, {"DATASET": "refcoco"})]
    runs += [(usual, None, None), (usual, "now", True)]  # one that was killed, one that failed
    for number, (given, end, failed) in enumerate(runs):
        run = tmp_path / f"runs/{9 - number}/03_rec.ipynb"
        run.parent.mkdir(parents=True)
        notebook.metadata["papermill"] = {"end_time": end, "exception": failed, "parameters": given}
        notebook.cells[0].outputs = [new.new_output("stream", text=f"run {number}")]
        nbformat.write(notebook, run)
        os.utime(run, (number, number))
    render.main("outputs")
    assert read(path).cells[0].outputs[0].text == "run 1" and "papermill" not in read(path).metadata
    notebook.cells[0].source = "1 + 2"
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match="03_rec.ipynb: no finished run of this code"):
        render.main("outputs")


def test_pictures_are_made_as_small_as_they_must_be_and_no_smaller():
    noise, sizes = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)), []
    for side in (600, 200):
        noise.resize((side, side)).save(file := io.BytesIO(), "PNG")
        done = base64.b64decode(render.small(base64.b64encode(file.getvalue()).decode()))
        sizes.append(Image.open(io.BytesIO(done)).width)
        assert len(done) <= render.MOST_PICTURE_BYTES and (done == file.getvalue()) == (side == 200)
    assert sizes == [337, 200]  # of 450 pixels a side it would still be too large
