"""`bsap run`: the notebooks, with any parameter, into figures that say what made them.

    bsap run 03_rec -p DATASET refcoco -p SPLIT val         # one notebook         -> figures/refcoco-val/
    bsap run --all --params notebooks/params/sample.yaml    # 00, 01, ... in order -> figures/sample/

A notebook runs in this very Python, in the repository's root, and writes to a folder below `runs/<time>/`. Only when it has
finished do its files move to `figures/<run name>/`, entered in the `manifest.json` there: a failed run spoils nothing.
"""

import ast
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import bleach
import click
import nbformat
import pandas as pd
import yaml
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from papermill import execute_notebook, inspect_notebook

from bsap_utils import ROOT
from bsap_utils.cli import INSTALLED, PACKAGES
from bsap_utils.datasets import read_json, write_file
from bsap_utils.notebook import usable_folder

SECTIONS: dict[str, Any] = {"run_name": "", "skip": [], "all": {}, "published": {}}  # of a params file
# code and \$ are kept; between the dollars of an inline formula, which touch it, is no empty line
FORMULA = r"(?s)(```.*?```|`+[^`]*`+|\\\$)|\$\$(.+?)\$\$|(?<!\$)\$(?=\S)((?:(?!\n\s*\n)[^$])+?)(?<=\S)\$(?!\d)"
FREE = {"DATASET", "SPLIT", "REPORT_ON", "PROPOSALS", "GLOBAL_WEIGHT", "DATA_ROOT", "DEVICE", "OUT_DIR"}  # of its row
OURS = ("DatasetError", "ModelError", "ValueError", "FileNotFoundError")  # a cell's errors whose sentence says enough
SECOND = ("OTHER_", "BANKS", "GALLERY", "CHOOSE_ON")  # take what another takes: a folder's name says which it was


def shown(path: Path) -> str:
    """A path as messages show it: relative to the clone where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def check_known(where: str, names: Any, known: Any) -> None:
    """Raise ValueError at the first unknown name, with all known ones."""
    if strange := [name for name in names if name not in known]:
        raise ValueError("\n  ".join([f"{where} {strange[0]}. There are:", *dict.fromkeys(known)]))


def literal(text: str) -> Any:
    """The value that Python sees in a text (infinities, too), else the text."""
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(re.sub(r"""^inf$|float\(["']inf["']\)""", "1e999", text))
    return text


def declared(notebook: Path) -> dict[str, dict[str, Any]]:
    """What the cell tagged `parameters` assigns, by name: its default, that in Python's words (source), and help."""
    try:
        found = inspect_notebook(notebook)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"{shown(notebook)}: its parameters cannot be read ({error!r}).") from error
    return {name: one | {"source": one["default"], "default": literal(one["default"])} for name, one in found.items()}


def typed(value: Any, default: Any, name: str = "") -> Any:
    """`value` (text of the command line, or what YAML made of it) as its default's type; ValueError if it is none."""
    if isinstance(value, str) and isinstance(default, list) and value[:1] != "[":
        value = [one.strip() for one in value.split(",") if one.strip()]  # texts stay texts: a split 1, a template {}
        value = value if all(isinstance(one, str) for one in default) else [*map(literal, value)]
    elif isinstance(value, str) and not isinstance(default, str):
        value = literal(value)
    if default is not None and type(value) is not type(default) and (type(default), type(value)) != (float, int):
        raise ValueError(f"{name} = {value!r}: should be like its default, {default!r}.")
    return value


def read_params(path: Path, known: dict[str, dict]) -> dict[str, Any]:
    """A params file, its names checked: SECTIONS, and a mapping for each notebook that has values of its own."""
    try:
        if not path.is_file() or path.stat().st_size > 100_000:
            raise ValueError("there is no such file, or it has over 100 kB.")
        text, depth = path.read_text("utf-8"), 0
        for event in yaml.parse(text, yaml.CSafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 9:
                raise ValueError("has an alias, *name, or lists in lists: write values out.")
        found = yaml.safe_load(text)
        if not isinstance(found, dict):
            raise ValueError(f"should hold sections, not {found!r:.60}.")
        content = SECTIONS | {"run_name": path.stem} | {key: value for key, value in found.items() if value is not None}
        check_known("no section or notebook", content, [*SECTIONS, *known])
        names = known | {"all": [name for one in known.values() for name in one], "skip": known}
        for key, value in content.items():
            kind = type(SECTIONS.get(key, {}))
            if not isinstance(value, kind):
                raise ValueError(f"{key} should be a {kind.__name__}, not {value!r:.60}.")
            check_known(f"{key}: no {'notebook' if key == 'skip' else 'parameter'}", value, names.get(key, value))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def word(name: str, value: str) -> str:
    """A parameter in a folder's name: its value alone, unless that does not tell which parameter it is."""
    bare = value[:1].isalpha() and value not in ("True", "False", "None") and not name.startswith(SECOND)
    return value if bare else f"{name.lower()}-{value}"


def slug(run_name: str, pairs: list[tuple[str, str]]) -> str:
    """A folder name of at most 80 safe characters: of paths their last part; a hash stands for what is changed or left out."""
    last = [(name, re.sub(r"(?<![^,])(?:local-dir:)?(?:[^,:]*/)?(?=[^,/])", "", value)) for name, value in pairs]
    text, short = ("-".join([run_name] * bool(run_name) + [word(*pair) for pair in of]) for of in (pairs, last))
    name = re.sub(r"[^\w.,+-]+", "-", short, flags=re.ASCII).strip("-.")
    return name if name == text and len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def provenance() -> dict[str, Any]:
    """The repository's commit (None outside git), whether what makes the results differs from it, versions."""
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # a repository around this folder is another's
    git = partial(subprocess.check_output, cwd=ROOT, env=alone, text=True, stderr=subprocess.DEVNULL)
    commit, dirty = None, None
    with suppress(OSError, subprocess.CalledProcessError):
        commit = git(["git", "rev-parse", "HEAD"]).strip()
        dirty = bool(git(["git", "status", "--porcelain", "bsap_utils", "notebooks", "data"]))
    versions = {"python": platform.python_version()} | {name: INSTALLED.get(name) for name in PACKAGES}
    return {"commit": commit, "dirty": dirty, "versions": versions}


def execute(notebook: Path, parameters: dict[str, Any], output: Path) -> None:
    """Run the notebook, saved in `output` after each cell; ValueError with what stopped it."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter"  # "python3" is this interpreter, whatever is registered
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures show in the page
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated run stops its kernel, too
    how = {"kernel_name": "python3", "language": "python", "extra_arguments": ["--log-level=50"], "cwd": ROOT}
    try:
        execute_notebook(notebook, output, parameters, **how)
    except (Exception, KeyboardInterrupt) as error:  # an error in a cell, Ctrl-C, a kernel that died or did not start
        said = getattr(error, "ename", "") in OURS and (error.evalue or error.ename)
        problem = said or f"{type(error).__name__} {error}"
        got = "The traceback is in" if said else "As far as it got:"
        raise ValueError(f"{notebook.stem} stopped: {problem}\n{got} {shown(output)}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What made each file of a results folder, less names that lead out of it. ValueError if damaged."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        raise ValueError(f"{shown(folder)}/manifest.json should hold a mapping for each file: mend or move it.")
    return {name: entry for name, entry in manifest.items() if Path(name).name == name}


def publish(staging: Path, folder: Path, entry: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Move a finished notebook's files to `folder` and its manifest: (files moved, files there that no run made).

    The latter stay, in both places. What the notebook wrote before and writes no more is removed, unless changed since.
    ValueError where they cannot be moved, as on a full disk: `folder` is as before, and `staging`, too.
    """
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    manifest, files = read_manifest(folder), {path.name: path for path in sorted(staging.iterdir()) if path.is_file()}
    regular = {n for n in manifest if (folder / n).is_file() and not (folder / n).is_symlink()}
    alien = [n for n in files if os.path.lexists(folder / n) and n not in regular]
    moved = [name for name in files if name not in alien]
    stale = [n for n, old in manifest.items() if n not in files and old.get("notebook") == entry["notebook"]]
    made = {name: old for name, old in manifest.items() if name not in [*alien, *stale]}
    made |= {name: entry | {"sha256": digest(files[name])} for name in moved}
    text = json.dumps(dict(sorted(made.items())), indent=1, ensure_ascii=False, default=str)
    text = re.sub(r'(?<=[":=])/(?:[^/"]+/)*(?=\w)', "…/", text.replace(f"{ROOT}/", ""))  # no machine's folders
    try:
        if made or manifest:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as parts:
                for name in moved:  # all has room before anything changes
                    shutil.copyfile(files[name], Path(parts, name))
                write_file(folder / "manifest.json", f"{text}\n".encode())
                for name in moved:  # after the manifest, so that what a killed run has moved is known to be ours
                    os.replace(Path(parts, name), folder / name)
        for path in (folder / name for name in regular.intersection(stale)):
            if digest(path) == manifest[path.name].get("sha256"):
                path.unlink()
    except OSError as error:
        problem = f"the results could not be moved there ({error.strerror or error}) and are safe in {shown(staging)}/"
        raise ValueError(f"{shown(folder)}/: {problem}: copy them, or mend that and run again.") from error
    for name in moved:
        files[name].unlink()
    with suppress(OSError):  # what could not be moved is left there
        staging.rmdir()
    return moved, alien


def beside_published(row: dict[str, str], folder: Path, tables: list[str]) -> list[str]:
    """What was measured, beside the published row that a params file names by its columns: a line for each split."""
    value = row.get("metric", "accuracy")
    kind, ends = ("ris", value) if "metric" in row else ("rec", "ci")
    if f"table_{kind}.csv" not in tables:
        return []
    ours, theirs = pd.read_csv(folder / f"table_{kind}.csv"), pd.read_csv(ROOT / f"data/published_{kind}.csv")
    wanted = pd.Series({key: mark for key, mark in row.items() if key in theirs})
    theirs = theirs[(theirs[wanted.index] == wanted).all(axis=1)].rename(columns={"accuracy": "value"})
    keys = ["value", *theirs.columns.intersection(["dataset", "split", "proposals"])]
    lines = []
    for one in ours[ours["method"] == row.get("ours", "clip")].merge(theirs[keys], how="left").to_dict("records"):
        low, high, known = one[f"{ends}_low"], one[f"{ends}_high"], one["value"]
        sure = low <= high  # NaN where the pictures are too few
        interval = f"[{low:.1f}, {high:.1f}]" if sure else "(too few pictures for an interval)"
        same = ": same" if low <= known <= high else f": difference {one[value] - known:+.1f}" if sure else ""
        published = f"published {known:.2f}{same}" if pd.notna(known) else "no published row"
        measured = f"measured {one[value]:.1f} {interval} on {one['n']:,} expressions"
        lines.append(f"{one['dataset']} {one['split']}: {measured}, {published}")
    return lines


def clean_html(element: str) -> str:
    """Return HTML with headings, paragraphs and tables, which nbconvert's own filter escapes, but without any script."""
    blocks = ["p", "br", "hr", "h1", "h2", "h3", "h4", "pre", "span", "div"]
    tags = {*bleach.ALLOWED_TAGS, *blocks, "table", "caption", "thead", "tbody", "tr", "th", "td"}
    attributes = {"*": ["class", "id", "colspan", "rowspan", "scope"], "a": ["href"]}
    return bleach.clean(re.sub(r"(?s)<style.*?</style>", "", element), tags=tags, attributes=attributes)


def web_page(notebook: Path) -> str:
    """Return an executed notebook as HTML that needs neither scripts nor a network: its formulas are MathML."""
    executed, formulas = nbformat.read(notebook, as_version=4), {}

    def keep(formula: re.Match) -> str:
        code, display, inline = formula.groups()
        if code or re.search(r"(?i)<[/!a-z]|\\href", formula[0]):  # which would not be cleaned
            return formula[0]
        place = f"\ue000{len(formulas)}\ue000"  # stands in until the page is clean: the cleaning escapes MathML
        with suppress(Exception):  # a formula that cannot be read stays as it was typed
            formulas[place] = convert(display or inline, display="block" if display else "inline")
            return place
        return formula[0]

    for cell in (cell for cell in executed.cells if cell.cell_type == "markdown"):
        cell.source = re.sub(FORMULA, keep, cell.source)
    exporter = HTMLExporter(sanitize_html=True)
    exporter.register_filter("clean_html", clean_html)
    page = exporter.from_notebook_node(executed, {"metadata": {"name": notebook.stem}})[0]
    page = re.sub(r"(?s)<script.*?</script>", "", page)  # nbconvert's own
    return re.sub("\ue000\\d+\ue000", lambda place: formulas.get(place[0], place[0]), page)


def run_one(notebook: Path, defaults: dict, values: dict, folder: Path, target: Path, made_by: dict) -> list[str]:
    """Execute a notebook in the run's `folder`, move its results to `target`, say so, and return their names."""
    from torch import cuda  # here, since PyTorch takes seconds to import

    output, staging, start = folder / f"{notebook.stem}.ipynb", folder / f"{notebook.stem}-results", time.monotonic()
    staging.mkdir()
    click.echo(f"{notebook.stem} runs in {shown(folder)}/")
    execute(notebook, values | ({"OUT_DIR": shown(staging)} if "OUT_DIR" in defaults else {}), output)
    where, seconds = shown(notebook) if notebook.is_relative_to(ROOT) else notebook.name, time.monotonic() - start
    parameters = defaults | values | {"OUT_DIR": shown(target)}
    device = cuda.get_device_name() if cuda.is_available() else platform.machine()
    entry = {"device": device, "seconds": round(seconds, 1), **made_by}
    moved, alien = publish(staging, target, {"notebook": where, "parameters": parameters, **entry})
    output.with_suffix(".html").write_text(web_page(output), "utf-8")
    click.echo(f"{notebook.stem} took {seconds:.1f} s, {len(moved)} files to {shown(target)}/: {', '.join(moved)}")
    if alien:
        click.echo(f"  left as they are, since no run made them: {', '.join(alien)}; the new ones: {shown(staging)}/")
    click.echo(f"  executed notebook: {shown(output)} (and .html)")
    return moved


def choose(notebook: str, every: bool) -> dict[str, Path]:
    """The notebooks to run, by stem: every numbered one, or that of a path, stem or beginning of a stem."""
    if Path(notebook).is_file():
        return {Path(notebook).stem: Path(notebook).resolve()}
    library = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    start = notebook.removesuffix(".ipynb")
    found = {stem: path for stem, path in library.items() if (stem[0].isdigit() if every else stem.startswith(start))}
    if bool(notebook) == every or not every and len(found) != 1:
        raise ValueError("\n  ".join([f"{notebook or 'bsap run'}: give one notebook, or --all. There are:", *library]))
    return found


@click.command()
@click.argument("notebook", default="")
@click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter; several values as a,b.")
@click.option(
    "--params", type=click.Path(path_type=Path), help="YAML: run_name, skip, all, published, and a mapping a notebook."
)
@click.option("--name", default="", help="Folder of the results in figures/; else made of --params and -p.")
@click.option("--all", "every", is_flag=True, help="Run every numbered notebook, in order.")
@click.option("--list", "listed", is_flag=True, help="Only show the parameters.")
def run(notebook: str, pairs: list[tuple[str, str]], params: Path | None, name: str, every: bool, listed: bool) -> None:
    """Run a notebook (03_rec, 03 or a path), or all: results to figures/<run name>/, as executed to runs/<time>/."""
    chosen = choose(notebook, every)
    library = sorted((ROOT / "notebooks").glob("*.ipynb")) if params else []
    known = {path.stem: declared(path) for path in [*library, *chosen.values()]}
    content = read_params(params, known) if params else SECTIONS | {"run_name": "" if pairs else "sample"}
    chosen = {stem: path for stem, path in chosen.items() if known[stem] and stem not in content["skip"] or not every}
    if listed:
        lines = (f"  {n:<16} {p['source']:<28} {p['help']}".rstrip() for stem in chosen for n, p in known[stem].items())
        return click.echo("\n".join(lines))
    given = dict(pairs)
    check_known("-p: no parameter", given, {name: "" for stem in chosen for name in known[stem]})
    results = slug(name, []) if name else slug(content["run_name"], list(given.items()))
    jobs = []
    for stem, path in chosen.items():
        wanted = content["all"] | content.get(stem, {}) | given
        defaults = {n: one["default"] for n, one in known[stem].items()}
        values = {n: typed(wanted[n], default, f"{stem}: {n}") for n, default in defaults.items() if n in wanted}
        target = usable_folder(ROOT / (values.get("OUT_DIR") or f"figures/{results}"), True, ROOT)
        read_manifest(target)  # a damaged one is told before the work
        jobs.append((path, defaults, values, target))
    usable_folder(Path("runs"), root=ROOT)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d-%H%M%S-"), dir=ROOT / "runs"))
    made_by, others = provenance(), ", ".join(sorted(given.keys() - FREE))
    for path, defaults, values, target in jobs:
        try:
            tables = run_one(path, defaults, values, folder, target, made_by)
        finally:
            with suppress(OSError):  # an empty folder, as of a run that failed, is no result
                target.rmdir()
        if content["published"] and others:
            click.echo(f"not compared with the published row, which is not of this {others}")
        elif content["published"]:
            for line in beside_published(content["published"], target, tables):
                click.echo(line)
