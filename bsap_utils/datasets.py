"""RefCOCO, RefCOCO+, RefCOCOg (Yu et al., ECCV 2016) and data of one's own as three pandas frames; data/README.md shows the
layouts. And the doors through which all files go: decoding pictures, reading, writing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

XYWH = ["x", "y", "w", "h"]
COCO_FOLDER = "images/mscoco/images/train2014"
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF"]  # none starts a program, as EPS does
MAX_PIXELS, MAX_BYTES, MAX_PICKLE = 178_956_970, 2 << 30, 100 << 20  # PIL's limit; a pickle of 100 MiB takes a minute
CLIPPED, NO_AREA = "boxes clipped to their image", "boxes without area left out"


class DatasetError(ValueError):
    """A file that cannot be used as it is. The message says which file, what is wrong and what to do."""


@contextlib.contextmanager
def reading(name: Any, wanted: str) -> Iterator[None]:
    """Turn whatever is raised about a file into a DatasetError: on damaged bytes decoders raise nearly anything."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        problem = "no " * isinstance(error, KeyError) + (str(error) or type(error).__name__).split(" <_io")[0][:300]
        raise DatasetError(f"{name} cannot be read ({problem}). Pass {wanted}.") from error


def open_picture(source: Path | str | bytes | BinaryIO | Image.Image, upright: bool = False) -> Image.Image:
    """Return a picture, from a file or its bytes, in RGB and without metadata; of an animation the first frame.

    16 bits are scaled to 8 by 65,535, 32 bits and floats by the smallest of 1, 255, 65,535 and 2³² that holds them all.
    `upright` turns it by its EXIF orientation: not where boxes are in raw pixels, as COCO's. Raises DatasetError.
    """
    name = source if isinstance(source, (Path, str)) else "The picture"
    with reading(name, f"a whole picture of a format among {', '.join(FORMATS)}"):
        content = read_bytes(Path(source)) if isinstance(source, (Path, str)) else source
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode.startswith("I") or image.mode == "F":  # PIL would cut off all above 255
            values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
            tops = [65_535] if image.mode.startswith("I;16") else [1, 255, 65_535, 2**32, values.max()]
            scale = 255 / next(top for top in tops if top >= values.max())
            image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        image.info = {}  # else whoever gets it might turn it by its EXIF orientation again
        return image


@dataclasses.dataclass(frozen=True, eq=False)
class ReferDataset:
    """Images, annotations and expressions of a referring-expression data set, as `load_refer` reads them.

    images       index image_id: file_name, width, height (pixels)
    annotations  index ann_id: image_id, category ("" if unknown), x, y, w, h (pixels, inside the image), area, iscrowd,
                 segmentation (polygons or RLE; None if unknown). All objects of an image, crowds included.
    expressions  index sent_id: ref_id, ann_id (the target), image_id, split, text
    counts       what was clipped or left out in the whole data set, in words
    """

    name: str
    split_by: str
    image_root: Path
    images: pd.DataFrame
    annotations: pd.DataFrame
    expressions: pd.DataFrame
    counts: dict[str, int]

    @property
    def categories(self) -> list[str]:
        """Names of all categories of the data set, sorted; also those that a selection has no object of."""
        return sorted({*self.annotations["category"].astype("category").cat.categories} - {""})

    @property
    def splits(self) -> list[str]:
        """Names that `select` accepts, sorted."""
        return sorted(self.expressions["split"].unique())

    def select(self, split: str | Sequence[str] | None = None, limit: int | None = None) -> ReferDataset:
        """Return one or several splits (None: all) with their images, and of each the first `limit` images (0: all)."""
        if not isinstance(split, str | None):  # refcocog's splits share images
            parts, names = [self.select(one, limit) for one in split], ("images", "annotations", "expressions")
            joint = {name: pd.concat([getattr(part, name) for part in parts]) for name in names}
            return dataclasses.replace(self, **{name: one[~one.index.duplicated()] for name, one in joint.items()})
        if (limit or 0) < 0:
            raise DatasetError(f"limit is {limit}: pass how many images to take, or 0 for all.")
        if split not in (None, *self.splits):
            raise DatasetError(f"{self.name} has no split {split!r}, only {', '.join(self.splits) or 'none'}.")
        chosen = self.expressions if split is None else self.expressions[self.expressions["split"] == split]
        images = self.images[self.images.index.isin(chosen["image_id"])].iloc[: limit or None]
        within = [frame[frame["image_id"].isin(images.index)] for frame in (self.annotations, chosen)]
        return dataclasses.replace(self, images=images, annotations=within[0], expressions=within[1])

    def image_path(self, image_id: int) -> Path:
        """Return where the image of this id lies."""
        return self.image_root / self.images.at[image_id, "file_name"]

    def load_image(self, image_id: int) -> Image.Image:
        """Return one image in RGB. Raises DatasetError when it is missing, damaged or not of the size annotated."""
        path, size = self.image_path(image_id), self.images.loc[image_id, ["width", "height"]].tolist()
        if list((image := open_picture(path)).size) != size:
            raise DatasetError(f"{path}: has {image.size} pixels, not {size} as annotated. Put the right one there.")
        return image

    def missing_images(self) -> list[str]:
        """Return the file names that are not on disk, so that a run can stop before it encodes anything."""
        return [name for name in self.images["file_name"] if not os.path.isfile(self.image_root / name)]


def load_refer(
    root: str | Path, dataset: str = "refcoco", split_by: str | None = None, image_root: str | Path | None = None
) -> ReferDataset:
    """Read the data set in the folder `root/dataset`: the first of these that is there (data/README.md shows each).

    `refs(<split_by>).p` ("umd" for refcocog, else "unc") with `instances.json`, `expressions.csv`, `<dataset>_<split>.json`;
    an `instances.json` beside the latter two gives their boxes masks and neighbours. Boxes that leave their image are
    clipped, those without area and expressions of white space left out, each counted; all else raises DatasetError.
    """
    folder, split_by = Path(root) / dataset, split_by or ("umd" if dataset == "refcocog" else "unc")
    own, csv, instances = folder / "images", folder / "expressions.csv", folder / "instances.json"
    image_root = Path(image_root) if image_root else own if own.is_dir() else Path(root) / COCO_FOLDER
    refs, lists = sorted(folder.glob("refs(*).p")), sorted(folder.glob(f"{dataset}_*.json"))
    path = folder / f"refs({split_by}).p" if refs else csv if csv.is_file() or not lists else lists[0]
    if not path.is_file():
        found = ", ".join(file.name for file in refs) or "nothing else"
        raise DatasetError(f"{path}: no such file, but {found}. Run `bsap data get {dataset}`, pass as root the folder above "
                           f"{dataset}, or another split_by (SPLIT_BY).")  # fmt: skip
    with reading(folder, "a data set as data/README.md describes it"):
        if refs:
            images, annotations, expressions = *_read_instances(instances), _read_refs(path)
        else:
            table = pd.concat([_read_rows(file, dataset) for file in (lists if path in lists else [csv])])
            images, annotations, expressions = _split_up(table.reset_index(drop=True))
            if instances.is_file():
                images, annotations, expressions = _find_targets(annotations, expressions, path, instances)
        source = instances if instances.is_file() else path
        images, annotations, counts = _clean(images, annotations, source, image_root)
    image = annotations["image_id"].reindex(expressions["ann_id"], fill_value=-(2**63)).to_numpy()
    problem = "its target is no annotation with an area in its image"
    refuse(image != expressions["image_id"].to_numpy(), f"{path}: expression ", problem, expressions.index)
    blank = expressions["text"].str.strip() == ""
    counts["expressions without text left out"] = int(blank.sum())
    return ReferDataset(dataset, split_by, image_root, images, annotations, expressions[~blank], counts)


def _read_instances(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images and the annotations of a file in COCO's form."""
    content = read_json(path)
    images = read_table(content["images"], f"{path}: images", id=int, file_name=str, width=int, height=int)
    names = read_table(content["categories"], f"{path}: categories", id=int, name=str).drop_duplicates("id")
    kinds = {"id": int, "image_id": int, "category_id": int, "bbox": XYWH, "area": float, "iscrowd": int}
    annotations = read_table(content["annotations"], f"{path}: annotations", **kinds, segmentation=object)
    row = pd.Index(names["id"]).get_indexer(annotations["category_id"])
    refuse(row < 0, f"{path}: annotations", "'category_id' is not among the categories")
    return images, annotations.assign(category=pd.Categorical(names["name"].to_numpy()[row], names["name"].unique()))


def _clean(images: pd.DataFrame, annotations: pd.DataFrame, path: Path, image_root: Path) -> tuple:
    """Return both frames by their ids, checked, boxes clipped and degenerate polygons dropped; and counts."""
    for frame, where in ((images, f"{path}: images"), (annotations, f"{path}: annotations")):
        refuse(frame["id"].duplicated(), where, "'id' is that of an earlier entry too")
    leaves = images["file_name"].str.contains(r"^\s*$|^/|\\|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|\x00", regex=True)
    refuse(leaves, f"{path}: images", "'file_name' is empty or leads out of the image folder")
    if "width" not in images:
        images[["width", "height"]] = [open_picture(image_root / name).size for name in images["file_name"]]
    pixels = images["width"].clip(0).astype(float) * images["height"].clip(0)
    refuse((pixels < 1) | (pixels > MAX_PIXELS), f"{path}: images", f"the size is not 1 to {MAX_PIXELS:,} pixels")
    images = images.set_index("id").rename_axis("image_id")[["file_name", "width", "height"]]
    row = images.index.get_indexer(annotations["image_id"])
    refuse(row < 0, f"{path}: annotations", "'image_id' is not among the images")
    boxes = annotations[XYWH].to_numpy()
    annotations[XYWH], has_area, clipped = clip_boxes(boxes, images[["width", "height"]].to_numpy()[row])
    masks, dropped = zip(*map(clean_mask, annotations["segmentation"]), strict=True) if len(annotations) else ((), ())
    annotations["segmentation"] = pd.Series(masks, annotations.index, object)
    counts = {CLIPPED: int(clipped.sum()), NO_AREA: int((~has_area).sum()), "degenerate polygons dropped": sum(dropped)}
    columns = ["image_id", "category", *XYWH, "area", "iscrowd", "segmentation"]
    return images, annotations[has_area].set_index("id").rename_axis("ann_id")[columns], counts


def _read_refs(path: Path) -> pd.DataFrame:
    """Return the expressions of a pickle of refs, of any protocol, from Python 2 or 3. Nothing in it is executed."""
    data = read_bytes(path, MAX_PICKLE)
    with reading(path, "a whole pickle of lists, dicts, text and numbers, from where you trust it"):
        try:
            records = _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:  # Python 2's byte strings may be anything, and Latin-1 reads any
            records = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    kinds = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": object}
    refs = read_table(records, f"{path}: refs", **kinds)
    texts = read_table(list(chain(*refs["sentences"])), f"{path}: sentences of all refs", sent_id=int, sent=str)
    for frame, key in ((refs, "ref_id"), (texts, "sent_id")):
        refuse(frame[key].duplicated(), f"{path}: {key} ", "is there twice", frame[key])
    row = np.repeat(np.arange(len(refs)), refs.pop("sentences").map(len).to_numpy(dtype=int))
    return refs.iloc[row].set_index(pd.Index(texts["sent_id"])).assign(text=texts["sent"].array)


def _read_rows(path: Path, dataset: str) -> pd.DataFrame:
    """Return a row an expression of a CSV or of the list of an evaluation kit, whose img_id is COCO's name and a number."""
    kinds = {"file_name": str, "text": str, "split": str, "bbox": XYWH, "category": object, "segmentation": object}
    with reading(path, "a CSV in UTF-8, its first line file_name,x,y,w,h,text, or a list (data/README.md shows both)"):
        if path.suffix == ".csv":
            table = pd.read_csv(io.BytesIO(read_bytes(path)), dtype=str, keep_default_na=False, encoding="utf-8-sig")
            table = table.rename(columns=str.strip)
            table["bbox"], table["split"] = table[XYWH].to_numpy().tolist(), table.get("split", "all")
            masks = table.get("segmentation", [""] * len(table))
            table["segmentation"] = [json.loads(mask.strip() or "null") for mask in masks]
        else:
            table = pd.DataFrame(read_json(path)).rename(columns={"sents": "text"})
            names = table["img_id"].str.replace(r"^(COCO_\w+_\d{12})_\d+$", r"\1", regex=True)
            table["file_name"] = names.where(names.str.contains(r"\.\w+$"), names + ".jpg")
            table["split"] = path.stem.removeprefix(f"{dataset}_")
    sizes = {"width": float, "height": float} if "width" in table else {}
    rows = read_table(table.to_dict("records"), f"{path}: row", **kinds, **sizes)
    return rows.fillna({"category": ""}).astype(dict.fromkeys(sizes, np.int64))


def _split_up(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return the images, boxes and expressions of a table; ids of images are the numbers of COCO's names where all have one."""
    images = table.drop_duplicates("file_name").reset_index(drop=True)
    numbers = images["file_name"].str.extract(r"(\d{1,18})(?:\.\w+)?$")[0].astype("Int64")
    images["id"] = numbers if numbers.notna().all() and numbers.is_unique else np.arange(1, len(images) + 1)
    images = images.astype({"id": np.int64})
    ids = table.groupby(["file_name", *XYWH], sort=False, dropna=False).ngroup() + 1
    table = table.assign(ann_id=ids, ref_id=ids, image_id=table["file_name"].map(images.set_index("file_name")["id"]))
    boxes = table.drop_duplicates("ann_id").reset_index(drop=True)
    boxes = boxes.assign(id=boxes["ann_id"], area=boxes["w"] * boxes["h"], iscrowd=0).astype({"category": "category"})
    return images, boxes, table.rename_axis("sent_id")[["ref_id", "ann_id", "image_id", "split", "text"]]


def _find_targets(boxes: pd.DataFrame, texts: pd.DataFrame, path: Path, instances: Path) -> tuple:
    """Return images, objects and a table's expressions, each of the object nearest to its box, within a tenth of a pixel."""
    images, objects = _read_instances(instances)
    named = boxes[["ann_id", "file_name", *XYWH]].merge(images.rename(columns={"id": "image_id"}), on="file_name")
    pairs = named.merge(objects, on="image_id", suffixes=("_", ""))
    pairs["gap"] = np.abs(pairs[XYWH].to_numpy() - pairs[[f"{side}_" for side in XYWH]].to_numpy()).max(1)
    near = pairs[pairs["gap"] < 0.1001].sort_values("gap", kind="stable").drop_duplicates("ann_id").set_index("ann_id")
    lacks = ~texts["ann_id"].isin(near.index)
    refuse(lacks, f"{path}: expression ", f"{instances.name} has no such picture, or no such box in it", texts.index)
    ids = near.loc[texts["ann_id"], ["id", "image_id"]].to_numpy()
    return images, objects, texts.assign(ann_id=ids[:, 0], ref_id=ids[:, 0], image_id=ids[:, 1])


def clean_mask(segmentation: Any) -> tuple[Any, int]:
    """Return a segmentation as RLE or polygons of three points or more (None: there are none), and how many had less."""
    if not isinstance(segmentation, list):
        return segmentation or None, 0
    kept = [part for part in segmentation if type(part) is not list or (len(part) > 5 and len(part) % 2 == 0)]
    return kept or None, len(segmentation) - len(kept)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip `boxes` [N, 4] (xywh, pixels) to images of `sizes` [N, 2] (width, height): boxes [N, 4], has area, was moved [N]."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are what has_area is for
        near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        outside = (near < -1e-3).any(1) | (far > sizes + 1e-3).any(1)
        near, far = np.clip(near, 0, sizes), np.clip(far, 0, sizes)
        clipped = np.where(outside[:, None], np.hstack([near, far - near]), boxes)
        has_area = np.isfinite(boxes).all(1) & (far > near).all(1)
    return clipped, has_area, has_area & outside


def read_table(records: Any, where: str, **kinds: Any) -> pd.DataFrame:
    """Return keys of a list of records as columns: int, float, str, object (may lack), or XYWH (a box: four columns)."""
    columns: dict[str, Any] = {}
    for key, kind in kinds.items():
        with reading(f"{where}, key '{key}',", f"a list of records with {', '.join(kinds)}"):
            values = [record.get(key) if kind is object else record[key] for record in records]
            if kind is str:
                "".join(values).encode()  # JSON may hold half a character
            if kind is XYWH:
                columns |= dict(zip(XYWH, np.array(values, dtype=np.float64).reshape(len(values), 4).T, strict=True))
            else:
                values = pd.array(values, dtype="Int64") if kind is int else values  # NumPy would make 1 of 1.5
                columns[key] = pd.Series(values, dtype={int: np.int64, float: np.float64}.get(kind, kind))
    return pd.DataFrame(columns)


def refuse(wrong: Any, where: str, problem: str, names: Any = None) -> None:
    """Raise DatasetError for the first entry that is wrong, by its number or name, and say how many there are."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        name = rows[0] if names is None else names[rows[0]]
        raise DatasetError(f"{where}[{name}]: {problem} ({len(rows)} such entries). Correct the file.")


class _Record(dict):
    """A dict with text as keys: to hash nested tuples, or integers made to collide, can take for ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str:
            raise pickle.UnpicklingError("a key is no text")
        super().__setitem__(key, value)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles plain data, for a pickle may run any code; in Python, for a few bytes can make the C one ask for gigabytes."""

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(_Record())  # type: ignore[attr-defined]
    dispatch[pickle.DICT[0]] = lambda self: self.pop_mark() or self.append(_Record())  # type: ignore[attr-defined]
    for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:99] + ", which was refused and not executed")


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file. Raises DatasetError when it is missing, no such, or larger than `limit`."""
    with reading(path, f"the path of a regular file of at most {limit:,} bytes"):
        if path.stat().st_size > limit or not path.is_file():
            raise ValueError("it is a folder or a device, or too large")
        return path.read_bytes()


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises DatasetError when it is missing or malformed."""
    with reading(path, "a whole file of valid JSON"):
        return json.loads(read_bytes(Path(path)))


def write_file(path: str | Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write `content`, or what it writes to the temporary path it is given, whole or not at all; never through a link."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DatasetError(f"{path}: is a link or no regular file, and stays as it is. Choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        part.write_bytes(content) if isinstance(content, bytes) else content(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
