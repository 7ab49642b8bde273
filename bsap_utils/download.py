"""RefCOCO, RefCOCO+, RefCOCOg and real CLIP scores from the network (`bsap data get`), and a look at what is here.

Only the pictures that a split needs are fetched: 1,500 of COCO's 83,000 for RefCOCO val. A file has several addresses, for
hosts come and go; a mirror with the same file names (BSAP_BASE_URL) replaces them, and an archive in the root is used first.
"""

import json
import os
import re
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pooch
import requests
import torch
from tqdm import tqdm

from bsap_utils import ROOT
from bsap_utils.datasets import DatasetError, ReferDataset, load_refer, read_json, reading, write_file
from bsap_utils.regions import from_boxes, from_masks
from bsap_utils.scoring import NETWORK, ModelError

KNOWN = pd.read_csv(ROOT / "data/downloads.csv", index_col="file", keep_default_na=False)
HOSTS, HASHES = KNOWN["folders"].str.split().to_dict(), KNOWN["sha256"].to_dict()
SPLITS = {"refcoco": ["train", "val", "testA", "testB"], "refcoco+": ["train", "val", "testA", "testB"]}
SPLITS["refcocog"] = ["train", "val", "test"]
LIMIT, MB = 2_000_000_000, 1 << 20  # bytes of a download, and of what an archive unpacks to
PART = f".part-{os.getpid()}-"  # begins the name of this process's folders for what is not whole yet
UNREACHABLE = (requests.ConnectionError, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)
WORKERS, PAUSES = 16, (0, 1, 2)  # pictures at a time; seconds before each try of an address


def stream(url: str, path: str, _: Any) -> None:
    """Get a file for pooch; ValueError beyond LIMIT bytes, for a compressed answer can grow without end."""
    with requests.get(url, stream=True, timeout=(5, 30)) as answer, open(path, "wb") as file:
        answer.raise_for_status()
        size, name = int(answer.headers.get("content-length", 0)), url.rpartition("/")[2]
        for chunk in tqdm(answer.iter_content(MB), name, size // MB, leave=False, unit="MB", disable=size < 9 * MB):
            file.write(chunk)
            if file.tell() > LIMIT:
                raise ValueError(f"sends more than {LIMIT:,} bytes")


def fetch(file: str, target: Path, base_url: str | None, accept: Callable[[Path], Any]) -> None:
    """Download `file`, if it is not there, from the first address whose answer `accept` takes; DatasetError if none does."""
    if target.is_file():
        return accept(target)
    hosts = [f"{base_url.rstrip('/')}/"] if base_url else HOSTS.get(file) or HOSTS.get(file.split("/")[0] + "/", [])
    urls, tried = [host + quote(file, safe="/+") for host in hosts], {}
    for pause in PAUSES:
        time.sleep(pause if urls else 0)
        for url in [*urls]:
            try:
                with TemporaryDirectory(prefix=PART, dir=target.parent) as part:
                    accept(Path(pooch.retrieve(url, HASHES.get(file) or None, target.name, part, downloader=stream)))
                    return os.replace(f"{part}/{target.name}", target)
            except (OSError, ValueError) as error:  # the network's have no number, the disk's do
                if getattr(error, "errno", None):
                    raise
                tried[url] = re.sub(rf"\S*{PART}\w+/", "", str(error).rpartition("Caused by ")[2])
                # server errors, broken connections and damaged files may pass
                status = getattr(getattr(error, "response", None), "status_code", 500)
                wrong = isinstance(error, UNREACHABLE) or type(error) is OSError  # no certificates where they should be
                if wrong or status < 500 and status not in (408, 429):
                    urls.remove(url)
    why = "".join(f"\n  {url}: {reason}" for url, reason in tried.items())
    here = (f" Is {name}={value} right?" for name, value in os.environ.items() if value and NETWORK.fullmatch(name))
    hint = "".join(here) if len(urls) < len(tried) else ""
    raise DatasetError(f"{file} cannot be got:{why}\n  Put it at {target}, or name a mirror: BSAP_BASE_URL.{hint}")


def install(archive: Path, wanted: str, place: Path, accept: Callable[[Path], Any]) -> None:
    """Move the files of an archive whose names match `wanted` to `place`, if `accept` takes the folder they are in.

    Nothing gets out of that folder: zipfile keeps in it what would lead out, tarfile's data filter refuses it.
    """
    is_zip = archive.suffix == ".zip"
    opener: Any = zipfile.ZipFile if is_zip else tarfile.open
    with TemporaryDirectory(prefix=PART, dir=archive.parent) as folder:
        with reading(archive, "a whole archive that is safe to unpack"), opener(archive) as opened:
            if sum(m.file_size if is_zip else m.size for m in (opened.infolist() if is_zip else opened)) > LIMIT:
                raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
            opened.extractall(folder, **({} if is_zip else {"filter": "data"}))
        staged = Path(folder, "new", place.name)
        staged.mkdir(parents=True)
        for path in Path(folder).rglob("*"):
            if re.fullmatch(wanted, path.name) and path.is_file() and not path.is_symlink():
                path.rename(staged / path.name)
        accept(staged)
        for path in staged.iterdir():
            path.replace(place / path.name)


def problem(action: Callable, *arguments: Any) -> str:
    """Return the DatasetError or ModelError that an action ends in, "" if in none."""
    try:
        action(*arguments)
    except (DatasetError, ModelError) as error:
        return str(error)
    return ""


def get(name: str, splits: list[str], root: Path, base_url: str | None = None, images: Path | None = None) -> list[str]:
    """Fetch a data set's annotations, detections and the pictures of `splits` ([]: all but train), or "clip-scores".

    What is there and whole is not fetched again. `images` is a COCO folder (2014 or 2017) whose pictures are linked.
    Returns what could not be got, a line each. DatasetError where nothing more can be done, OSError from the disk.
    """
    folder, boxes, record, lacking = root / name, root / f"{name}_dets_dict.json", root / "asked.json", []
    splits = splits or SPLITS.get(name, [])[1:]
    if name != "clip-scores" and not (splits and {*splits} <= {*SPLITS.get(name, [])}):
        raise DatasetError(f"{name} {','.join(splits)}: there are {SPLITS} and clip-scores.")
    pooch.get_logger().setLevel("ERROR")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(root)
    if name == "clip-scores":
        return get_scores(folder, base_url)
    if not (folder / "instances.json").is_file() or not [*folder.glob("refs(*).p")]:
        unpack = partial(install, wanted=r"instances\.json|refs\(\w+\)\.p", place=folder,
                         accept=lambda staged: load_refer(staged.parent, name))  # fmt: skip
        if why := problem(fetch, f"{name}.zip", root / f"{name}.zip", base_url, unpack):
            print(f"{why}\nLists of expressions and boxes take its place: they are enough for REC with detections, but not "
                  "for PROPOSALS gt, categories, or masks (04).", flush=True)  # fmt: skip
            for file in (f"{name}_{split}.json" for split in splits):
                fetch(file, folder / file, base_url, read_json)
    ds, asked = load_refer(root, name), read_json(record) if record.is_file() else {}
    write_file(record, json.dumps(asked | {name: sorted({*splits, *asked.get(name, [])})}).encode())
    if not boxes.is_file():
        unpack = partial(install, wanted=r"refcoco(\+|g|)_dets_dict\.json", place=root,
                         accept=lambda staged: from_boxes(ds, staged / boxes.name))  # fmt: skip
        if why := problem(fetch, "reclip_data.tar.gz", root / "reclip_data.tar.gz", base_url, unpack):
            lacking = [f"{why}\n  Without detections only PROPOSALS gt can be evaluated."]
    return lacking + get_pictures(ds.select(split=splits), base_url, images)


def sweep(root: Path) -> None:
    """Remove the `.part-` folders of processes that were killed."""
    for left in root.rglob(".part-[0-9]*-????????"):
        try:
            os.kill(int(left.name.split("-")[1]), 0)  # only asks whether the process is there
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # it is, and another user's
            pass


def get_scores(folder: Path, base_url: str | None) -> list[str]:
    """Fetch two sets of real CLIP features; the second is a torch file, read without running anything in it."""

    def repack(path: Path) -> None:
        with reading(path, "a torch file with img_features and text_features"):
            found = torch.load(path, weights_only=True, map_location="cpu")
            images, texts = (found[key].float().numpy() for key in ("img_features", "text_features"))
        write_file(folder / "things_vith14.npz", lambda part: np.savez_compressed(part, images=images, texts=texts))

    fetch("features_clip.npy", folder / "coco_val2017_vitb16.npy", base_url, np.load)
    if not (folder / "things_vith14.npz").is_file():
        with TemporaryDirectory(prefix=PART, dir=folder) as part:
            fetch("ViT-H-14_features_test.pt", Path(part, "features.pt"), base_url, repack)
    return []


def get_pictures(ds: ReferDataset, base_url: str | None, images: Path | None) -> list[str]:
    """Link or fetch the pictures that are not there and whole; return what could not be got, a line each."""
    folders = [images / sub for sub in ("", "train2014", "train2017", "val2017")] if images else []

    def get_one(image_id: int) -> str:
        path, whole = ds.image_path(image_id), lambda file: replace(ds, image_root=file.parent).load_image(image_id)
        sources = [folder / name for folder in folders for name in (path.name, path.name.rpartition("_")[2])]
        if not path.is_file() and (source := next(filter(Path.is_file, sources), None)):
            path.unlink(missing_ok=True)  # a link to nowhere
            path.symlink_to(source.resolve())
        if not problem(whole, path):
            return ""
        path.unlink(missing_ok=True)
        return problem(fetch, f"train2014/{path.name}", path, base_url, whole)

    lacking, missing = list[str](), len(ds.missing_images())
    ids = sorted(ds.images.index, key=lambda image_id: ds.image_path(image_id).is_file())  # missing ones first
    ds.image_root.mkdir(parents=True, exist_ok=True)
    print(f"{ds.name}: {len(ds.images):,} pictures, {missing:,} to get, about {missing * 0.165:,.0f} MB", flush=True)
    if shutil.disk_usage(ds.image_root).free < missing * 165_000:
        raise DatasetError("The disk has not so much left. Free some, or choose another --root.")
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for number, why in enumerate(tqdm(pool.map(get_one, ids), "pictures", len(ids), leave=False), 1):
            lacking += [why] if why else []
            if len(lacking) == number >= WORKERS:  # nothing answers: thousands of time-outs would tell no more
                return [why, f"{missing:,} pictures could not be got: name a COCO folder with --images."]
    finally:  # Ctrl-C, too: what has not begun does not begin
        pool.shutdown(wait=False, cancel_futures=True)
    return lacking


def check(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """One row for each split of all data sets in `folder` (or of the one it is), and all that is wrong, one line each.

    A split counts where it was asked of `get` or, in a data set of which nothing was, where one of its pictures is here.
    """
    folder, rows, wrong = Path(folder).resolve(), [], []
    marks = re.compile(r"instances\.json|expressions\.csv|.+_(train|val|test\w*)\.json")
    places = {path.parent for up in ("*", "*/*") for path in folder.glob(up) if marks.fullmatch(path.name)}
    for root, name in sorted((place.parent, place.name) for place in places):
        asked = read_json(root / "asked.json") if (root / "asked.json").is_file() else {}
        try:
            ds = load_refer(root, name)
        except DatasetError as error:
            wrong.append(str(error))
            continue
        for split in ds.splits:
            row, bad, here = look(ds.select(split=split), root)
            rows.append({"data set": name, "split": split} | row)
            if split in asked[name] if name in asked else here:
                wrong += [f"{name} {split}: {why}" for why in bad]
    if not any(row["pictures"] == "complete" for row in rows):
        wrong.append(f"{folder}: no split is complete. Get one with `bsap data get NAME --split SPLIT`.")
    return pd.DataFrame(rows), wrong


def look(ds: ReferDataset, root: Path) -> tuple[dict[str, Any], list[str], int]:
    """A row of `check` for one split, what is wrong with it, and how many of its pictures are there and whole."""
    bad = [why for image_id in ds.images.index if (why := problem(ds.load_image, image_id))]
    here = len(ds.images) - len(bad)
    masks = ds.annotations.loc[ds.expressions["ann_id"].unique(), "segmentation"].notna()
    row: dict[str, Any] = {"images": len(ds.images), "expressions": len(ds.expressions)}
    row["pictures"] = f"{here:,} of {len(ds.images):,}" if bad else "complete"
    row["targets with mask"] = f"{masks.mean():.0%}" + " (04 needs all)" * (not masks.all())
    for kind, read in (("dets_dict", from_boxes), ("rpn_dict", from_boxes), ("masks", from_masks)):
        path = root / f"{ds.name}_{kind}.json"
        why = problem(read, ds, path) if path.is_file() else ""
        row[kind] = "wrong" if why else "there" if path.is_file() else "none"
        bad += [why] if why else []
    row["touched up"] = ", ".join(f"{count:,} {what}" for what, count in ds.counts.items() if count) or "nothing"
    return row, bad, here
