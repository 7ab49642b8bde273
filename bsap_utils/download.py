"""RefCOCO, RefCOCO+, RefCOCOg and real CLIP scores from the network (`bsap data get`), and a look at what is here.

Only the COCO pictures that a split needs are fetched: 1,500 for RefCOCO val, not 83,000. pooch downloads, so that a file
gets its name when it is whole and has the known hash. The hosts of this field come and go: a file has several addresses,
and a mirror with the same file names (BSAP_BASE_URL) replaces them all. An archive that lies in the root is not fetched.
"""

import csv
import json
import os
import re
import shutil
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from bsap_utils.datasets import DatasetError, ReferDataset, load_refer, read_json, write_file
from bsap_utils.regions import from_boxes, from_masks
from bsap_utils.scoring import NETWORK

with (ROOT / "data/downloads.csv").open(encoding="utf-8") as file:  # each file's hash, and its folders in order
    KNOWN = {row["file"]: row for row in csv.DictReader(file)}
HOSTS = {name: row["folders"].split() for name, row in KNOWN.items()}
HASHES = {name: row["sha256"] or None for name, row in KNOWN.items()}
SPLITS = dict.fromkeys(("refcoco", "refcoco+"), ["train", "val", "testA", "testB"]) | {
    "refcocog": ["train", "val", "test"]
}
UNREACHABLE = (requests.ConnectionError, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)
LIMIT = 2_000_000_000  # bytes of a download, and of what an archive unpacks to: against bombs
PICTURE_BYTES = 165_000  # mean of COCO train2014
WORKERS, ROUNDS, PAUSE = 16, 3, 1.0  # pictures at a time; tries of each address; seconds before the second


class Bar(tqdm):
    """A progress bar that ends a download which is larger than anything here should be."""

    def __bool__(self) -> bool:  # tqdm's own is false where the size is not known, and pooch asks
        return True

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` bytes; ValueError beyond LIMIT (twice it, for pooch adds the whole size at the end)."""
        self.seen = getattr(self, "seen", 0) + (n or 0)
        if self.seen > 2 * LIMIT:
            raise ValueError(f"sends more than {LIMIT:,} bytes")
        return super().update(n)


def fetch(file: str, target: Path, base_url: str | None, accept: Callable[[Path], Any], quiet: bool = False) -> None:
    """Download `file` to `target` from the first address whose answer `accept` takes; DatasetError if none does.

    What may pass (server errors, broken connections, damaged files) is tried again. A file that is there is accepted.
    """
    if target.is_file():
        return accept(target)
    folders = HOSTS.get(file) or HOSTS.get(file.rpartition("/")[0] + "/", [])
    hosts = [f"{base_url.rstrip('/')}/"] if base_url else [*folders]
    tried = {}
    for number in range(ROUNDS):
        time.sleep(PAUSE * number * bool(hosts))
        for host in [*hosts]:
            url = host + quote(file, safe="/+")
            try:
                with Bar(desc=file, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
                    how = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=(5, 30))
                    pooch.retrieve(url, HASHES.get(file), target.name, target.parent, downloader=how)
                return accept(target)
            except (OSError, ValueError) as error:  # the network's have no number, the disk's do
                target.unlink(missing_ok=True)
                if getattr(error, "errno", None):
                    raise
                tried[url] = str(error).rpartition("Caused by ")[2]
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if status < 500 and status not in (408, 429) or isinstance(error, UNREACHABLE):
                    hosts.remove(host)
    why = "".join(f"\n  {url}: {reason}" for url, reason in tried.items())
    ours = [name for name in os.environ if NETWORK.fullmatch(name) or name == "REQUESTS_CA_BUNDLE"]
    here = [f"{name}={os.environ[name]}" for name in ours if os.environ[name]]
    hint = f" (correct or unset {' '.join(here)}?)" if here and len(hosts) < len(tried) else ""
    raise DatasetError(f"{file} cannot be got{hint}:{why}\n  Put it at {target}, or name a mirror: BSAP_BASE_URL.")


def install(archive: Path, wanted: str, place: Path, accept: Callable[[Path], Any]) -> None:
    """Move the files of an archive whose names match `wanted` to `place`, if `accept` takes the folder they were in.

    Nothing gets out of that folder: zipfile drops what leads out of it, tarfile's data filter refuses it.
    """
    is_zip = archive.suffix == ".zip"
    with TemporaryDirectory(prefix=".part-", dir=archive.parent) as folder:
        staged = Path(folder, "new", place.name)
        try:
            opened: Any = (zipfile.ZipFile if is_zip else tarfile.open)(archive)
            with opened as members:
                sizes = [m.file_size for m in members.infolist()] if is_zip else [m.size for m in members]
            if sum(sizes) > LIMIT:
                raise ValueError(f"unpacks to more than {LIMIT:,} bytes")
            shutil.unpack_archive(archive, folder, **({} if is_zip else {"filter": "data"}))  # type: ignore[arg-type]
        except Exception as error:  # damaged archives raise nearly anything
            if getattr(error, "errno", None):  # the disk's fault
                raise
            raise DatasetError(f"{archive}: cannot be unpacked, or not safely ({error}).") from error
        files = [
            p for p in Path(folder).rglob("*") if re.fullmatch(wanted, p.name) and p.is_file() and not p.is_symlink()
        ]
        staged.mkdir(parents=True)
        files = [file.rename(staged / file.name) for file in files]
        accept(staged)
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.replace(place / file.name)


def get(name: str, splits: list[str], root: Path, base_url: str | None = None, images: Path | None = None) -> list[str]:
    """Fetch a data set's annotations, detections and the pictures of `splits` ([]: all but train), or "clip-scores".

    What is there and whole is not fetched again. `images` is a COCO folder (2014 or 2017) whose pictures are linked.
    Returns what could not be got, a line each. DatasetError where nothing more can be done, OSError from the disk.
    """
    pooch.get_logger().setLevel("ERROR")
    if name == "clip-scores":
        return get_scores(root / name, base_url)
    splits = splits or SPLITS.get(name, [])[1:]
    if not splits or not set(splits) <= set(SPLITS.get(name, [])):
        raise DatasetError(
            f"{name} {','.join(splits)}: there are {SPLITS} and clip-scores; the sample needs no download."
        )
    folder, boxes, lacking = root / name, root / f"{name}_dets_dict.json", []
    if not (folder / "instances.json").is_file() or not [*folder.glob("refs(*).p")]:
        files, load = r"instances\.json|refs\(\w+\)\.p", lambda staged: load_refer(staged.parent, name)
        try:
            fetch(f"{name}.zip", root / f"{name}.zip", base_url, lambda path: install(path, files, folder, load))
        except DatasetError as error:
            print(f"{error}\nLists of expressions and boxes take its place: they are enough for REC with detections, but not "
                  "for PROPOSALS gt, categories, or masks (04).", flush=True)  # fmt: skip
            for split in splits:
                fetch(f"{name}_{split}.json", folder / f"{name}_{split}.json", base_url, read_json)
    ds, known = load_refer(root, name), asked(root)
    write_file(root / "asked.json", json.dumps(known | {name: sorted({*splits, *known.get(name, [])})}).encode())
    if not boxes.is_file():
        files, load = r"refcoco(\+|g|)_dets_dict\.json", lambda staged: from_boxes(ds, staged / boxes.name)
        try:
            fetch(
                archive := "reclip_data.tar.gz", root / archive, base_url, lambda path: install(path, files, root, load)
            )
        except DatasetError as error:
            lacking = [f"{error}\n  Without detections only PROPOSALS gt can be evaluated."]
    ids = sorted({image_id for split in splits for image_id in ds.select(split=split).images.index})
    return lacking + get_pictures(ds, ids, base_url, images)


def asked(root: Path) -> dict[str, list[str]]:
    """The splits that were asked for, by data set."""
    return read_json(root / "asked.json") if (root / "asked.json").is_file() else {}


def get_scores(folder: Path, base_url: str | None) -> list[str]:
    """Fetch the two sets of real CLIP features; the second is a torch file, read without running anything in it."""

    def repack(path: Path) -> None:
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            arrays = {
                new: content[f"{old}_features"].float().numpy() for new, old in (("images", "img"), ("texts", "text"))
            }
        except Exception as error:  # whatever a file that is no such thing leads to
            raise DatasetError(f"no torch file with img_features and text_features ({type(error).__name__})") from error
        write_file(folder / "things_vith14.npz", lambda part: np.savez_compressed(part, **arrays))

    fetch("features_clip.npy", folder / "coco_val2017_vitb16.npy", base_url, np.load)
    if not (folder / "things_vith14.npz").is_file():
        with TemporaryDirectory() as place:
            fetch("ViT-H-14_features_test.pt", Path(place, "features.pt"), base_url, repack)
    return []


def broken(ds: ReferDataset, image_id: int) -> str:
    """What is wrong with a picture, "" if it is whole and of the annotated size."""
    try:
        ds.load_image(image_id)
    except DatasetError as error:
        return str(error)
    return ""


def get_pictures(ds: ReferDataset, ids: Sequence[int], base_url: str | None, images: Path | None) -> list[str]:
    """Link or fetch the pictures that are not there and whole; return what could not be got, a line each."""
    folders = [images / sub for sub in ("", "train2014", "train2017", "val2017")] if images else []
    for path in map(ds.image_path, ids):
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = [folder / name for folder in folders for name in (path.name, path.name.rpartition("_")[2])]
        if not path.is_file() and (source := next(filter(Path.is_file, sources), None)):
            path.unlink(missing_ok=True)  # a link to nowhere
            path.symlink_to(source.resolve())
    wanted = [image_id for image_id in ids if broken(ds, image_id)]
    size = len(wanted) * PICTURE_BYTES
    print(f"{ds.name}: {len(ids):,} pictures, to get: {len(wanted):,}, about {size / 1e6:,.0f} MB", flush=True)
    if shutil.disk_usage(ds.image_path(ids[0]).parent).free < size:
        raise DatasetError(f"The disk has not {size / 1e6:,.0f} MB left. Free some, or choose another --root.")

    def get_one(image_id: int) -> str:
        path, accept = ds.image_path(image_id), lambda _: ds.load_image(image_id)
        path.unlink(missing_ok=True)
        try:
            fetch(f"train2014/{path.name}", path, base_url, accept, quiet=True)
        except DatasetError as error:
            return str(error)
        return ""

    lacking: list[str] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for number, why in enumerate(
            tqdm(pool.map(get_one, wanted), total=len(wanted), desc="pictures", leave=False), 1
        ):
            lacking += [why] if why else []
            if len(lacking) == number >= WORKERS:  # nothing answers: thousands of time-outs would tell no more
                return [lacking[0], f"{len(wanted):,} pictures could not be got: name a COCO folder with --images."]
    return lacking


def check(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """One row for each split of all data sets in `folder` (or of the one it is), and all that is wrong, one line each.

    A split counts where it was asked of `bsap data get` or, in a data set of which nothing was, where one of its pictures
    is here. Then all its pictures must decode and have the annotated size, and its candidates must be plausible.

    >>> table, wrong = check("data/refshapes")
    >>> list(table["split"]), set(table["pictures"]), wrong
    (['test', 'train', 'val'], {'complete'}, [])
    """
    folder, rows, wrong = Path(folder).resolve(), [], []
    marks = r"instances\.json|expressions\.csv|.+_(train|val|test\w*)\.json"
    places = {p.parent for up in ("*", "*/*") for p in folder.glob(up) if re.fullmatch(marks, p.name) and p.is_file()}
    for root, name in sorted((place.parent, place.name) for place in places):
        try:
            ds = load_refer(root, name)
        except DatasetError as error:
            wrong.append(str(error))
            continue
        for split in ds.splits:
            part, row = ds.select(split=split), dict[str, Any]({"data set": name, "split": split})
            bad = [why for image_id in part.images.index if (why := broken(part, image_id))]
            here = len(part.images) - len(bad)
            row |= {"images": len(part.images), "expressions": len(part.expressions)}
            row["pictures"] = f"{here:,} of {len(part.images):,}" if bad else "complete"
            masks = part.annotations.loc[part.expressions["ann_id"].unique(), "segmentation"].notna()
            row["targets with mask"] = f"{masks.mean():.0%}" + " (04 needs all)" * (not masks.all())
            for kind, read in (("dets_dict", from_boxes), ("rpn_dict", from_boxes), ("masks", from_masks)):
                path = root / f"{name}_{kind}.json"
                try:
                    row[kind] = f"{len(read(part, path)) / len(part.images):.1f} an image" if path.is_file() else "none"
                except DatasetError as error:
                    row[kind] = "wrong"
                    bad.append(str(error))
            row["touched up"] = (
                ", ".join(f"{count:,} {what}" for what, count in ds.counts.items() if count) or "nothing"
            )
            rows.append(row)
            if split in asked(root)[name] if name in asked(root) else here:
                wrong += [f"{name} {split}: {why}" for why in bad]
    if not any(row["pictures"] == "complete" for row in rows):
        wrong.append(f"{folder}: no split is complete. Get one with `bsap data get NAME --split SPLIT`.")
    return pd.DataFrame(rows), wrong
