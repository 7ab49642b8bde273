"""The results page of a run, and the generated parts of the README."""

import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook
from PIL import Image

from bsap_utils import ROOT, results


@pytest.fixture
def folder(tmp_path):
    entry = {"notebook": "notebooks/03_rec.ipynb", "parameters": {"DATASET": "refshapes"}}
    files = ["fig_rec.png", "fig_rec.svg", "fig_own_thing.png", "table_rec.csv"]
    (tmp_path / "manifest.json").write_text(json.dumps({name: entry for name in files}))
    table = {"split": ["val", "test"], "method": ["clip", "bsap"], "n": [9, 9], "accuracy": [50.25, 40.0]}
    rest = {"ci_low": [1.0, 2.0], "ci_high": [3.0, 4.0], "delta_vs_clip": [0.0, -1.0], "p_value": [1.0, 0.5],
            "delta_ci_low": [0.0, -3.0], "delta_ci_high": [0.0, 2.0]}  # fmt: skip
    pd.DataFrame(table | rest).to_csv(tmp_path / "table_rec.csv", index=False)
    return tmp_path


def test_the_page_has_every_figure_and_the_tables(folder):
    results.write_results_page(folder)
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert f"![{results.CAPTIONS['fig_rec']}](fig_rec.png)" in page and "![Own thing.](fig_own_thing.png)" in page
    assert "| val | CLIP | 9 | 50.25 |" in page and "no" in page and "claim about RefCOCO" in page
    assert "fig_rec.svg" not in page and not list(folder.glob("*.part"))


def test_the_answer_of_a_notebook_opens_its_section(folder):
    (folder / "answer_03_rec.md").write_text("CLIP is **right**.\n")
    results.write_results_page(folder)
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "03_rec.ipynb)\n\nCLIP is **right**.\n\n![Own thing.]" in page


def test_the_last_split_is_pasted_between_the_markers(folder):
    table = pd.read_csv(folder / "table_rec.csv")
    text = "before\n<!-- table_rec -->\nold\n<!-- /table_rec -->\nafter\n"
    for _ in range(2):  # pasting again changes nothing
        text = results.paste(text, "table_rec", results.rec_block(table))
        assert text.startswith("before\n<!-- table_rec -->\n| method | accuracy, % |") and text.endswith(
            "<!-- /table_rec -->\nafter\n"
        )
        assert (
            "| BSAP | 40.0 | 2.0 to 4.0 | -1.0 | -3.0 to +2.0 | 0.5 |" in text
            and "old" not in text
            and "| CLIP |" not in text
        )
    for damaged in ("no markers", "<!-- table_rec -->\nno end", "no start <!-- /table_rec -->"):
        with pytest.raises(ValueError, match="put them back"):
            results.paste(damaged, "table_rec", "new")


@pytest.fixture
def clone(tmp_path):
    """A repository with three notebooks, of which two have figures: one of noise, one of a few colours."""
    (tmp_path / "notebooks").mkdir()
    firsts = {"01_one": "# 01 · One: more\n\n**Question.** Is a | b\ntrue? So.", "02_two": "# 02 · Two\n\n**Question.** Why?",
              "A1_more": "# A1 · More\n\n**Question.** How? Why?"}  # fmt: skip
    for stem, text in firsts.items():
        nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), tmp_path / f"notebooks/{stem}.ipynb")
    folder = tmp_path / "figures/sample"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "fig_b.png")
    Image.new("RGB", (400, 900), "red").save(folder / "fig_a.png")
    Image.new("RGB", (400, 300), "blue").save(folder / "fig_c.png")
    made = {
        "fig_a.png": "02_two",
        "fig_b.png": "01_one",
        "fig_c.png": "02_two",
        "fig_c.svg": "02_two",
        "table.csv": "01_one",
    }
    manifest = {name: {"notebook": f"notebooks/{stem}.ipynb"} for name, stem in made.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_thumbnails_are_small_whole_and_of_the_named_figure(clone, monkeypatch):
    folder = clone / "figures/sample"
    monkeypatch.setitem(results.THUMBNAILS, "02_two", "fig_c")
    results.write_thumbnails(folder)
    thumbs = {path.name: Image.open(path) for path in folder.glob("thumb_*")}
    assert sorted(thumbs) == ["thumb_01_one.png", "thumb_02_two.png"] and not list(folder.glob("*.part"))
    assert (
        thumbs["thumb_01_one.png"].size == (200, 150)
        and thumbs["thumb_02_two.png"].convert("RGB").getpixel((9, 9))[2] > 200
    )
    assert all((folder / name).stat().st_size <= 30_000 for name in thumbs)
    results.write_thumbnails(folder, most=20_000)
    assert (folder / "thumb_01_one.png").stat().st_size <= 20_000
    results.write_thumbnails(folder)
    first = [path.read_bytes() for path in sorted(folder.glob("thumb_*"))]
    monkeypatch.delitem(results.THUMBNAILS, "02_two")
    results.write_thumbnails(folder)
    again = [path.read_bytes() for path in sorted(folder.glob("thumb_*"))]
    assert again[0] == first[0] and again[1] != first[1], "without a name the first figure, fig_a, stands for it"


def test_the_list_of_notebooks_links_each_with_its_question(clone):
    results.write_thumbnails(clone / "figures/sample")
    lines = results.notebooks_block(clone / "notebooks", clone / "figures/sample").splitlines()
    one, two, more = lines[2:]
    assert one == ("| [01 · One](notebooks/01_one.ipynb) | Is a \\| b true? | "
                   "[![01 · One](figures/sample/thumb_01_one.png)](notebooks/01_one.ipynb) |")  # fmt: skip
    assert "| Why? | [![02" in two and more == "| [A1 · More](notebooks/A1_more.ipynb) | How? |  |"
    for target in re.findall(r"\(([^)]+)\)", "".join(lines)):
        assert (clone / target).is_file()
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 03 · Three")]), clone / "notebooks/03_three.ipynb")
    with pytest.raises(ValueError, match="03_three"):
        results.notebooks_block(clone / "notebooks", clone / "figures/sample")


def test_the_generated_parts_of_the_readme_are_those_of_the_committed_run():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.refreshed(readme, ROOT / "figures/sample") == readme


def test_the_readmes_answers_and_parameters_are_whole(tmp_path):
    (tmp_path / "answer_03_rec.md").write_text("Yes.\n")
    (tmp_path / "answer_01_similarity_range.md").write_text("No.\n")
    block = results.answers_block(tmp_path)
    assert block == "**[01](notebooks/01_similarity_range.ipynb)** No.\n\n**[03](notebooks/03_rec.ipynb)** Yes."
    lines = results.parameters_block(ROOT / "notebooks/03_rec.ipynb").splitlines()
    assert "| `TEMPERATURE` | `1.0` | of BSAP and BSAP-H |" in lines and all(line.count("|") == 4 for line in lines)


def test_the_committed_thumbnails_and_the_hero_are_small():
    folder = ROOT / "figures/sample"
    thumbnails = list(folder.glob("thumb_*.png"))
    assert len(thumbnails) >= 5 and all(path.stat().st_size <= 30_000 for path in thumbnails)
    assert all((folder / f"fig_hero.{kind}").stat().st_size <= 300_000 for kind in ("png", "svg"))
    missing = [stem for stem, name in results.THUMBNAILS.items() if not (folder / f"{name}.png").exists()]
    assert not missing, "a thumbnail is named after a figure that the run does not make"
