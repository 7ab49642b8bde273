"""The results page of a run, and the table in the README."""

import json

import pandas as pd
import pytest

from bsap_utils import ROOT, results


@pytest.fixture
def folder(tmp_path):
    entry = {"notebook": "notebooks/03_rec.ipynb", "parameters": {"DATASET": "refshapes"}}
    files = ["fig_rec.png", "fig_rec.svg", "fig_own_thing.png", "table_rec.csv"]
    (tmp_path / "manifest.json").write_text(json.dumps({name: entry for name in files}))
    table = {"split": ["val", "test"], "method": ["clip", "bsap"], "n": [9, 9], "accuracy": [50.25, 40.0]}
    rest = {"ci_low": [1.0, 2.0], "ci_high": [3.0, 4.0], "delta_vs_clip": [0.0, -1.0], "p_value": [1.0, 0.5]}
    pd.DataFrame(table | rest).to_csv(tmp_path / "table_rec.csv", index=False)
    return tmp_path


def test_the_page_has_every_figure_and_the_tables(folder):
    results.write_results_page(folder)
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert f"![{results.CAPTIONS['fig_rec']}](fig_rec.png)" in page and "![Own thing.](fig_own_thing.png)" in page
    assert "| val | CLIP | 9 | 50.25 |" in page and "no" in page and "claim about RefCOCO" in page
    assert "fig_rec.svg" not in page and not list(folder.glob("*.part"))


def test_the_last_split_is_pasted_between_the_markers(folder):
    readme = folder / "page.md"
    readme.write_text("before\n<!-- table_rec -->\nold\n<!-- /table_rec -->\nafter\n")
    table = pd.read_csv(folder / "table_rec.csv")
    for _ in range(2):  # pasting again changes nothing
        results.paste_table(readme, table)
        text = readme.read_text()
        assert text.startswith("before\n<!-- table_rec -->\n| split |") and text.endswith(
            "<!-- /table_rec -->\nafter\n"
        )
        assert "| test | BSAP | 9 | 40.0 |" in text and "old" not in text and "| val |" not in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="put them back"):
        results.paste_table(readme, table)


def test_the_readmes_table_is_that_of_the_committed_run():
    table = pd.read_csv(ROOT / "figures/sample/table_rec.csv")
    last = table[table["split"] == table["split"].iloc[-1]][results.COLUMNS["table_rec.csv"]]
    assert results.markdown_table(last) in (ROOT / "README.md").read_text(encoding="utf-8")
