"""Notebooks with the sample run's outputs in them, to be read on a code host: what `make render` does after `make figures`.

Nothing is executed here. Of the executed notebooks that `bsap run` leaves in `runs/`, the newest is taken that has the code of
the committed one and the parameters of `notebooks/params/sample.yaml`; its outputs go into `notebooks/*.ipynb`, whose
first cell gets the answer of that run (between `<!-- answer -->` and `<!-- /answer -->`) and links to its neighbours. Appendices
(A1, …) are not part of the sample run: they get the links only, and keep no outputs.

What changes from run to run has no place in a commit: a cell with the tag `volatile` (timings, memory) keeps a line that says so
instead of its outputs, widgets are dropped (a static picture beside them stays), and so are progress bars.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from PIL import Image

from . import ROOT, cli
from .plotting import with_palette
from .results import paste

SAMPLE = Path("notebooks/params/sample.yaml")
MOST_BYTES, MOST_PICTURE_BYTES = 2_000_000, 150_000
WIDGET = "application/vnd.jupyter.widget-view+json"
RICH = ("image/", "text/html", "text/markdown", "text/latex")
PROGRESS = re.compile(r"\d+%\||\d+it \[")  # what tqdm writes
ABSOLUTE = re.compile(
    r"(?<![\w.:/<\"'])/(?:home|root|work|Users|tmp|usr|opt|var|mnt|srv|private)/\w|\b[A-Z]:\\\\?\w|file:///"
)
LEFT_OUT = "*Not kept here, for it changes from run to run: run the notebook to see it.*"


def numbered(path: Path) -> bool:
    """Whether a notebook is part of the sample run, as `bsap run --all` sees it; the others are appendices."""
    return path.stem[:2].isdigit()


def sample_parameters(notebooks: list[Path]) -> dict[str, dict[str, Any]]:
    """Return what `sample.yaml` sets in each notebook, by stem."""
    known = {path.stem: cli.declared(path) for path in notebooks}
    content = cli.read_params(ROOT / SAMPLE, known)
    return {stem: cli.settings(stem, content["all"] | content.get(stem, {}), known[stem]) for stem in known}


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells, less what papermill put in."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def fingerprint(notebook: NotebookNode, parameters: dict[str, Any]) -> str:
    """Return the hash of all that outputs depend on in the notebook itself: code and parameters."""
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps([sources, parameters], sort_keys=True).encode()).hexdigest()


def fit(png: bytes, most: int = MOST_PICTURE_BYTES) -> tuple[str, bytes]:
    """Return a PNG as it is, or as a picture of at most `most` bytes: a palette, else JPEG, else smaller; with its MIME type."""
    if len(png) <= most:
        return "image/png", png
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    tries: list[tuple[Image.Image, str, dict[str, Any]]] = [(with_palette(picture, 256), "PNG", {"optimize": True})]
    tries += [(picture, "JPEG", {"quality": quality, "subsampling": 0}) for quality in (90, 80, 70)]
    for encoded, kind, how in tries:
        buffer = io.BytesIO()
        encoded.save(buffer, kind, **how)
        if buffer.tell() <= most:
            return f"image/{kind.lower()}", buffer.getvalue()
    buffer = io.BytesIO()
    picture.resize([side * 3 // 4 for side in picture.size], Image.Resampling.LANCZOS).save(buffer, "PNG")
    return fit(buffer.getvalue(), most)


def clean(output: NotebookNode, styles: dict[str, str]) -> NotebookNode | None:
    """Return an output without what is of one machine, one run or one session; None where nothing is left.

    `styles` numbers the random names that pandas gives to styled tables, in the order of the notebook. Raises ValueError for
    an error, and for anything on stderr but progress bars: a warning is to be mended, not to be hidden.
    """
    if output.output_type == "error":
        raise ValueError(f"{output.ename}: {output.evalue}")
    if output.output_type == "stream":
        if output.name == "stderr" and not PROGRESS.search(output.text):
            raise ValueError(f"a warning on stderr: {output.text.strip()[:300]}")
        return nbformat.v4.new_output("stream", name="stdout", text=output.text) if output.name == "stdout" else None
    kept = {kind: value for kind, value in output.data.items() if kind.startswith(RICH)}
    if not kept and WIDGET not in output.data:
        kept = {"text/plain": re.sub(r" at 0x[0-9a-f]+", "", output.data.get("text/plain", ""))}
    if "text/html" in kept:
        named = re.compile(r"\bT_[0-9a-f]{5}")
        kept["text/html"] = named.sub(lambda m: styles.setdefault(m[0], f"T_{len(styles):05}"), kept["text/html"])
    if "image/png" in kept:
        kind, picture = fit(base64.b64decode(kept.pop("image/png")))
        kept[kind] = base64.b64encode(picture).decode()
    return nbformat.v4.new_output("display_data", kept) if kept else None


def with_outputs(notebook: NotebookNode, executed: NotebookNode, parameters: dict[str, Any]) -> NotebookNode:
    """Return the notebook with the cleaned outputs of `executed`, which ran the same code with `parameters`.

    Its cells and their metadata stay as they are; the notebook's metadata keep the kernel and, in `bsap`, the fingerprint.
    Raises ValueError, with the cell, for an output that may not be committed.
    """
    result, styles = nbformat.from_dict(json.loads(json.dumps(notebook))), dict[str, str]()
    made_with = {"made_with": fingerprint(notebook, parameters)}
    result.metadata = nbformat.from_dict({"kernelspec": notebook.metadata.kernelspec, "bsap": made_with})
    count = 0
    for cell, done in zip(code_cells(result), code_cells(executed), strict=True):
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        volatile = "volatile" in cell.metadata.get("tags", [])
        outputs = [output for output in done.outputs if output.output_type == "error" or not volatile]
        try:
            cell.outputs = [kept for output in outputs if (kept := clean(output, styles))]
        except ValueError as e:
            raise ValueError(f"cell [{count}] has {e}") from None
        if volatile and done.outputs:
            cell.outputs = [nbformat.v4.new_output("display_data", {"text/markdown": LEFT_OUT})]
    return result


def answer_block(answer: str, parameters: dict[str, Any], declared: cli.Parameters) -> str:
    """Return the generated part of a first cell: the answer, and with which parameters it and the outputs were made."""
    others = [f"`{n} = {json.dumps(v)}`" for n, v in parameters.items() if v != declared[n].default]
    differing = f", but {' and '.join(others)}" if others else ""
    return (f"**Answer.** {answer.strip()}\n\n*The answer and all outputs are those of the sample run, with the parameters that "
            f"stand below{differing}. The sample is a model of the problem: no number is a claim about RefCOCO.*")  # fmt: skip


def title(notebook: NotebookNode) -> str:
    """Return the heading of a notebook, without what follows a colon."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ").split(": ")[0]


def with_links(notebook: NotebookNode, path: Path, notebooks: dict[Path, NotebookNode]) -> str:
    """Return the first cell with links to the notebooks before and after it, added at its end where it had none."""
    order = list(notebooks)
    place = order.index(path)
    before, after = order[:place][-1:], order[place + 1 : place + 2]
    links = [f"← [{title(notebooks[other])}]({other.name})" for other in before]
    links += ["[all figures and tables](../figures/sample/README.md)"]
    links += [f"[{title(notebooks[other])}]({other.name}) →" for other in after]
    source = notebook.cells[0].source
    if "<!-- links -->" not in source:
        source += "\n\n<!-- links -->\n<!-- /links -->"
    return paste(source, "links", " · ".join(links))


def problems(notebook: NotebookNode, appendix: bool, parameters: dict[str, Any]) -> list[str]:
    """Return what is wrong with a notebook that is to be committed, in words; nothing where it is fit to be read."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    data = [(kind, value) for output in outputs for kind, value in output.get("data", {}).items()]
    found = []
    if appendix:
        return ["an appendix keeps no outputs"] if outputs else []
    if notebook.metadata.get("bsap", {}).get("made_with") != fingerprint(notebook, parameters):
        found.append("its code or its parameters are not those that its outputs were made with")
    if [c.execution_count for c in cells if c.source.strip()] != list(
        range(1, sum(bool(c.source.strip()) for c in cells) + 1)
    ):
        found.append("its execution counts are not 1, 2, 3, …")
    if any(output.output_type == "error" for output in outputs):
        found.append("a cell shows an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("a cell shows a warning or a progress bar (stderr)")
    if "widgets" in notebook.metadata or any(kind == WIDGET for kind, _ in data):
        found.append("it holds the state or the view of a widget")
    large = [len(base64.b64decode(value)) for kind, value in data if kind.startswith("image/")]
    if any(size > MOST_PICTURE_BYTES for size in large):
        found.append(f"a figure has {max(large):,} bytes, more than {MOST_PICTURE_BYTES:,}")
    if not large and any("plotting.save(" in cell.source for cell in cells):
        found.append("it saves figures and shows none")
    texts = [output.text for output in outputs if "text" in output] + [v for k, v in data if k.startswith("text/")]
    paths = [match[0] for text in [*texts, json.dumps(notebook.metadata)] for match in ABSOLUTE.finditer(text)]
    if paths:
        found.append(f"its outputs or metadata have a path of one machine: {paths[0]}…")
    marked = any("papermill" in part.metadata for part in (notebook, *notebook.cells))
    if marked or len(code_cells(notebook)) < len(cells):
        found.append("papermill's marks are in it")
    if any("volatile" in c.metadata.get("tags", []) and c.outputs and LEFT_OUT not in str(c.outputs) for c in cells):
        found.append("a volatile cell has kept its output")
    size = len(nbformat.writes(notebook).encode())
    if size > MOST_BYTES:
        found.append(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
    return found


def newest_run(path: Path, notebook: NotebookNode, parameters: dict[str, Any]) -> NotebookNode:
    """Return the newest finished run of that code with those parameters; ValueError where there is none."""
    for file in sorted(ROOT.glob(f"runs/*/{path.name}"), reverse=True):
        executed = nbformat.read(file, as_version=4)
        marks = executed.metadata.get("papermill", {})
        given = {name: value for name, value in marks.get("parameters", {}).items() if name != "OUT_DIR"}
        finished = marks.get("end_time") and not marks.get("exception")
        if finished and fingerprint(executed, given) == fingerprint(notebook, parameters):
            return executed
    raise ValueError("no finished run of this code with the sample's parameters is in runs/; make render makes one")


def main() -> None:
    """Render all notebooks, or none: each is written when all have been found to be in order."""
    notebooks = {path: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    sample = sample_parameters(list(notebooks))
    rendered = {}
    for path, notebook in notebooks.items():
        appendix, parameters = not numbered(path), sample[path.stem]
        try:
            result = notebook
            if not appendix:
                result = with_outputs(notebook, newest_run(path, notebook, parameters), parameters)
            if "<!-- answer -->" in notebook.cells[0].source and not appendix:
                answer = (ROOT / f"figures/sample/answer_{path.stem}.md").read_text(encoding="utf-8")
                block = answer_block(answer, parameters, cli.declared(path))
                result.cells[0].source = paste(result.cells[0].source, "answer", block)
            result.cells[0].source = with_links(result, path, notebooks)
            wrong = problems(result, appendix, parameters)
        except (ValueError, OSError) as e:
            wrong = [str(e)]
        if wrong:
            sys.exit(f"render: {path.name}: {'; '.join(wrong)}. No notebook was changed.")
        rendered[path] = nbformat.writes(result) + "\n"
    for path, text in rendered.items():
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        print(f"{path.name}: {len(text.encode()) / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
