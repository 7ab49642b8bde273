"""`bsap doctor`: what is here, what is missing, and the next command to type. No model is loaded, nothing downloaded."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from . import __version__, cache, cli, scoring
from .datasets import load_refer
from .download import FOLDER, SPLITS, _bytes, _read_sums
from .proposals import load_proposals

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pandas", "papermill", "jupyterlab", "faiss-cpu", "ray")
Weights = tuple[str, str]  # model, pretrained
Data = tuple[Path, str, str, str]  # root, name, split, proposals
OWN = {"detections": "dets_dict", "masks": "masks"}  # proposals that lie beside a data set, and how its file ends
LARGE = 30e6  # bytes of instances.json: RefCOCO's takes some 13 seconds to load, the sample's 0.2


def device() -> str:
    """Return the device that "auto" computes on, with its memory or cores."""
    kind = scoring.pick_device().type
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"CUDA: {torch.cuda.get_device_name()}, {_bytes(free)} of {_bytes(total)} free"
    if kind == "mps":
        return f"Apple MPS: {_bytes(torch.mps.recommended_max_memory())} for the GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    memory = _bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if known else "unknown"
    return f"CPU: {cores} cores, memory {memory} (PyTorch finds neither CUDA nor Apple MPS)"


def find_weights(model: str, pretrained: str) -> Path:
    """Return the file that `ClipScorer(model, pretrained)` would load its weights from; relative paths are the clone's.

    open_clip looks in Hugging Face's cache where its record names a repository, else in ~/.cache/clip. Of a safetensors
    file the header is read, which tells a short one. Raises ModelError for weights that are missing, damaged or unknown.

    >>> find_weights("local-dir:data/clip-refshapes", "").name
    'open_clip_model.safetensors'
    """
    if model.startswith("local-dir:"):
        model = f"local-dir:{cli.ROOT / model.removeprefix('local-dir:')}"
    if (cli.ROOT / pretrained).is_file():
        pretrained = str(cli.ROOT / pretrained)
    scoring._check_names(model, pretrained)
    record = {} if ":" in model else open_clip.get_pretrained_cfg(model, pretrained)
    hub = f"{model.removeprefix('hf-hub:')}/" if model.startswith("hf-hub:") else record.get("hf_hub", "")
    repository, _, name = hub.rpartition("/")
    names = [Path(name).with_suffix(".safetensors").name, name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    if model.startswith("local-dir:"):
        place = Path(model.removeprefix("local-dir:"))
        found = [str(file) for kind in ("safetensors", "bin", "pth") for file in sorted(place.glob(f"*.{kind}"))]
    elif repository:
        place = Path(constants.HF_HUB_CACHE)
        found = [file for one in names if isinstance(file := try_to_load_from_cache(repository, one), str)]
    else:
        place = Path("~/.cache/clip").expanduser() / record["url"].rpartition("/")[2] if record else Path(pretrained)
        found = [str(place)] if place.is_file() else []
    if not found:
        raise scoring.ModelError(f"not in {cli.shown(place)}")
    if found[0].endswith(".safetensors"):
        try:
            with safe_open(found[0], "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise scoring.ModelError(f"{cli.shown(Path(found[0]))} is damaged ({error})") from error
    return Path(found[0])


def data_problems(root: Path, dataset: str, splits: Iterable[str], proposals: Iterable[str]) -> list[str]:
    """Return what keeps `splits` of a data set from being evaluated with `proposals`, one line each; none where nothing.

    A large data set is not loaded: that its files are there, and as many pictures as the split has, must do. `bsap data
    check` says it for certain.
    """
    folder, problems = root / dataset, []
    if not folder.is_dir():
        return [f"there is no folder {cli.shown(folder)}"]
    try:
        if dataset in SPLITS and sum(file.stat().st_size for file in folder.glob("*.json")) > LARGE:
            refs = folder / f"refs({'umd' if dataset == 'refcocog' else 'unc'}).p"
            own = {one: root / f"{dataset}_{name}.json" for one, name in OWN.items()}
            files = [refs, *({"gt": refs, **own}.get(one, cli.ROOT / one) for one in proposals)]
            problems += [f"{cli.shown(file)} is missing" for file in dict.fromkeys(files) if not file.is_file()]
            there, asked = sum(1 for _ in (root / FOLDER).glob("*.jpg")), _read_sums(root)[1]
            for split in splits:
                if there < SPLITS[dataset].get(split, there + 1) or (asked and f"{dataset} {split}" not in asked):
                    problems.append(f"the pictures of {split} were not got, or not all of them")
            return problems
        ds = load_refer(root, dataset)
    except (ValueError, OSError) as error:
        return [_short(error)]
    for split in splits:
        try:
            part = ds.select(split=split)
            if absent := part.missing_images():
                count = f"{len(absent):,} of {len(part.images):,} pictures of {split}"
                problems.append(f"{count} are missing, e.g. {absent[0]}")
            for one in proposals:
                load_proposals(part, one if one in ("gt", *OWN) else str(cli.ROOT / one), root)
        except (ValueError, OSError) as error:
            problems.append(_short(error))
    return list(dict.fromkeys(problems))


def needs(params: Path, known: dict[str, cli.Parameters]) -> tuple[set[Weights], set[Data]]:
    """Return the weights and data that the numbered notebooks ask for under a params file.

    `known` are the parameters that each notebook declares. Ends with `cli.fail` for a file that is damaged.
    """
    content = cli.read_params(params, known)
    weights: set[Weights] = set()
    data: set[Data] = set()
    for stem in (stem for stem in known if re.match(r"\d\d", stem) and stem not in content["skip"]):
        values: dict[str, Any] = {name: parameter.default for name, parameter in known[stem].items()}
        values |= cli.settings(stem, content["all"] | content.get(stem, {}), known[stem])
        models, tags = as_list(values.get("MODEL")), as_list(values.get("PRETRAINED"))
        tags = tags * len(models) if len(tags) == 1 else tags
        weights |= {(one, "" if ":" in one else tag) for one, tag in zip(models, tags, strict=False)}
        name = values.get("DATASET")
        root = cli.ROOT / (values.get("DATA_ROOT") or ("data/refshapes" if name == "refshapes" else "data"))
        splits = [split for key in ("SPLIT", "CHOOSE_ON", "REPORT_ON") for split in as_list(values.get(key))]
        proposals = as_list(values.get("PROPOSALS", "gt"))
        data |= {(root, name, split, one) for split in splits for one in proposals if name}
    return weights, data


def as_list(value: Any) -> list[str]:
    """Return a parameter that may be one text, several or not there as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def report(say: Callable[[str], Any]) -> bool:
    """Hand the report to `say`, some lines at a time; return whether the sample can be run."""
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    kept, place = cache.usage(), cache.folder()
    say(f"bsap {__version__} in {cli.ROOT}, Python {platform.python_version()} on {platform.system()}")
    say("packages  " + ", ".join(f"{name} {installed.get(name, 'not installed')}" for name in PACKAGES))
    say(f"device    {device()}")
    used = f"{kept[0]:,} files, {_bytes(kept[1])}, in {cli.shown(place)}" if place else "none (BSAP_CACHE is empty)"
    say(f"cache     {used}")
    say(f"disk      {_bytes(shutil.disk_usage(cli.ROOT).free)} free\nweights")

    wanted: dict[str, tuple[set[Weights], set[Data]]] = {}  # by each run
    broken, known, folder = {}, None, cli.ROOT / "notebooks"
    for params in sorted(folder.glob("params/*.yaml"), key=lambda path: (path.stem != "sample", path)):
        try:
            known = known or {file.stem: cli.declared(file) for file in sorted(folder.glob("*.ipynb"))}
            wanted[params.stem] = needs(params, known)
        except SystemExit as error:  # of cli.fail
            broken[params.stem] = _short(error).removeprefix("bsap: ")
    weights = {one: "" for pairs, _ in wanted.values() for one in sorted(pairs)}  # what is wrong with each, if anything
    data = {one: "" for _, sets in wanted.values() for one in sorted(sets)}

    hub = None  # whether it answers: asked only where something is missing
    for model, tag in weights:
        remedy = ""
        try:
            find_weights(model, tag)
        except (scoring.ModelError, ValueError) as error:  # a ValueError is the hub's, for what is no name there
            weights[model, tag] = _short(error)
            if weights[model, tag].startswith("not in") and not model.startswith("local-dir:"):
                first, hub = hub is None, scoring._hub_is_reachable() if hub is None else hub
                page = open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/")
                how = f"{constants.ENDPOINT} cannot be reached: {scoring._where_to_get(model, tag)}"
                how = f"likewise from {constants.ENDPOINT}/{page}" if page and not first else how
                remedy = f"\n      {'the first run fetches them' if hub else how}"
        say(_line(f"{model} {tag}", weights[model, tag]) + remedy)
    say("data")
    problems = {}
    for root, name in dict.fromkeys(one[:2] for one in data):
        parts = zip(*(one[2:] for one in data if one[:2] == (root, name)), strict=True)
        splits, proposals = (sorted(set(part)) for part in parts)
        found = problems[root, name] = data_problems(root, name, splits, proposals)
        where = "" if root == cli.ROOT / "data" else f" --root {root}"
        command = f"bsap data get {name} --split {','.join(splits)}{where}"
        say(
            _line(
                f"{name} {','.join(splits)}", "\n      ".join([*found, *[command] * (bool(found) and name in SPLITS)])
            )
        )
    say("runs")
    lacks = {}
    for stem, (pairs, sets) in wanted.items():
        models = [model for model, tag in sorted(pairs) if weights[model, tag]]
        lacks[stem] = models + sorted({name for root, name, *_ in sets if problems[root, name]})
    for stem, what in (lacks | {stem: [why] for stem, why in broken.items()}).items():
        say(_line(stem, "lacks " * (stem in lacks and bool(what)) + ", ".join(what)))
    ready = [stem for stem, what in lacks.items() if not what]
    following = f"bsap run --all --params notebooks/params/{ready[1]}.yaml" if ready[1:] else "make figures"
    if "sample" not in ready:
        following = "git checkout -- data notebooks   # all that the sample needs is part of the clone"
    say(f"\nNext: {following}")
    return "sample" in ready


def _short(error: BaseException) -> str:
    return str(error).replace(f"{cli.ROOT}/", "")


def _line(what: str, problem: str) -> str:
    return f"  {'✗' if problem else '✓'} {what.strip()}" + (f": {problem}" if problem else "")
