"""The `bsap` command: notebooks, data, checks, masks and features of many images.

    bsap run 03_rec -p DATASET refcoco -p SPLIT val         # a notebook -> figures/refcoco-val/ (notebooks/run.py)
    bsap data get refcoco --split val; bsap data check data # the real data sets, and what is on disk

What can be mended ends in one sentence. `bsap run` itself stands beside the notebooks: provenance belongs to the build.
"""

import importlib
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from bsap_utils import ROOT, __version__
from bsap_utils.notebook import usable_folder

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pandas", "numpy", "bsap-utils")
FOLDER = click.Path(path_type=Path)
INSTALLED = {d.name: d.version for d in metadata.distributions()}


class Commands(click.Group):
    """Commands that end in one sentence where an error is ours; what the terminal cannot show is replaced."""

    def main(self, *args: Any, **how: Any) -> Any:
        """Run the command line; click ends the process, except after errors of ours, which end it here."""
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            return super().main(*args, **how)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(f"bsap: {error}")


@click.group(cls=Commands)
@click.version_option(__version__, message="bsap %(version)s")
def app() -> None:
    """Training-free correction of CLIP's text-to-image retrieval bias (BSAP): notebooks, data and checks."""


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.pass_context
def run(context: click.Context) -> None:
    """Run a notebook, or all, with any parameter: `bsap run --help`."""
    if not (ROOT / "notebooks/run.py").is_file():
        raise ValueError("The notebooks are in the repository, not in the package: clone it, and type this there.")
    sys.path.insert(0, str(ROOT / "notebooks"))
    importlib.import_module("run").run.main(context.args, "bsap run", standalone_mode=False)


@app.command()
def doctor() -> None:
    """Say what is here and what is missing; exit code 0 if the sample can be run."""
    from bsap_utils import download, scoring
    from bsap_utils.datasets import load_refer

    size, free = sum(path.stat().st_size for path in scoring.cache_files()), shutil.disk_usage(ROOT).free
    click.echo(", ".join(f"{name} {INSTALLED.get(name, 'not installed')}" for name in PACKAGES))
    click.echo(f"Python {platform.python_version()} on {platform.system()}, device {scoring.pick_device()}, {ROOT}")
    click.echo(f"{free / 1e9:,.0f} GB of disk free, kept features: {size / 1e6:,.0f} MB")
    sample = ROOT / "data/refshapes"
    wrong = [download.problem(scoring.find_weights, f"local-dir:{ROOT}/data/clip-refshapes-web")]
    wrong += [download.problem(load_refer, sample, "refshapes")]
    if not any(wrong):
        wrong = [f"not in the clone: {name}" for name in load_refer(sample, "refshapes").missing_images()]
    notes = [*wrong[:9], download.problem(scoring.find_weights, "ViT-B-32"), scoring.hub_problem()]
    notes += ["no real data: bsap data get refcoco --split val"] * (not any((ROOT / "data").glob("refcoco*/*")))
    click.echo("\n".join(f"  - {note}" for note in notes if note) or "All there.")
    click.echo("Next: git checkout -- data   # the sample is part of the clone" if any(wrong) else "Next: make figures")
    sys.exit(any(wrong))


@app.command()
@click.argument("dataset")
@click.option("--method", type=click.Choice(["felzenszwalb", "sam"]), default="felzenszwalb", help="sam: extra `sam`.")
@click.option("--split", help="Only the images of this split.")
@click.option("--root", type=FOLDER, help="Where the data set lies; else data/, and data/refshapes for the sample.")
@click.option("--out", type=FOLDER, help="File to write; else ROOT/<dataset>_masks.json.")
@click.option("--model", default="facebook/sam-vit-base", help="SAM: a name on the hub, or a folder.")
def masks(dataset: str, method: str, split: str | None, root: Path | None, out: Path | None, model: str) -> None:
    """Segment the images of a data set: candidate masks for `bsap run 04_ris -p PROPOSALS masks` (or the file)."""
    from bsap_utils import segmenters
    from bsap_utils.datasets import load_refer

    root = root or ROOT / ("data/refshapes" if dataset == "refshapes" else "data")
    target = out or root / f"{dataset}_masks.json"
    if target.exists():
        raise ValueError(f"{target} is there already. Name another file with --out, or move it away.")
    ds = load_refer(root, dataset).select(split=split)
    segment = segmenters.sam(model) if method == "sam" else segmenters.felzenszwalb
    count = segmenters.write_masks(ds, segment, target)
    click.echo(f"{count:,} masks of {len(ds.images):,} images are in {target}")


@app.command()
@click.argument("source", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--model", default="ViT-B-32", help="As open_clip names it, or local-dir:FOLDER.")
@click.option("--pretrained", default="openai", help="Its weights: a tag of open_clip, or a file.")
@click.option("--bank", default="coco80", help="Auxiliary prompts of the bias: coco80, generic or a text file.")
@click.option("--temperature", default=1.0, help="Of the bias.")
@click.option("--precision", default="fp32", type=click.Choice(["fp32", "bf16", "fp16"]), help="bf16 is fast on GPUs.")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--address", default="", help="Of a Ray cluster; else this machine.")
def embed(source: Path, out: Path, **how: Any) -> None:
    """Write CLIP features and BSAP's bias of all images below SOURCE to OUT; goes on where it was interrupted."""
    from bsap_utils import embedding

    embedding.embed(source, usable_folder(out.absolute()), **how)


@app.group()
def data() -> None:
    """Get RefCOCO, RefCOCO+, RefCOCOg and real CLIP scores, and check what is on disk."""


@data.command()
@click.argument("name")
@click.option("--split", default="", help="val, testA, testB (refcocog: val, test), train; as a,b. All but train.")
@click.option("--root", type=FOLDER, default=ROOT / "data", help="Where to; else data/.")
@click.option("--base-url", envvar="BSAP_BASE_URL", help="A mirror of the same file names, instead of all addresses.")
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A COCO folder, to link.")
def get(name: str, split: str, root: Path, base_url: str | None, images: Path | None) -> None:
    """Fetch annotations, detections and only the pictures that the splits need, or `clip-scores`."""
    from bsap_utils import download

    splits, root = split.split(",") if split else [], usable_folder(root.absolute())
    try:
        lacking = download.get(name, splits, root, base_url, images)
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for what is being fetched, which has no name yet
    if lacking:
        raise ValueError("\n".join(["not all could be got; what could is kept.", *lacking]))
    click.echo("All there.")


@data.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
def check(folder: Path) -> None:
    """Tell what is there and what is wrong; exit code 0 if each split that was got can be evaluated in full."""
    from bsap_utils import download

    rows, wrong = download.check(folder)
    click.echo(rows.to_string(index=False) if len(rows) else "No data set is here.")
    if wrong:
        raise ValueError("\n".join([f"{len(wrong):,} things are wrong:", *wrong[:20]]))


@app.group()
def cache() -> None:
    """Features that are kept, so that a second run encodes nothing."""


@cache.command()
def clear() -> None:
    """Delete all kept features; the next run encodes again what it needs. (`bsap doctor` shows how large they are.)"""
    from bsap_utils import scoring

    files = scoring.cache_files()
    for path in files:
        path.unlink()
    click.echo(f"{len(files):,} files deleted")


if __name__ == "__main__":
    app()
