"""Rendered notebooks: what may stand in a commit, how it gets there, and whether the committed ones are in order."""

import base64
import copy
import io
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from bsap_utils import ROOT, cli, readings, render, results

NOTEBOOKS = {path: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SAMPLE = render.sample_parameters(list(NOTEBOOKS))
RENDERED = [path for path in NOTEBOOKS if render.numbered(path)]
stems = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def png(width: int, height: int, noise: bool = False) -> bytes:
    """A grey picture, or one of noise, that no PNG can make small."""
    pixels = (
        np.random.default_rng(0).integers(0, 256, (height, width, 3)) if noise else np.full((height, width, 3), 128)
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shown(**data) -> nbformat.NotebookNode:
    kinds = {
        "png": "image/png",
        "html": "text/html",
        "plain": "text/plain",
        "widget": render.WIDGET,
        "markdown": "text/markdown",
    }
    return new_output(
        "display_data", {kinds[kind]: value for kind, value in data.items()}, metadata={"needs_background": "light"}
    )


PICTURE = base64.b64encode(png(40, 30)).decode()
PARAMETERS = {"SIZE": 3, "NAME": "b"}
OUTPUTS = {
    'plotting.save(figure, "x")': [
        new_output("stream", name="stderr", text="\r Encoding:  50%|#####     | 1/2 [00:01<00:01]"),
        shown(widget={"model_id": "ab"}, plain="Encoding: 0%"),
        shown(png=PICTURE, plain="<Figure size 770x300 with 1 Axes>"),
    ],
    "table": [shown(html='<style>#T_0a1b2_row0 {}</style><table id="T_0a1b2">', plain="<Styler at 0x7f12ab>"),
              shown(html='<table id="T_ffff0">')],
    "timing": [new_output("stream", name="stdout", text="12.5 ms"), shown(png=PICTURE),
               new_output("stream", name="stderr", text="a log of a library")],
    "value": [new_output("execute_result", {"text/plain": "<object at 0x7f00aa12>"}, execution_count=9)],
    "explorer": [shown(widget={"model_id": "cd"}, plain="interactive(...)"), shown(png=PICTURE, widget={"model_id": "ef"})],
}  # fmt: skip


def written() -> nbformat.NotebookNode:
    """A notebook as its author commits it."""
    first = "# 07 · Title: and more\n\n**Question.** Why?\n\n<!-- answer -->\nold\n<!-- /answer -->"
    cells = [new_markdown_cell(first, id="first"),
             new_code_cell('SIZE = 3  # of it\nNAME = "a"  # its name\nOUT_DIR = ""  # where', id="parameters",
                           metadata={"tags": ["parameters"]})]  # fmt: skip
    for number, source in enumerate(OUTPUTS):
        tags = {"tags": ["volatile"]} if source == "timing" else {}
        cells.append(new_code_cell(source, id=f"code{number}", metadata=tags))
    return new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )


def executed(parameters: dict = PARAMETERS) -> nbformat.NotebookNode:
    """The same as papermill leaves it in runs/."""
    notebook = nbformat.from_dict(json.loads(json.dumps(written())))
    notebook.cells.insert(2, new_code_cell('SIZE = 3\nNAME = "b"', metadata={"tags": ["injected-parameters"]}))
    for count, cell in enumerate(notebook.cells[1:], 1):
        cell.execution_count, cell.metadata["papermill"] = count, {"duration": 0.123}
        cell.outputs = copy.deepcopy(OUTPUTS.get(cell.source, []))
    notebook.metadata["widgets"] = {"state": "x" * 1000}
    given = {**parameters, "OUT_DIR": "runs/x"}
    notebook.metadata["papermill"] = {"parameters": given, "end_time": "2026-01-01", "exception": None}
    return notebook


@pytest.fixture
def rendered():
    notebook = render.with_outputs(written(), executed(), PARAMETERS)
    assert render.problems(notebook, False, PARAMETERS) == []
    return notebook


def test_outputs_are_taken_and_cleaned_and_sources_stay(rendered):
    assert [(c.source, c.metadata, c.id) for c in rendered.cells] == [
        (c.source, c.metadata, c.id) for c in written().cells
    ]
    assert [c.execution_count for c in rendered.cells[1:]] == [1, 2, 3, 4, 5, 6]
    figure, table, timing, value, explorer = (cell.outputs for cell in rendered.cells[2:])
    assert [list(output.data) for output in figure + explorer] == [["image/png"]] * 2
    assert (
        "".join(output.data["text/html"] for output in table).count("T_00000") == 2
        and "T_00001" in table[1].data["text/html"]
    )
    assert timing[0].data == {"text/markdown": render.LEFT_OUT} and len(timing) == 1
    assert value[0].data == {"text/plain": "<object>"}
    assert set(rendered.metadata) == {"kernelspec", "bsap"} and not any(output.metadata for output in figure + explorer)
    nbformat.validate(rendered)


def test_text_may_be_written_after_the_run():
    later = written()
    later.cells.insert(3, new_markdown_cell("A paragraph more.", id="more"))
    result = render.with_outputs(later, executed(), PARAMETERS)
    assert render.problems(result, False, PARAMETERS) == [] and result.cells[4].outputs


def test_the_same_run_gives_the_same_bytes_and_another_one_differs_in_numbers_only(rendered):
    again = executed()
    for output in (
        output for cell in again.cells[1:] for output in cell.outputs if "text/html" in output.get("data", {})
    ):
        output.data["text/html"] = output.data["text/html"].replace("T_0a1b2", "T_99999").replace("T_ffff0", "T_12345")
    assert nbformat.writes(render.with_outputs(written(), again, PARAMETERS)) == nbformat.writes(rendered)
    assert nbformat.writes(render.with_outputs(rendered, executed(), PARAMETERS)) == nbformat.writes(rendered)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (new_output("stream", name="stderr", text="FutureWarning: soon"), "warning on stderr: FutureWarning"),
        (new_output("error", ename="KeyError", evalue="'x'", traceback=[]), "KeyError: 'x'"),
    ],
)
def test_errors_and_warnings_are_not_hidden(output, message):
    run = executed()
    run.cells[3].outputs = [output]
    with pytest.raises(ValueError, match=rf"cell \[2\] has .*{message}"):
        render.with_outputs(written(), run, PARAMETERS)


def test_an_error_in_a_volatile_cell_is_not_hidden_either():
    run = executed()
    run.cells[5].outputs.append(new_output("error", ename="KeyError", evalue="'x'", traceback=[]))
    with pytest.raises(ValueError, match=r"cell \[4\] has KeyError"):
        render.with_outputs(written(), run, PARAMETERS)


@pytest.mark.parametrize("size", [(60, 40), (300, 200), (900, 700)])
def test_a_picture_is_made_to_fit_and_stays_a_picture(size):
    small, original = png(*size), png(*size, noise=True)
    assert render.fit(small) == ("image/png", small)
    kind, fitted = render.fit(original)
    picture = Image.open(io.BytesIO(fitted))
    assert len(fitted) <= render.MOST_PICTURE_BYTES and f"image/{picture.format.lower()}" == kind
    assert picture.size == size or size == (900, 700)
    assert np.asarray(picture.convert("RGB")).std() > 20


def test_a_photograph_keeps_its_small_bright_things_and_white_paper():
    noise = np.random.default_rng(0).normal(0, 10, (300, 400, 3))
    meadow = np.array([60, 110, 60]) + np.linspace(0, 120, 400)[:, None] * [0, 0.5, 1] + noise
    pixels = meadow.clip(0, 255).astype(np.uint8)
    pixels[:60] = 255
    pixels[100:110, 200:210] = 250, 210, 20  # a yellow thing of 100 pixels among 120,000
    picture = np.asarray(results.with_palette(Image.fromarray(pixels), 64).convert("RGB")).astype(int)
    assert (picture[:60] == 255).all()
    assert np.abs(picture[100:110, 200:210].mean((0, 1)) - [250, 210, 20]).max() < 12


def alter(notebook, what):
    """Break a rendered notebook in one way."""
    picture = notebook.cells[2].outputs[0]
    if what == "code":
        notebook.cells[3].source += "\nx = 1"
    elif what == "default":
        notebook.cells[1].source = notebook.cells[1].source.replace("3", "4")
    elif what == "never rendered":
        del notebook.metadata["bsap"]
    elif what == "error":
        notebook.cells[3].outputs.append(new_output("error", ename="E", evalue="", traceback=[]))
    elif what == "stderr":
        notebook.cells[3].outputs.append(new_output("stream", name="stderr", text="soon"))
    elif what == "counts":
        notebook.cells[3].execution_count = 9
    elif what == "no count":
        notebook.cells[3].execution_count = None
    elif what == "widget state":
        notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": "x" * 10_000}}
    elif what == "widget view":
        picture.data[render.WIDGET] = {"model_id": "a"}
    elif what == "large figure":
        picture.data["image/png"] = base64.b64encode(png(300, 300, noise=True)).decode()
    elif what == "no figure":
        notebook.cells[2].outputs, notebook.cells[6].outputs = [], []
    elif what == "large":
        notebook.cells[3].outputs.append(shown(html="x" * 2_000_001))
    elif what == "path":
        notebook.cells[3].outputs.append(new_output("stream", name="stdout", text="wrote to /home/someone/x.csv"))
    elif what == "path of Windows":
        notebook.cells[3].outputs.append(shown(html=r"in C:\Users\someone"))
    elif what == "papermill":
        notebook.cells[3].metadata["papermill"] = {"duration": 1}
    elif what == "injected":
        notebook.cells.insert(
            2, new_code_cell("SIZE = 3", execution_count=2, metadata={"tags": ["injected-parameters"]})
        )
    elif what == "volatile":
        notebook.cells[4].outputs = [new_output("stream", name="stdout", text="12.5 ms")]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code", "not those that its outputs"), ("default", "not those that its outputs"), ("error", "shows an error"),
        ("never rendered", "not those that its outputs"), ("stderr", "warning"), ("counts", "counts"), ("no count", "counts"),
        ("widget state", "widget"), ("widget view", "widget"), ("large figure", "a figure has 27"), ("no figure", "shows none"),
        ("large", "2,00"), ("path", "/home/s"), ("path of Windows", "C:"), ("papermill", "papermill"),
        ("injected", "papermill"), ("volatile", "volatile"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(rendered, what, said):
    alter(rendered, what)
    found = render.problems(rendered, False, PARAMETERS)
    assert any(said in problem for problem in found), found


def test_other_parameters_and_an_appendix_with_outputs_are_found(rendered):
    assert render.problems(rendered, False, PARAMETERS | {"SIZE": 5})
    assert render.problems(rendered, True, {}) and not render.problems(written(), True, {})


@pytest.mark.parametrize(
    "text", ["https://example.org/home/x", "a/tmp/b", "12/usr/3", "figures/sample/fig.png", "</opt/>"]
)
def test_what_only_looks_like_a_path_is_none(text):
    assert not render.ABSOLUTE.search(text)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clone with one notebook, an appendix and a finished sample run, between an older and an unfinished one."""
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for folder in ("notebooks/params", "figures/sample", *(f"runs/2026-01-0{day}" for day in range(1, 5))):
        (tmp_path / folder).mkdir(parents=True)
    nbformat.write(written(), tmp_path / "notebooks/07_title.ipynb")
    appendix = new_notebook(cells=[new_markdown_cell("# A1 · More"), new_code_cell("1")], metadata=written().metadata)
    nbformat.write(appendix, tmp_path / "notebooks/A1_more.ipynb")
    (tmp_path / "notebooks/params/sample.yaml").write_text("07_title: {NAME: b, SIZE: 3}")
    (tmp_path / "figures/sample/answer_07_title.md").write_text("It is **7**.\n")
    runs = [executed(), executed(), executed(PARAMETERS | {"SIZE": 4}), executed()]
    runs[0].cells[-1].outputs = runs[3].cells[-1].outputs = []
    runs[3].metadata.papermill["end_time"] = None
    for day, run in enumerate(runs, 1):
        nbformat.write(run, tmp_path / f"runs/2026-01-0{day}/07_title.ipynb")
    return tmp_path


def test_one_command_renders_everything_and_again_changes_nothing(repository):
    files = [repository / f"notebooks/{stem}.ipynb" for stem in ("07_title", "A1_more")]
    render.main()
    once = [file.read_bytes() for file in files]
    render.main()
    assert [file.read_bytes() for file in files] == once and not list(repository.glob("notebooks/.*"))
    numbered, appendix = (nbformat.reads(text.decode(), 4) for text in once)
    assert numbered.cells[-1].outputs, (
        "of four runs the second is the newest that has finished with the sample's parameters"
    )
    first = numbered.cells[0].source
    assert (
        "**Answer.** It is **7**.\n" in first and '`NAME = "b"`' in first and "old" not in first and "SIZE" not in first
    )
    assert "[A1 · More](A1_more.ipynb) →" in first and "← [07 · Title](07_title.ipynb)" in appendix.cells[0].source
    assert numbered.cells[1].source == written().cells[1].source and not appendix.cells[1].outputs
    assert render.problems(numbered, False, PARAMETERS) == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("code", "07_title.*no finished run"),
        ("answer", "answer_07_title"),
        ("error", "cell .6. has E: no"),
        ("appendix", "A1_more.*keeps no outputs"),
    ],
)
def test_where_one_cannot_be_rendered_none_is_changed(repository, broken, message):
    file = repository / "notebooks/07_title.ipynb"
    if broken == "code":
        changed = written()
        changed.cells[3].source = "other"
        nbformat.write(changed, file)
    elif broken == "answer":
        (repository / "figures/sample/answer_07_title.md").unlink()
    elif broken == "appendix":
        appendix = nbformat.read(repository / "notebooks/A1_more.ipynb", as_version=4)
        appendix.cells[1].outputs = [new_output("stream", name="stdout", text="x")]
        nbformat.write(appendix, repository / "notebooks/A1_more.ipynb")
    else:
        run = executed()
        run.cells[-1].outputs = [new_output("error", ename="E", evalue="no", traceback=[])]
        nbformat.write(run, repository / "runs/2026-01-02/07_title.ipynb")
    before = {path: path.read_bytes() for path in repository.glob("notebooks/*") if path.is_file()}
    with pytest.raises(SystemExit, match=message):
        render.main()
    assert {path: path.read_bytes() for path in repository.glob("notebooks/*") if path.is_file()} == before


@stems
def test_committed_notebooks_are_fit_to_be_read(path):
    assert render.problems(NOTEBOOKS[path], not render.numbered(path), SAMPLE[path.stem]) == []


@stems
def test_committed_links_lead_to_the_neighbours(path):
    assert render.with_links(NOTEBOOKS[path], path, NOTEBOOKS) == NOTEBOOKS[path].cells[0].source


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_committed_answers_are_those_of_the_committed_run(path):
    first = NOTEBOOKS[path].cells[0].source
    if "<!-- answer -->" not in first:
        pytest.skip("its answer needs no numbers")
    answer = (ROOT / f"figures/sample/answer_{path.stem}.md").read_text(encoding="utf-8")
    assert results.paste(first, "answer", render.answer_block(answer, SAMPLE[path.stem], cli.declared(path))) == first
    texts = [output.data.get("text/markdown", "") for cell in NOTEBOOKS[path].cells for output in cell.get("outputs", [])
             if "data" in output]  # fmt: skip
    assert any(answer.strip() in text for text in texts), (
        "the notebook's own output and figures/sample come from one run"
    )


def test_committed_answers_follow_from_the_committed_tables():
    table = {p.stem[6:]: pd.read_csv(p, index_col=None) for p in (ROOT / "figures/sample").glob("table_*.csv")}
    indexed = [table[name].set_index(table[name].columns[0]) for name in ("variance", "mean_removed", "bias_sees")]
    built = {
        "01_similarity_range": readings.range_answer(*indexed, ("refshapes", "val"), "categories"),
        "02_bsap_method": readings.family_answer(table["family_test"], "refshapes", "val", "test"),
        "03_rec": readings.rec_answer(table["rec"]),
        "04_ris": readings.ris_answer(table["ris"]),
        "05_ablations": readings.choice_answer(table["ablation_choice"], "refshapes", "val", "test"),
        "06_retrieval": readings.retrieval_answer(table["retrieval"]),
    }
    committed = {
        stem: (ROOT / f"figures/sample/answer_{stem}.md").read_text(encoding="utf-8").strip() for stem in built
    }
    assert built == committed
