"""The `bsap` command: runs the notebooks, with any parameter, into figures that say what made them.

    bsap run 03_rec -p DATASET refcoco -p SPLIT val         # one notebook       -> figures/refcoco-val/
    bsap run --all --params notebooks/params/sample.yaml    # 01, 02, … in order -> figures/sample/
    bsap run 03_rec --list                                  # its parameters, with defaults
    bsap data get refcoco --split val; bsap data check data # the real data sets, and what is on disk
    bsap embed photos embedded --model ViT-B-32             # features of many images, over Ray where it is installed
    bsap masks refcoco --split val --method felzenszwalb    # candidate masks for 04_ris
    bsap doctor                                             # what is here, what is missing, what to type next
    bsap cache clear                                        # forget all features that were encoded

Wherever a notebook lies, it runs in this very Python with the repository's root as working directory, so that a
relative path in a parameter (OUT_DIR too) always means the same. It writes to a staging folder below `runs/<time>/`;
only when it has finished do its files move to `figures/<run name>/`, entered in the `manifest.json` there: a failed run
spoils nothing. A notebook may leave `run_info.json` (facts such as the device it used) in OUT_DIR for the manifest.
"""

import ast
import difflib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from typer.core import TyperCommand

from bsap_utils import ROOT as CLONE
from bsap_utils import __version__

ROOT = CLONE if (CLONE / "notebooks").is_dir() else Path.cwd()  # installed without the clone: where the user stands
INLINE = "module://matplotlib_inline.backend_inline"
PACKAGES = ("torch", "torchvision", "open_clip_torch", "pandas", "numpy", "bsap-utils")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Parameter = namedtuple("Parameter", "default source help")  # default: None where its source is no literal
Parameters = dict[str, Parameter]  # of one notebook, by name


class PairCommand(TyperCommand):
    """Hands each `-p NAME VALUE` on as one string, since Typer has no repeatable option with two values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args`, in which NAME and VALUE of each -p are joined by a NUL before Typer sees them."""
        tokens = iter(args)
        joined = ([t, "\0".join(itertools.islice(tokens, 2))] if t == "-p" else [t] for t in tokens)
        return super().parse_args(ctx, list(itertools.chain(*joined)))


def fail(message: str) -> NoReturn:
    """End with a message for a person, not a traceback: to stderr, exit code 1."""
    sys.exit(f"bsap: {message}")


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the clone where it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def check_known(where: str, names: Iterable[Any], known: Iterable[str], listing: str = "") -> None:
    """Fail at the first unknown name, with the nearest and all known ones."""
    known = list(known)
    folded = {k.casefold(): k for k in known}
    for name in names:
        if name not in known:
            match = difflib.get_close_matches(str(name).casefold(), folded, n=1)
            hint = f"; did you mean {folded[match[0]]}?" if match else "."
            fail(f"{where} {name}{hint} There are:{listing or ' ' + ', '.join(known)}")


def table(parameters: Parameters) -> str:
    """One line a parameter: name, default, meaning."""
    width = max(map(len, parameters), default=0)
    return "".join(f"\n  {n:<{width}}  {p.source:<24}  {p.help}".rstrip() for n, p in parameters.items()) or " none"


def find_notebook(name: str, library: dict[str, Path]) -> Path:
    """The notebook of that path, stem (`03_rec`) or beginning of a stem (`03`)."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    stem = name.removesuffix(".ipynb")
    found = [stem] if stem in library else [s for s in library if s.startswith(stem)]
    if len(found) > 1:
        fail(f"{name} could be {' or '.join(found)}")
    check_known("no notebook", found or [stem], library)
    return library[found[0]]


def declared(notebook: Path) -> Parameters:
    """What the cell tagged `parameters` assigns, by its syntax tree: papermill's own `inspect_notebook` loses a line
    with a `=` in its comment, and cuts a text at `#`."""
    found: Parameters = {}
    try:
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        source = next(("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])), "")
        lines = source.encode().splitlines()  # the tree counts columns in bytes
        for node in ast.parse(source).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset :].decode().strip(" #")
                default = None
                with suppress(ValueError):
                    default = ast.literal_eval(node.value)
                default = list(default) if isinstance(default, tuple) else default  # papermill has no tuples
                if isinstance(target, ast.Name):
                    found[target.id] = Parameter(default, ast.unparse(node.value), comment)
    except Exception as e:  # whatever a damaged file, or a cell that is not plain Python, leads to
        fail(f"cannot read the parameters of {shown(notebook)}: {type(e).__name__}: {e}")
    return found


def typed(value: Any, default: Any) -> Any:
    """`value` (text of the command line, or what YAML made of it) as the default's type; ValueError if it is none.

    >>> typed("1e-3", 1.0), typed("yes", False), typed("crop, blur", ["crop"]), typed("[1, 2.5]", [0.5])
    (0.001, True, ['crop', 'blur'], [1.0, 2.5])
    """
    is_list = isinstance(default, list)
    if isinstance(value, str) and type(default) not in (str, int, float):
        commas = is_list and not value.lstrip().startswith("[")
        value = [v for v in re.split(r"\s*,\s*", value.strip()) if v] if commas else yaml.safe_load(value)
    if default is None:
        return None if value == "None" else value
    if is_list and isinstance(value, list):
        kinds = {type(v) for v in default}  # whole numbers among others are numbers; of none or mixed kinds: anything
        return [typed(v, 0.0 if kinds == {int, float} else default[0] if len(kinds) == 1 else None) for v in value]
    if (type(default), type(value)) in ((int, str), (float, str), (float, int)):
        return type(default)(value)
    if type(value) is not type(default):
        raise ValueError(value)
    return value


def settings(stem: str, given: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    """The given values that the notebook declares, each as the type of its default."""
    values = {}
    for name, (default, source, _) in parameters.items():
        try:
            if name in given:
                values[name] = typed(given[name], default)
        except (ValueError, TypeError, yaml.YAMLError):
            fail(f"{stem}: {name} should be {type(default).__name__} like its default {source}, not {given[name]!r}")
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """The names and values in a YAML or JSON file; none where there is no such JSON file."""
    if path.suffix == ".json" and not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            content = (json.load(file) if path.suffix == ".json" else yaml.safe_load(file)) or {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        fail(f"cannot read {shown(path)}: {e}")
    if not isinstance(content, dict):
        fail(f"{shown(path)} should hold names and values, not {content!r:.60}")
    return content


def read_params(path: Path, known: dict[str, Parameters]) -> dict[str, Any]:
    """The params file, its names checked: `run_name`, `skip` (left out of --all), `all`, and one mapping a notebook."""
    content = {key: value for key, value in read_mapping(path).items() if value is not None}
    content = {"run_name": path.stem, "skip": [], "all": {}} | content
    check_known(f"{path}: no notebook", content, ["run_name", "skip", "all", *known])
    for key, value in content.items():
        expected = str if key == "run_name" else list if key == "skip" else dict
        if not isinstance(value, expected):
            fail(f"{path}: {key} should be a {expected.__name__}, not {value!r:.60}")
        if expected is dict:
            several = [known[key]] if key != "all" else known.values()
            parameters = {name: p for each in several for name, p in each.items()}
            check_known(f"{path}: {key} has no parameter", value, parameters, table(parameters))
    check_known(f"{path}: skip has no notebook", content["skip"], known)
    return content


def slug(parts: list[str]) -> str:
    """Parts joined to a safe folder name of at most 80 characters; a hash stands for what is cut off."""
    name = re.sub(r"[^\w.+-]+", "-", "-".join(parts), flags=re.ASCII).strip("-.") or "run"
    return name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def provenance() -> dict[str, Any]:
    """The repository's commit (None outside git), whether what makes the results differs from it, versions."""
    found: dict[str, Any] = {"commit": None, "dirty": None, "versions": {"python": platform.python_version()}}
    with suppress(OSError, subprocess.CalledProcessError):
        git = partial(subprocess.check_output, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        top, commit = git(["git", "rev-parse", "--show-toplevel", "HEAD"]).splitlines()
        if Path(top).samefile(ROOT):
            changed = git(["git", "status", "--porcelain", "bsap_utils", "notebooks", "data"])
            found |= {"commit": commit, "dirty": bool(changed)}
    installed = {d.name: d.version for d in metadata.distributions()}
    found["versions"] |= {package: installed.get(package) for package in PACKAGES}
    return found


def new_run_folder() -> Path:
    """A fresh `runs/<time>/`; where another run has taken this second, the next one."""
    while True:
        folder = ROOT / "runs" / time.strftime("%Y-%m-%d-%H%M%S")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        time.sleep(0.1)


def execute(notebook: Path, parameters: dict[str, Any], output: Path) -> None:
    """Run the notebook, saved in `output` after each cell; fails with the cell that stopped it and its error."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from papermill import PapermillExecutionError, execute_notebook
    from papermill.exceptions import strip_color

    class ThisPython(AsyncKernelManager):
        # with no kernel folder to look into, "python3" can only be the interpreter that runs this line
        kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # type: ignore[assignment]

        async def start_kernel(self, **how: Any) -> None:  # type: ignore[override]
            # figures show in the notebook, whatever backend the shell names
            await super().start_kernel(env={**os.environ, "MPLBACKEND": INLINE}, **how)

    logging.getLogger("papermill").setLevel(logging.ERROR)
    how = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisPython, "cwd": ROOT}
    how["extra_arguments"] = ["--log-level=50"]  # the kernel's own log: a note on encryption, noise when stopped
    source, target = (str(p).replace("{", "{{").replace("}", "}}") for p in (notebook, output))  # it formats paths
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated run stops its kernel, too
    try:
        execute_notebook(source, target, parameters, **how)
    except PapermillExecutionError as e:
        trace = "\n  ".join(strip_color("\n".join(e.traceback)).splitlines()[-10:])
        fail(f"{notebook.stem} failed in cell [{e.exec_count}]: {e.ename}: {e.evalue}\n  {trace}")
    except (Exception, KeyboardInterrupt) as e:  # Ctrl-C, or a kernel that died or did not start
        cells = json.loads(output.read_text("utf-8"))["cells"] if output.exists() else []
        code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]
        number = sum(bool(c["metadata"]["papermill"]["start_time"]) for c in code)
        reason = "interrupted" if isinstance(e, KeyboardInterrupt) else f"{type(e).__name__}: {e}"
        fail(f"{notebook.stem} stopped in cell [{number}]: {reason}")
    finally:
        signal.signal(signal.SIGTERM, before)


def publish(staging: Path, folder: Path, entry: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Move a finished notebook's files to `folder` and its manifest: (files written, files that it writes no more)."""
    manifest, facts = read_mapping(folder / "manifest.json"), read_mapping(staging / "run_info.json")
    (staging / "run_info.json").unlink(missing_ok=True)
    files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
    stale = [n for n in manifest if n not in files and manifest[n].get("notebook") == entry["notebook"]]
    parts = {name: (folder / name).with_name(f".{Path(name).name}.part") for name in (*files, "manifest.json")}
    if "device" not in facts and files:
        import torch

        gpu, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        facts["device"] = torch.cuda.get_device_name() if gpu else "mps" if mps else "cpu"
    for name in files:
        manifest[name] = {**facts, **entry, "sha256": hashlib.sha256((staging / name).read_bytes()).hexdigest()}
        parts[name].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staging / name, parts[name])  # copies where the folder is on another disk
    kept = {name: manifest[name] for name in sorted(manifest) if name not in stale}
    text = json.dumps(kept, indent=1, ensure_ascii=False, default=str) + "\n"
    text = re.sub(r'(?<=[":=])/(?:[^/"]+/)*(?=\w)', "…/", text.replace(f"{ROOT}/", ""))  # no folders of this machine
    if files or stale:
        folder.mkdir(parents=True, exist_ok=True)
        parts["manifest.json"].write_text(text, "utf-8")
        for name, part in parts.items():
            os.replace(part, folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(staging)
    return files, stale


def run_one(notebook: Path, values: dict[str, Any], parameters: Parameters, made_by: dict[str, Any], folder: Path,
            target: Path) -> None:  # fmt: skip
    """Execute the notebook in the run's `folder`; then move its results to `target` and say so."""
    from nbconvert import HTMLExporter

    from .results import write_results_page

    output, staging, start = folder / f"{notebook.stem}.ipynb", folder / f"{notebook.stem}-results", time.monotonic()
    staging.mkdir()
    typer.echo(f"{notebook.stem} runs in {shown(folder)}/")
    execute(notebook, values | ({"OUT_DIR": shown(staging)} if "OUT_DIR" in parameters else {}), output)
    seconds = round(time.monotonic() - start, 1)
    complete = {n: p.source if p.default is None and p.source != "None" else p.default for n, p in parameters.items()}
    complete |= values | {"OUT_DIR": shown(target)}
    where = shown(notebook) if notebook.is_relative_to(ROOT) else notebook.name
    files, stale = publish(staging, target, {"notebook": where, "parameters": complete, **made_by, "seconds": seconds})
    if files:
        write_results_page(target)
    output.with_suffix(".html").write_text(HTMLExporter().from_filename(str(output))[0], "utf-8")
    typer.echo(f"{notebook.stem} took {seconds} s, wrote {len(files)} files to {shown(target)}/: {', '.join(files)}")
    if stale:
        typer.echo(f"  removed there, as it writes them no more: {', '.join(stale)}")
    typer.echo(f"  executed notebook: {shown(output)} (and .html)")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Training-free correction of CLIP's text-to-image retrieval bias (BSAP): notebooks, data and checks."""
    if version:
        typer.echo(f"bsap {__version__}")


@app.command(cls=PairCommand)
def run(
    notebook: Annotated[str, typer.Argument(help="Stem (03_rec, or just 03) or path of a notebook.")] = "",
    pairs: Annotated[list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; list: a,b")] = None,
    params: Annotated[Path | None, typer.Option(help="YAML: run_name, skip, all and a mapping a notebook.")] = None,
    name: Annotated[str, typer.Option(help="Folder of the results in figures/; else made of --params and -p.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Run every numbered notebook, in order.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only show the parameters.")] = False,
) -> None:
    """Run a notebook, or all: results in figures/<run name>/, executed notebooks in runs/<time>/."""
    library = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    if not library and not notebook.endswith(".ipynb"):
        fail(f"no notebooks in {ROOT}: they come with a clone of the repository. Run bsap there, or give a path.")
    if bool(notebook) == every:
        fail(f"give either a notebook or --all. There are: {', '.join(library)}")
    found = [find_notebook(notebook, library)] if notebook else [f for s, f in library.items() if re.match(r"\d\d", s)]
    chosen = {file.stem: file for file in found}
    known = {stem: declared(file) for stem, file in ((library if params else {}) | chosen).items()}
    content: dict[str, Any] = {"run_name": "" if pairs else "sample", "skip": [], "all": {}}
    if params:
        content = read_params(params, known)
    for stem in [s for s in chosen if every and (s in content["skip"] or not known[s])]:
        typer.echo(f"{stem} left out: {'in skip' if stem in content['skip'] else 'no parameters cell'}")
        del chosen[stem]
    if listed:
        return typer.echo("\n".join(stem + table(known[stem]) for stem in chosen))
    if not all("\0" in pair for pair in pairs or []):
        fail("-p takes a name and a value: -p NAME VALUE")
    given = dict(pair.split("\0") for pair in pairs or [])
    together = {n: parameter for stem in chosen for n, parameter in known[stem].items()}
    check_known("-p: no parameter", given, together, table(together))
    alone = {n: v[:1].isalpha() and not isinstance(together[n].default, bool) for n, v in given.items()}  # says enough
    words = [v if alone[n] else f"{n.lower()}-{v}" for n, v in given.items() if n != "OUT_DIR"]
    name = slug([name] if name else [content["run_name"], *words])
    plans = {s: settings(s, content["all"] | content.get(s, {}) | given, known[s]) for s in chosen}
    targets = {s: ROOT / (plan.pop("OUT_DIR", "") or f"figures/{name}") for s, plan in plans.items()}
    for target in targets.values():
        read_mapping(target / "manifest.json")  # a damaged one is to be known before hours of work, not after
    made_by, folder = provenance(), new_run_folder()
    for stem, target in targets.items():
        try:
            run_one(chosen[stem], plans[stem], known[stem], made_by, folder, target)
        except (SystemExit, OSError) as e:
            rest = ", ".join(s for s in targets if s > stem) or "-"
            fail(f"{str(e).removeprefix('bsap: ')}\nAs far as it got: {shown(folder / stem)}.ipynb; not run: {rest}")


@app.command()
def doctor() -> None:
    """Say what is here, what is missing, and the next command to type; exit code 0 if the sample can be run."""
    from bsap_utils.doctor import report

    raise typer.Exit(not report(typer.echo))


@app.command("masks")
def masks(
    dataset: Annotated[str, typer.Argument(help="refshapes, refcoco, refcoco+, refcocog, or another in their layout.")],
    method: Annotated[str, typer.Option(help="felzenszwalb (needs no weights) or sam (extra: sam).")] = "felzenszwalb",
    split: Annotated[str, typer.Option(help="Only the images of this split.", show_default="all")] = "",
    root: Annotated[Path | None, typer.Option(help="Where the data set lies.", show_default="as the notebooks")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="ROOT/<dataset>_masks.json, if not there yet")
    ] = None,
    model: Annotated[
        str, typer.Option(help="SAM: a name on the hub, or a folder.", show_default="facebook/sam-vit-base")
    ] = "",
) -> None:
    """Segment the images of a data set: candidate masks for `bsap run 04_ris -p PROPOSALS masks` (or the file)."""
    from bsap_utils import segmenters
    from bsap_utils.datasets import DatasetError, load_refer

    check_known("no method", [method], ["felzenszwalb", "sam"])
    folder = root or ROOT / ("data/refshapes" if dataset == "refshapes" else "data")
    target = out or folder / f"{dataset}_masks.json"
    if target.exists() and out is None:
        fail(f"{shown(target)} is there already. Name another file with --out, or the same to replace it.")
    try:
        ds = load_refer(folder, dataset)
        ds = ds.select(split=split) if split else ds
        absent = ds.missing_images()
        if absent:
            fail(f"{len(absent):,} of {len(ds.images):,} images are missing, e.g. {absent[0]}: bsap data get {dataset}")
        segment = segmenters.sam(model or segmenters.SAM) if method == "sam" else segmenters.felzenszwalb
        count = segmenters.write_masks(ds, segment, target)
    except (DatasetError, RuntimeError, OSError) as e:
        fail(str(e))
    typer.echo(f"{count:,} masks of {len(ds.images):,} images are in {shown(target)}")
    typer.echo(f"Next: bsap run 04_ris -p DATASET {dataset} -p PROPOSALS {shown(target) if out else 'masks'}")


@app.command("embed")
def embed_images(
    source: Annotated[Path, typer.Argument(help="Folder of images, parquet with image bytes, WebDataset tars.")],
    out: Annotated[Path, typer.Argument(help="Folder for features/*.parquet, errors.parquet, embedding.json.")],
    model: Annotated[str, typer.Option(help="As open_clip names it, or local-dir:FOLDER.")] = "ViT-B-32",
    pretrained: Annotated[str, typer.Option(help="Its weights: a tag of open_clip, or a file.")] = "openai",
    num_gpus: Annotated[int | None, typer.Option(min=0, help="0: on CPUs.", show_default="all there are")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, even if Ray is installed.")] = False,
    address: Annotated[str, typer.Option(help="Of a Ray cluster, or auto.", show_default="RAY_ADDRESS, or none")] = "",
    bank: Annotated[
        str, typer.Option(help="Auxiliary prompts of the bias: coco80, generic or a text file.")
    ] = "coco80",
    temperature: Annotated[float, typer.Option(help="Of the bias.")] = 1.0,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16.", show_default="bf16 on GPUs, else fp32")
    ] = "auto",
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a shard, at least (a tar is one).")] = 1024,
) -> None:
    """Write CLIP features and BSAP's bias of all images as parquet; goes on where it was interrupted."""
    from bsap_utils import embedding, scoring

    try:
        embedding.embed(
            source, out, model, pretrained, num_gpus=num_gpus, local=local, address=address, bank=bank,
            temperature=temperature, precision=precision, shard_size=shard_size,
        )  # fmt: skip
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    except (embedding.EmbeddingError, scoring.ModelError, ValueError, OSError) as e:
        fail(str(e))


data = typer.Typer(no_args_is_help=True, help="Get RefCOCO, RefCOCO+ and RefCOCOg, and check what is on disk.")
app.add_typer(data, name="data")


@data.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="refcoco, refcoco+ or refcocog.")],
    split: Annotated[
        list[str] | None,
        typer.Option(help="val, testA, testB (refcocog: val, test), train; several as a,b. All but train."),
    ] = None,
    root: Annotated[Path, typer.Option(help="Where to.", show_default="data/")] = ROOT / "data",
    base_url: Annotated[
        str | None,
        typer.Option(envvar="BSAP_BASE_URL", help="A mirror of the same file names, instead of all addresses."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A COCO folder, whose pictures are linked, not copied.")] = None,
) -> None:
    """Fetch annotations, detections and only the pictures that the splits need; goes on where it was interrupted."""
    from bsap_utils import download

    splits = [one for given in split or [] for one in given.split(",")]
    root = root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root  # shorter in messages
    try:
        problems = download.get(name, splits, root, base_url, images)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    except (ValueError, OSError) as e:
        fail(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) else str(e))
    if problems:
        fail("not all could be got; what could is kept.\n" + "\n".join(problems))
    where = "" if root.resolve() == ROOT / "data" else f" -p DATA_ROOT {root.resolve()}"
    typer.echo(f"All there. Next: bsap run 03_rec -p DATASET {name} -p SPLIT {splits[0] if splits else 'val'}{where}")


@data.command("check")
def data_check(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A root such as data, or one set.")]) -> None:
    """Tell what is there and what is wrong; exit code 0 if each split that was got can be evaluated in full."""
    from bsap_utils import download

    try:
        rows, wrong = download.check(folder)
    except (ValueError, OSError) as e:
        fail(str(e))
    typer.echo(rows.to_string(index=False))
    if wrong:
        more = [f"… and {len(wrong) - 20:,} more"] if len(wrong) > 20 else []
        fail("\n".join([f"{len(wrong):,} things are wrong:", *wrong[:20], *more]))


kept = typer.Typer(no_args_is_help=True, help="Features that are kept, so that a second run encodes nothing.")
app.add_typer(kept, name="cache")


@kept.command("clear")
def cache_clear() -> None:
    """Delete all kept features; the next run encodes again what it needs. (`bsap doctor` shows how large they are.)"""
    from bsap_utils import cache

    files, size = cache.clear()
    typer.echo(f"{files:,} files with {size / 1e6:,.1f} MB deleted from {shown(cache.folder() or Path('nowhere'))}")


@kept.callback()
def cache_group() -> None:
    """Features that are kept, so that a second run encodes nothing."""


if __name__ == "__main__":
    app()
