"""RefCOCO, RefCOCO+ and RefCOCOg from the network (`bsap data get`), and a check of what is there (`bsap data check`).

Only the COCO pictures that a split needs are fetched: 1,500 for RefCOCO val, not 83,000. A file gets its name when it
is whole, and its SHA-256 goes to `root/SHA256SUMS`, whose comments tell which splits were asked for. The hosts of this
field come and go: each file has several addresses, and a mirror with the same names (`refcoco.zip`,
`reclip_data.tar.gz`, `train2014/COCO_train2014_….jpg`) replaces them all.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import httpx
import pandas as pd
from tqdm import tqdm

from .datasets import CLIPPED, NO_AREA, DatasetError, ReferDataset, load_refer
from .proposals import _WHOLE, from_boxes

_UNC = "https://bvisionweb1.cs.unc.edu/licheng/referit/data/"
_SAVED = "https://web.archive.org/web/{}/" + _UNC  # the Web Archive's copies
_DETECTIONS, _PICTURES = "reclip_data.tar.gz", "train2014/"
ADDRESSES = {  # tried in this order; --base-url or BSAP_BASE_URL replaces them all
    "refcoco.zip": [_UNC + "refcoco.zip", _SAVED.format("20220413011718") + "refcoco.zip"],
    "refcoco+.zip": [_UNC + "refcoco+.zip", _SAVED.format("20220413011656") + "refcoco+.zip"],
    "refcocog.zip": [_UNC + "refcocog.zip", _SAVED.format("20220413012904") + "refcocog.zip"],
    _DETECTIONS: [  # ReCLIP's own bucket was reported gone in 2024; the second is a copy by authors who build on it
        "https://storage.googleapis.com/reclip-sanjays/reclip_data.tar.gz",
        "https://huggingface.co/datasets/CresCat01/RefCOCO-Triplets/resolve/main/reclip_data.tar.gz",
    ],
    _PICTURES: [
        "http://images.cocodataset.org/train2014/",
        "https://s3.amazonaws.com/images.cocodataset.org/train2014/",
    ],
}
SPLITS = {  # with the published numbers of images, for an estimate before there are annotations
    "refcoco": {"train": 16_994, "val": 1_500, "testA": 750, "testB": 750},
    "refcoco+": {"train": 16_992, "val": 1_500, "testA": 750, "testB": 750},
    "refcocog": {"train": 21_899, "val": 1_300, "test": 2_600},  # split by umd
}
FOLDER = Path("images/mscoco/images/train2014")  # of the pictures, below the root
WORKERS, ROUNDS, BACK_OFF = 16, 3, 1.0  # at a time; tries of each address; seconds before the second, then double
PICTURE_BYTES = 165_000  # mean of COCO train2014, for estimates
DOWNLOAD_LIMIT, UNPACKED_LIMIT = 2_000_000_000, 4_000_000_000  # bytes of one file, of one archive: against bombs
_MISSING, _NO_ANSWER = "missing", "no answer"
_BY_HAND = "a mirror with --base-url or BSAP_BASE_URL; then run this again."
_UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError, httpx.InvalidURL)
_bytes = partial(tqdm.format_sizeof, suffix="B")
Sums = dict[str, str]  # path below the root → SHA-256


def get(
    name: str, splits: list[str] | None = None, root: Any = "data", base_url: str | None = None, images: Any = None
) -> list[str]:
    """Fetch annotations, detected proposals and the pictures of `splits` (all but train when not given) into `root`.

    What is there and whole is not fetched again; an archive put into `root` by hand is used instead of its addresses.
    `images` is a COCO folder (2014 or 2017) whose pictures are linked; what it lacks is fetched. Says what it is going
    to fetch. Returns what could not be got: an empty list means that the splits are complete. Raises DatasetError where
    nothing more can be done (unknown names, no annotations to be had), OSError when the disk is full or not writable.
    """
    root, base_url = Path(root), base_url or os.environ.get("BSAP_BASE_URL")
    if name not in SPLITS:
        raise DatasetError(f"{name}: no data set to get. There are {', '.join(SPLITS)}; refshapes needs no download.")
    splits = splits or [split for split in SPLITS[name] if split != "train"]
    if not set(splits) <= set(SPLITS[name]):
        raise DatasetError(f"{name} has no split {' or '.join(splits)}. Splits: {', '.join(SPLITS[name])}.")
    if images is not None and not Path(images).is_dir():
        raise DatasetError(f"{images}: there is no such folder. --images names one with the pictures of COCO.")
    annotations = [root / name / "instances.json", root / name / f"refs({'umd' if name == 'refcocog' else 'unc'}).p"]
    detections, sums, problems = root / f"{name}_dets_dict.json", _read_sums(root)[0], []
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for old in (*root.glob(".part-*"), *(root / FOLDER).glob(".part-*")):  # of a run that was killed
        with suppress(FileNotFoundError):  # another run's, which has just ended
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(30, connect=5)) as client:
        fetch = partial(_fetch, client, base_url)
        get_archive = partial(_get_archive, fetch, root, sums)
        try:
            load = cache(partial(load_refer, root, name))
            ds = None if any(_wrong(root, path, sums, load) for path in annotations) else load()
            size = (estimate := sum(SPLITS[name][split] for split in splits)) * PICTURE_BYTES
            print(f"{name} ({', '.join(splits)}) into {root}: 1 archive of annotations, 1 of detections, and about")
            print(f"  {estimate:,} pictures of {_bytes(size)} (an estimate), less what is there", flush=True)
            if ds is None:
                members = r"instances\.json|refs\(\w+\)\.p"
                get_archive(f"{name}.zip", members, annotations, lambda file: load_refer(file.parents[1], name))
                ds = load_refer(root, name)
            if _wrong(root, detections, sums, partial(from_boxes, ds, detections)):
                try:
                    get_archive(_DETECTIONS, r"refcoco(\+|g|)_dets_dict\.json", [detections], partial(from_boxes, ds))
                except DatasetError as error:
                    problems.append(f"{error}\n  Without detections only PROPOSALS gt can be evaluated.")
            _write_sums(root, sums, {f"{name} {split}" for split in splits})  # asked for, even if interrupted below
            names = pd.concat([ds.select(split=split).images["file_name"] for split in splits])
            problems += _get_pictures(fetch, root, ds, names[~names.index.duplicated()], images, sums)
        finally:
            if sums:
                _write_sums(root, sums, set())
    return problems


def check(folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Return one row for each split of all data sets under `folder`, and all that is wrong, one line each.

    A split counts where it was asked of `bsap data get` or, in a data set of which nothing was asked, where one of its
    pictures is there. It is complete when annotations, detections and all its pictures are as SHA256SUMS has them; what
    that does not list must load, a picture decode and have the annotated size. Whatever keeps a split that counts from
    being complete is wrong, and so is a folder without a complete split. Other splits may have some pictures, since
    data sets share them: their state tells how many. Raises DatasetError where there is no data
    set at all.

    >>> table, wrong = check("data/refshapes")
    >>> list(table["split"]), set(table["state"]), wrong
    (['test', 'train', 'val'], {'complete'}, [])
    """
    folder = Path(folder) if Path(folder).name.strip(".") else Path(folder).resolve()
    patterns = [up + file for up in ("", "*/", "*/*/") for file in ("instances.json", "refs(*).p")]
    found = sorted({path.parent for pattern in patterns for path in folder.glob(pattern) if ".part-" not in str(path)})
    if not found:
        raise DatasetError(f"{folder}: holds no data set (<name>/instances.json). Try `bsap data get refcoco`.")
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for root in dict.fromkeys(path.parent for path in found):
        sums, asked = _read_sums(root)
        for file in (root / key for key in sums if not key.startswith(FOLDER.as_posix())):
            wrong += [f"{file}: {what}" for what in [_wrong(root, file, sums, lambda: None)] if what]
        for name in (path.name for path in found if path.parent == root):
            try:
                rows += _rows(root, name, sums, {one.split()[-1] for one in asked if one.startswith(f"{name} ")}, wrong)
            except DatasetError as error:
                wrong.append(str(error))
    if not any(row["state"] == "complete" for row in rows):
        wrong.append(f"{folder}: no split is complete. Get one with `bsap data get NAME --split SPLIT`.")
    return pd.DataFrame(rows), wrong


def _rows(root: Path, name: str, sums: Sums, asked: set[str], wrong: list[str]) -> list[dict[str, Any]]:
    """Return what `check` tells of each split of one data set, and append to `wrong` what is."""
    ds, rows = load_refer(root, name), []
    state = _states(root, ds, ds.images.index, sums)
    for split in ds.splits:
        part = ds.select(split=split)
        n, bad = len(part.images), {image_id: state[image_id] for image_id in part.images.index if state[image_id]}
        missing = list(bad.values()).count(_MISSING)
        counts = split in asked or (not asked and missing < n)
        try:
            boxes, status = from_boxes(part, root / f"{name}_dets_dict.json"), "complete"
        except DatasetError as error:
            boxes, status = part.regions[:0], "no detections"
            wrong += [f"{name} {split}: {error} Without detections only PROPOSALS gt can be evaluated."] * counts
        if bad and counts:
            status = f"INCOMPLETE: {missing:,} missing, {len(bad) - missing:,} broken"
            wrong += [f"{name} {split}: {part.image_path(image_id)}: {what}" for image_id, what in bad.items()]
        elif bad:
            status = f"not asked for, has {n - missing:,} pictures" if missing < n else "pictures not downloaded"
        seen = {CLIPPED: 0, NO_AREA: 0, _WHOLE: 0} | boxes.attrs.get("counts", {})
        touched = sum(part.counts[key] + seen[key] for key in (CLIPPED, NO_AREA))
        total = len(part.regions) + part.counts[NO_AREA] + len(boxes) - seen[_WHOLE] + seen[NO_AREA]
        row = {"data set": name, "split": split, "images": n, "without box": seen[_WHOLE], "regions": len(part.regions)}
        row |= {"expressions": len(part.expressions), "expressions/image": round(len(part.expressions) / n, 2)}
        row |= {"candidates/image": round(len(boxes) / n, 2)}
        rows.append(row | {"touched up": f"{touched / max(total, 1):.2%}", "state": status})
    return rows


def _fetch(
    client: httpx.Client, base_url: str | None, file: str, name: str, part: Path, accept: Callable[[Path], None]
) -> dict[str, str]:
    """Download to `part` from the first address of `file` whose answer `accept` takes; else return what each one said.

    `file` is a key of ADDRESSES; a picture's `name` follows it. `accept` moves the download to its place or raises
    DatasetError. What may pass (server errors, broken connections, damaged files) is tried again, all addresses in
    turn, after a pause that doubles; an address that refuses or cannot be reached at all is left at once.
    """
    urls, said = [f"{base_url.rstrip('/')}/{file}"] if base_url else ADDRESSES[file], {}
    for number in range(ROUNDS):
        time.sleep(BACK_OFF * 2 ** (number - 1) if number and urls else 0)
        for url in urls:
            again = True
            try:
                with client.stream("GET", url + quote(name)) as response, part.open("wb") as target:
                    total = int(response.raise_for_status().headers.get("content-length", 0)) or None
                    if not name:
                        print(f"  {file}: {_bytes(total) if total else 'size not told'}, from {url}", flush=True)
                        _need_room(part.parent, 6 * (total or 0))  # JSON and pickles unpack to about five times as much
                    with tqdm(total=total, desc=file, unit="B", unit_scale=True, disable=bool(name)) as bar:
                        for chunk in response.iter_bytes(1 << 16):
                            bar.update(target.write(chunk))
                            if target.tell() > DOWNLOAD_LIMIT:
                                raise DatasetError(f"sends more than {_bytes(DOWNLOAD_LIMIT)}")
                accept(part)
                return {}
            except httpx.HTTPStatusError as error:
                said[url] = f"{error.response.status_code} {error.response.reason_phrase}"
                again = error.response.status_code >= 500 or error.response.status_code in (408, 429)
            except DatasetError as error:
                said[url] = str(error).replace(f"{part.parent}/", "").removeprefix(f"{part.name}: ")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                said[url] = f"{_NO_ANSWER} ({error or type(error).__name__})"
                again = not isinstance(error, _UNREACHABLE)
            urls = urls if again else [other for other in urls if other != url]
    return said


def _get_archive(
    fetch: Callable, root: Path, sums: Sums, archive: str, members: str, targets: list[Path], load: Callable
) -> None:
    """Unpack an archive's `members` beside `targets`, the first of which must `load`; DatasetError if it cannot be had."""

    def accept(path: Path) -> None:
        unpacked = {file.name: file for file in _unpack(path, members, staging / "all")}
        if lacking := {target.name for target in targets} - unpacked.keys():
            raise DatasetError(f"{path}: lacks {', '.join(sorted(lacking))}.")
        load(unpacked[targets[0].name])
        for target in (targets[0].with_name(name) for name in unpacked):
            if target in targets or not target.exists():
                _place(root, unpacked[target.name], target, sums)

    with TemporaryDirectory(prefix=".part-", dir=root) as folder:
        staging = Path(folder)
        if (root / archive).is_file():
            return accept(root / archive)
        if said := fetch(archive, "", staging / archive, accept):
            tried = "".join(f"\n  {url}: {why}" for url, why in said.items())
            by_hand = f"put it at {root / archive}, or name {_BY_HAND}"
            raise DatasetError(f"{archive} cannot be got. Tried:{tried}\n  By hand: {by_hand}")


def _get_pictures(fetch: Callable, root: Path, ds: ReferDataset, names: pd.Series, coco: Any, sums: Sums) -> list[str]:
    """Link or fetch the pictures `names` that are not there and whole; return what could not be got, one line each."""
    linked = sum(_link(Path(coco), ds.image_path(image_id)) for image_id in names.index) if coco else 0
    wanted = [image_id for image_id, what in _states(root, ds, names.index, sums).items() if what]
    size, there = len(wanted) * PICTURE_BYTES, len(names) - len(wanted)
    print(f"  pictures: {len(names):,}, {there:,} of them there ({linked:,} newly linked);", end=" ")
    print(f"to get: {len(wanted):,}, about {_bytes(size)} (an estimate)" if wanted else "none to get", flush=True)
    _need_room(root, size)

    def fetch_one(image_id: int) -> dict[str, str]:
        part = staged.image_path(image_id)
        part.parent.mkdir(parents=True, exist_ok=True)
        return fetch(_PICTURES, names[image_id], part, partial(accept, image_id))

    def accept(image_id: int, path: Path) -> None:
        staged.load_image(image_id)
        _place(root, path, ds.image_path(image_id), sums)

    failed, left, lost = [], dict.fromkeys(wanted), 0
    with TemporaryDirectory(prefix=".part-", dir=root / FOLDER) as staging:
        staged = dataclasses.replace(ds, image_root=Path(staging))
        for image_id, said in _each(fetch_one, wanted, "pictures"):
            del left[image_id]
            failed += [f"{names[image_id]}: " + "; ".join(f"{url}: {why}" for url, why in said.items())] if said else []
            lost = lost + 1 if said and all(why.startswith(_NO_ANSWER) for why in said.values()) else 0
            if lost >= WORKERS:  # in a row: the network is gone, and thousands of time-outs would tell no more
                break
    failed += [f"{names[image_id]}: not tried, since nothing answers any more" for image_id in left]
    by_hand = f"copy them to {root / FOLDER}, or name a COCO folder with --images, or {_BY_HAND}"
    return [*failed, f"{len(failed):,} pictures could not be got. By hand: {by_hand}"] if failed else []


def _link(coco: Path, target: Path) -> bool:
    """Link a picture of a COCO folder, of 2014 or 2017 (whose names are the digits only), unless `target` is there."""
    folders = [coco, coco / "train2014", coco / "train2017", coco / "val2017"]
    sources = (folder / name for folder in folders for name in (target.name, target.name.rpartition("_")[2]))
    source = None if target.is_file() else next((path for path in sources if path.is_file()), None)
    if source:
        target.unlink(missing_ok=True)  # a link to nowhere
        target.symlink_to(source.resolve())
    return source is not None


def _each(work: Callable[[int], Any], ids: Iterable[int], what: str) -> Iterator[tuple[int, Any]]:
    """Yield (id, work(id)) as they finish, WORKERS at a time; what is not begun is dropped when the caller stops."""
    pool = ThreadPoolExecutor(WORKERS)
    futures = {pool.submit(work, image_id): image_id for image_id in ids}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=what, unit=" pictures", disable=not futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _states(root: Path, ds: ReferDataset, ids: pd.Index, sums: Sums) -> dict[int, str]:
    """Return what is wrong with each picture ("": nothing), by image_id."""
    work = lambda image_id: _wrong(root, ds.image_path(image_id), sums, partial(ds.load_image, image_id))  # noqa: E731
    return dict(sorted(_each(work, ids, f"checking {ds.name}")))


def _unpack(path: Path, members: str, folder: Path) -> list[Path]:
    """Unpack into `folder`, and return the plain files whose name matches `members`. Nothing can get out of the folder:
    `shutil` skips such names in a zip, tarfile's data filter refuses them, and links that lead out. Raises DatasetError
    for that, for a broken archive, and for more than UNPACKED_LIMIT."""
    is_zip, total = path.suffix == ".zip", 0
    shutil.rmtree(folder, ignore_errors=True)  # what another address sent
    try:
        if is_zip:  # no more than the size that is declared is ever unpacked
            with zipfile.ZipFile(path) as archive:
                total = sum(member.file_size for member in archive.infolist())
        else:  # the headers of a tar may lie, so that only reading tells
            with gzip.open(path) as stream:
                while total <= UNPACKED_LIMIT and (chunk := stream.read(1 << 20)):
                    total += len(chunk)
        if total > UNPACKED_LIMIT:
            raise DatasetError(f"{path}: unpacks to more than {_bytes(UNPACKED_LIMIT)}.")
        shutil.unpack_archive(path, folder, filter=None if is_zip else "data")
    except Exception as error:  # damaged archives raise nearly anything
        if isinstance(error, DatasetError) or getattr(error, "errno", None):  # an errno is the disk's fault
            raise
        raise DatasetError(f"{path}: cannot be unpacked, or not safely ({error}).") from error
    return [p for p in folder.rglob("*") if re.fullmatch(members, p.name) and p.is_file() and not p.is_symlink()]


def _wrong(root: Path, path: Path, sums: Sums, load: Callable[[], Any]) -> str:
    """Return what is wrong with a file, "" if it is as recorded; unrecorded ones must `load`, and are then recorded."""
    if not path.is_file():
        return _MISSING
    key, digest = path.relative_to(root).as_posix(), _digest(path)
    if key not in sums:
        try:
            load()
        except DatasetError as error:
            return str(error).removeprefix(f"{path}: ")
    return "" if sums.setdefault(key, digest) == digest else "is not what was first downloaded (SHA256SUMS)"


def _place(root: Path, source: Path, target: Path, sums: Sums) -> None:
    """Rename a whole file to its place and record it. Raises DatasetError when the record is of another content."""
    key, digest = target.relative_to(root).as_posix(), _digest(source)
    if sums.get(key, digest) != digest:
        raise DatasetError(f"{target.name} is not what was first downloaded. If right, delete its line in SHA256SUMS.")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    sums[key] = digest


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_sums(root: Path) -> tuple[Sums, set[str]]:
    """Return path → SHA-256 as in `root/SHA256SUMS`, and its comments: what was asked for, such as "refcoco val"."""
    path = root / "SHA256SUMS"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    sums = {line[66:]: line[:64] for line in lines if re.match("[0-9a-f]{64}  .", line)}
    asked = {line[2:] for line in lines if line.startswith("# ")}
    if len(sums) + len(asked) < len(lines):
        raise DatasetError(f"{path}: has lines twice, or not as `sha256sum` writes them. Mend or delete it.")
    return sums, asked


def _write_sums(root: Path, sums: Sums, asked: set[str]) -> None:
    """Add to `root/SHA256SUMS`; what another run has added meanwhile stays."""
    old_sums, old_asked = _read_sums(root)
    lines = [f"# {one}" for one in sorted(old_asked | asked)]
    lines += [f"{digest}  {key}" for key, digest in sorted((old_sums | sums).items())]
    part = root / f".SHA256SUMS.{os.getpid()}"
    part.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    os.replace(part, root / "SHA256SUMS")


def _need_room(root: Path, size: int) -> None:
    if (free := shutil.disk_usage(root).free) < size:
        room = f"the disk has {_bytes(free)} left, but about {_bytes(size)} are needed"
        raise OSError(errno.ENOSPC, f"{room}. Free some, or choose another disk with --root", str(root))
