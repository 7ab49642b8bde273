"""RefCOCO, RefCOCO+, RefCOCOg and real CLIP scores from the network (`bsap data get`), and a look at what is here.

Hosts come and go, so a file has several addresses. A mirror with the same file names (BSAP_BASE_URL) replaces them.
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
from bsap_utils.regions import from_boxes, load_candidates
from bsap_utils.scoring import ModelError

KNOWN = pd.read_csv(ROOT / "data/downloads.csv", index_col="file", keep_default_na=False)
HOSTS, HASHES = KNOWN["folders"].str.split().to_dict(), KNOWN["sha256"].to_dict()
SPLITS = {name: ["train", "val", "testA", "testB"] for name in ("refcoco", "refcoco+")}
SPLITS["refcocog"] = ["train", "val", "test"]
WANTED = r"instances\.json|refs\(\w+\)\.p|refcoco.?_dets_dict\.json"  # of what the archives hold
LIMIT, MB = 2_000_000_000, 1 << 20  # bytes of a download, and of what an archive unpacks to
PART = ".part-"  # begins the names of folders for what is not whole yet
WORKERS, PAUSES = 16, (0, 1, 2)  # pictures at a time; seconds before each try of an address
PASSING = (None, 408, 429, 500, 502, 503, 504)  # what may pass: a broken connection, and these answers


def stream(url: str, path: str, _: Any) -> None:
    """Get a file for pooch; ValueError beyond LIMIT bytes, for a compressed answer can grow without end."""
    with requests.get(url, stream=True, timeout=(5, 30)) as answer, open(path, "wb") as file:
        answer.raise_for_status()
        size = int(answer.headers.get("content-length", 0)) // MB
        for chunk in tqdm(answer.iter_content(MB), url, size, leave=False, unit="MB", disable=size < 9):
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
            except (requests.RequestException, ValueError) as error:
                tried[url] = f"{url}: " + str(error).rpartition("Caused by ")[2]
                status = getattr(getattr(error, "response", None), "status_code", None)
                if isinstance(error, ValueError) or status not in PASSING:
                    urls.remove(url)
    hint = f"Is HTTPS_PROXY or ALL_PROXY wrong? Else put it at {target}, or name a mirror: BSAP_BASE_URL."
    raise DatasetError("\n  ".join([f"{file} cannot be got:", *tried.values(), hint]))


def install(place: Path, accept: Callable[[Path], Any], archive: Path) -> None:
    """Move the files of an archive whose names match WANTED to `place`, if `accept` takes the folder they are in."""
    opener: Any = zipfile.ZipFile if (is_zip := archive.suffix == ".zip") else tarfile.open
    with TemporaryDirectory(prefix=PART, dir=archive.parent) as folder:
        with reading(archive, "a whole archive that is safe to unpack"), opener(archive) as opened:
            sizes = [one.file_size for one in opened.infolist()] if is_zip else [one.size for one in opened]
            if sum(sizes) > LIMIT:
                raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
            opened.extractall(folder, **({} if is_zip else {"filter": "data"}))  # neither lets anything out
        staged = Path(folder, "new", place.name)
        staged.mkdir(parents=True)
        for path in Path(folder).rglob("*"):
            if re.fullmatch(WANTED, path.name) and path.is_file() and not path.is_symlink():
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
    for left in root.rglob(f"{PART}????????"):  # by downloads that were killed
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    if name == "clip-scores":
        return get_scores(folder, base_url)
    if not (folder / "instances.json").is_file() or not [*folder.glob("refs(*).p")]:
        unpack = partial(install, folder, lambda staged: load_refer(staged.parent, name))
        if why := problem(fetch, f"{name}.zip", root / f"{name}.zip", base_url, unpack):
            print(f"{why}\nLists take its place: enough for REC with detections, not for PROPOSALS gt or masks.")
            for file in (f"{name}_{split}.json" for split in splits):
                fetch(file, folder / file, base_url, read_json)
    ds, asked = load_refer(root, name), read_json(record) if record.is_file() else {}
    write_file(record, json.dumps(asked | {name: sorted({*splits, *asked.get(name, [])})}).encode())
    if not boxes.is_file():
        unpack = partial(install, root, lambda staged: from_boxes(ds, staged / boxes.name))
        if why := problem(fetch, "reclip_data.tar.gz", root / "reclip_data.tar.gz", base_url, unpack):
            lacking = [f"{why}\n  Without detections only PROPOSALS gt can be evaluated."]
    return lacking + get_pictures(ds.select(split=splits), base_url, images)


def get_scores(folder: Path, base_url: str | None) -> list[str]:
    """Fetch two sets of real CLIP features; the second is a torch file, read without running anything in it."""

    def repack(path: Path) -> None:
        found = torch.load(path, weights_only=True, map_location="cpu")
        np.savez_compressed(path, images=found["img_features"].float(), texts=found["text_features"].float())

    fetch("features_clip.npy", folder / "coco_val2017_vitb16.npy", base_url, np.load)
    if not (folder / "things_vith14.npz").is_file():
        fetch("ViT-H-14_features_test.pt", folder / "things_vith14.npz", base_url, repack)
    return []


def get_pictures(ds: ReferDataset, base_url: str | None, images: Path | None) -> list[str]:
    """Link or fetch the pictures that are not there and whole; return what could not be got, a line each."""
    coco = {path.name[-16:]: path for path in images.rglob("*.jpg")} if images else {}  # 2017 has numbers only as names

    def get_one(image_id: int) -> str:
        path, whole = ds.image_path(image_id), lambda file: replace(ds, image_root=file.parent).load_image(image_id)
        if not path.is_file() and (source := coco.get(path.name[-16:])):
            path.unlink(missing_ok=True)  # a link to nowhere
            path.symlink_to(source.resolve())
        if not problem(whole, path):
            return ""
        path.unlink(missing_ok=True)
        return problem(fetch, f"train2014/{path.name}", path, base_url, whole)

    lacking, missing = list[str](), len(ds.missing_images())
    ids = sorted(ds.images.index, key=lambda image_id: ds.image_path(image_id).is_file())  # missing ones first
    ds.image_root.mkdir(parents=True, exist_ok=True)
    print(f"{ds.name}: {len(ids):,} pictures, {missing:,} to get, about {missing * 0.165:,.0f} MB", flush=True)
    got = ThreadPoolExecutor(WORKERS).map(get_one, ids)  # which cancels what has not begun when the loop is left
    for number, why in enumerate(tqdm(got, "pictures", len(ids), leave=False), 1):
        lacking += [why] if why else []
        if len(lacking) == number >= WORKERS:  # nothing answers: thousands of time-outs would tell no more
            return [why, f"{missing:,} pictures could not be got: name a COCO folder with --images."]
    return lacking


def check(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a row for each split of all data sets in `folder` (or of the one it is), and all that is wrong, a line each."""
    folder, rows, wrong = Path(folder).resolve(), [], []
    for place in [folder, *sorted(folder.glob("*/"))]:
        try:
            ds = load_refer(root := place.parent, place.name)
        except DatasetError as error:
            wrong += [str(error)] * ("no such file" not in str(error) or any(place.glob("refs(*).p")))
            continue
        asked = read_json(root / "asked.json") if (root / "asked.json").is_file() else {}
        for split in ds.splits:
            part = ds.select(split)
            bad = [why for image_id in part.images.index if (why := problem(part.load_image, image_id))]
            here, masks = len(part.images) - len(bad), part.annotations.loc[part.expressions["ann_id"], "segmentation"]
            row = {"data set": ds.name, "split": split, "expressions": len(part.expressions)}
            row["pictures"] = f"{here:,} of {len(part.images):,}" if bad else "complete"
            row["targets with mask"] = f"{masks.notna().mean():.0%}"
            row["changed"] = ", ".join(f"{count:,} {what}" for what, count in ds.counts.items() if count) or "nothing"
            for source in ("detections", "rpn", "masks"):
                why = problem(load_candidates, part, source, root)
                row[source] = "none" if "no such file" in why else "wrong" if why else "there"
                bad += [why] if row[source] == "wrong" else []
            rows.append(row)
            # a split counts if it was asked of `get` or, where none was, if one of its pictures is here
            if split in asked.get(ds.name, [split] if here else []):
                wrong += [f"{ds.name} {split}: {why}" for why in bad]
    if not any(row["pictures"] == "complete" for row in rows):
        wrong.append(f"{folder}: no split is complete. Get one with `bsap data get NAME --split SPLIT`.")
    return pd.DataFrame(rows), wrong
