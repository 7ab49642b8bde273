"""Outputs into the committed notebooks, and a page of all figures: `make figures` writes the page, `make render` both.

Nothing is executed here: outputs are those of the newest run in `runs/` that has the committed notebook's code.

    python notebooks/render.py page figures/sample figures/real   # a README.md in each folder of figures
    python notebooks/render.py outputs                            # outputs into notebooks/*.ipynb, to be committed
"""

import base64
import hashlib
import io
import json
import re
import sys
from html import escape
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor
from PIL import Image

from bsap_utils import ROOT
from bsap_utils.datasets import write_file

MAIN_TABLES = {
    "table_rec.csv": ["split", "method", "n", "accuracy", "ci_low", "ci_high", "delta_vs_clip", "p_holm"],
    "table_ris.csv": ["split", "method", "n", "oiou", "miou", "p50", "delta_miou_vs_clip"],
    "table_retrieval.csv": ["split", "method", "n", "recall_1", "recall_5", "recall_10", "median_rank"],
    "table_real_scores.csv": ["scores", "method", "temperature", "recall_1", "delta", "ci_low", "ci_high"],
}
MOST_PICTURE_BYTES = 150_000
WIDGET = "application/vnd.jupyter.widget-view+json"


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """Return a hash of a notebook's code, less what papermill put in: outputs belong to the code that made them."""
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells that a person wrote."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def small(png: str) -> str:
    """Return a PNG (base64) as it is, or dithered to 128 colours and, where that is not enough, at three quarters of its size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    while len(png) * 3 / 4 > MOST_PICTURE_BYTES:
        few = picture.quantize(palette=picture.quantize(128, Image.Quantize.MAXCOVERAGE))
        few.save(buffer := io.BytesIO(), "PNG", optimize=True)
        png = base64.b64encode(buffer.getvalue()).decode()
        picture = picture.resize([side * 3 // 4 for side in picture.size], Image.Resampling.LANCZOS)
    return png


def clean(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return an output as it is to be committed: no widgets, no progress bars, no random names, no large pictures."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type == "error":
        raise ValueError(f"{output.ename}: {output.evalue}")
    if WIDGET in output.data:
        return None
    output.metadata = {}
    if "text/html" in output.data:
        names = re.findall(r"\bT_[0-9a-f]{5}", output.data["text/html"])
        for number, name in enumerate(dict.fromkeys(names)):  # pandas names a styled table at random
            output.data["text/html"] = output.data["text/html"].replace(name, f"T_{number}")
    if "image/png" in output.data:
        output.data = nbformat.from_dict({"image/png": small(output.data["image/png"])})
    return output


def with_outputs(notebook: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return `notebook` with the outputs of `executed`, which ran the same code; cells tagged `volatile` keep none.

    Raises ValueError for a notebook that ended in an error.
    """
    executed, _ = TagRemovePreprocessor(remove_all_outputs_tags={"volatile"}, enabled=True).preprocess(executed, {})
    result, _ = ClearOutputPreprocessor().preprocess(nbformat.from_dict(json.loads(json.dumps(notebook))), {})
    for number, (cell, done) in enumerate(zip(code_cells(result), code_cells(executed), strict=True), 1):
        cell.execution_count = number
        cell.outputs = [kept for output in done.outputs if (kept := clean(output))]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    result.metadata = nbformat.from_dict(
        {"kernelspec": notebook.metadata.kernelspec, "bsap": {"made_with": fingerprint(notebook)}}
    )
    return result


def newest_run(path: Path, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the newest finished run of a notebook's code on the sample in `runs/`. ValueError where there is none."""
    sample = yaml.safe_load((ROOT / "notebooks/params/sample.yaml").read_text())["all"]
    for file in sorted(ROOT.glob(f"runs/*/{path.name}"), key=lambda file: file.stat().st_mtime, reverse=True):
        executed = nbformat.read(file, as_version=4)
        marks = executed.metadata.get("papermill", {})
        given = marks.get("parameters", {}).items()
        as_usual = all(name == "OUT_DIR" or sample.get(name) == value for name, value in given)
        finished = marks.get("end_time") and not marks.get("exception")
        if finished and as_usual and fingerprint(executed) == fingerprint(notebook):
            return executed
    raise ValueError(f"{path.name}: no finished run of this code is in runs/. `make render` makes one.")


def markdown_table(table: pd.DataFrame) -> str:
    """Return a frame as a Markdown table; what comes from data is escaped."""
    cells = [list(table.columns), ["---"] * len(table.columns), *table.astype(object).fillna("–").to_numpy().tolist()]
    return "\n".join("| " + " | ".join(escape(str(cell)).replace("|", "\\|") for cell in row) + " |" for row in cells)


def results_page(folder: Path) -> str:
    """Return the page of a folder of figures: by notebook, as it tells them, its main table and figures with captions."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    lines = [f"# Results: {folder.name}", "", "Written by the run; `manifest.json` says what made each file."]
    for path in sorted({entry["notebook"] for entry in manifest.values()}):
        cells = nbformat.read(ROOT / path, as_version=4).cells if (ROOT / path).is_file() else []
        text = "\n".join([cell.source for cell in cells] or [path])
        title = text.partition("\n")[0].removeprefix("# ")
        lines += ["", f"## [{title}](../../{path})"]
        names = [name for name, entry in manifest.items() if entry["notebook"] == path]
        for name in sorted(names, key=lambda name: text.find(f'"{Path(name).stem}')):
            if name in MAIN_TABLES:
                table = pd.read_csv(folder / name)
                lines += ["", markdown_table(table[[column for column in MAIN_TABLES[name] if column in table]])]
            elif name.endswith(".png"):
                caption = escape(Image.open(folder / name).info.get("Description", ""))
                lines += ["", f"![{caption}]({name})", "", caption]
    return "\n".join(lines) + "\n"


def main(what: str, *folders: str) -> None:
    """Write the pages of `folders`, or the outputs of all notebooks: each when all are in order."""
    written: dict[Path, str] = {}
    if what == "page":
        written = {
            Path(folder) / "README.md": results_page(Path(folder)) for folder in folders if Path(folder).is_dir()
        }
    else:
        for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            written[path] = nbformat.writes(with_outputs(notebook, newest_run(path, notebook))) + "\n"
    for path, text in written.items():
        write_file(path, text.encode())
        print(f"{path.name}: {len(text.encode()) / 1000:,.0f} kB")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"render: {error}")
