"""RefCOCO, RefCOCO+, RefCOCOg, and data of one's own, read into three pandas frames; and the one decoder of pictures.

Three layouts are read: that of the published archives (Yu et al., "Modeling Context in Referring Expressions", ECCV
2016; `instances.json` and `refs(<split_by>).p`), a table `expressions.csv`, and the lists `<dataset>_<split>.json` of
evaluation kits. The two tables are brought into the form of the first, so that one reader checks them all.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import reprlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

XYWH = ["x", "y", "w", "h"]
COCO_FOLDER = "images/mscoco/images/train2014"
FORMATS = "AVIF BMP GIF ICO JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split()  # none that starts another program (EPS)
MAX_PIXELS = 178_956_970  # of one picture: PIL's own limit
MAX_BYTES, MAX_PICKLE = 2 << 30, 100 << 20  # of a file; 100 MiB take our unpickler about a minute

CLIPPED = "boxes clipped to their image"
NO_AREA = "boxes without area left out"
NO_TEXT = "expressions without text left out"
DEGENERATE = "degenerate polygons dropped"


class DatasetError(ValueError):
    """A file that cannot be used as it is. The message says which file, what is wrong and what to do."""


def open_picture(source: Path | str | bytes | BinaryIO | Image.Image, upright: bool = False) -> Image.Image:
    """Return a picture, from a file or its bytes, as an RGB image without metadata; of an animation the first frame.

    Pixels of 16 or 32 bits are scaled to 8: integers by 65,535, or for 32 bits, as for floats, by the smallest of 1, 255,
    65,535 and 2³² that holds them. `upright` turns it as its EXIF orientation says; where boxes are in raw pixels, as
    COCO's are, it must stay off. Raises DatasetError for what is no regular file, no picture of FORMATS, or too large.

    >>> open_picture(Image.fromarray(np.full((2, 3), 65_535, dtype=np.uint16))).getpixel((0, 0))
    (255, 255, 255)
    """
    name = f"{source}" if isinstance(source, (str, Path)) else "The picture"
    try:
        if isinstance(source, (str, Path)):
            source = io.BytesIO(read_bytes(Path(source)))
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"it has more than {MAX_PIXELS:,} pixels")
        rgb = _eight_bits(ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except DatasetError:
        raise
    except Image.UnidentifiedImageError:
        raise DatasetError(f"{name} is no picture of a known kind. Use JPEG, PNG or another of {FORMATS}.") from None
    except Exception as error:  # damaged bytes raise nearly anything in PIL's decoders, struct.error included
        raise DatasetError(f"{name} cannot be decoded ({error}). Replace it by a whole picture.") from error
    rgb.info = {}  # else whoever gets it would turn it by its EXIF orientation again
    return rgb


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of more than 8 bits a channel to 8; PIL's own `convert` would cut off all above 255."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    ranges = (65_535,) if image.mode.startswith("I;16") else (1, 255, 65_535, 2**32)
    top = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))


@dataclasses.dataclass(frozen=True, eq=False)
class ReferDataset:
    """Images, annotations and expressions of a referring-expression data set, as `load_refer` reads them.

    images       index image_id: file_name, width, height (pixels)
    annotations  index ann_id: image_id, category (name, "" where unknown), x, y, w, h (pixels, inside the image), area,
                 iscrowd, segmentation (polygons, RLE or a matrix; None: unknown). All of an image, crowds included.
    expressions  index sent_id: ref_id, ann_id (the target), image_id, split, text
    counts       what was clipped or left out, in words; after `select`, in its images
    notes        one row for each thing counted: index image_id, value what

    >>> ds = load_refer("data/refshapes", "refshapes")
    >>> ds.splits, ds.categories[:2], ds.load_image(1).size
    (['test', 'train', 'val'], ['apple', 'bell'], (320, 240))
    """

    name: str
    split_by: str
    image_root: Path
    images: pd.DataFrame
    annotations: pd.DataFrame
    expressions: pd.DataFrame
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: pd.Series = dataclasses.field(default_factory=lambda: pd.Series(dtype=str), repr=False)

    @property
    def categories(self) -> list[str]:
        """Names of all categories of the data set, sorted; also those that a selection has no object of."""
        return sorted({*self.annotations["category"].astype("category").cat.categories} - {""})

    @property
    def splits(self) -> list[str]:
        """Names that `select` accepts, sorted."""
        return sorted(set().union(*map(_splits_of, self.expressions["split"].unique())))

    def select(self, split: str | None = None, limit: int | None = None) -> ReferDataset:
        """Return the expressions of one split (None: all), the images that have them, and all annotations of these.

        `limit` takes the first that many images only (None or 0: all). Expressions marked `testAB` belong to `testA` and
        to `testB`. Raises DatasetError for a split that is not there and a negative limit.

        >>> len(load_refer("data/refshapes", "refshapes").select(split="val", limit=2).images)
        2
        """
        if limit is not None and limit < 0:
            raise DatasetError(f"limit is {limit}: pass how many images to take, or 0 for all.")
        marks = [mark for mark in self.expressions["split"].unique() if split is None or split in _splits_of(mark)]
        if split is not None and not marks:
            present = ", ".join(self.splits) or "none"
            raise DatasetError(f"{self.name} has no split {split!r}. Pass one of these: {present}.")
        expressions = self.expressions[self.expressions["split"].isin(marks)]
        images = self.images[self.images.index.isin(expressions["image_id"])].iloc[: limit or None]
        annotations = self.annotations[self.annotations["image_id"].isin(images.index)]
        expressions = expressions[expressions["image_id"].isin(images.index)]
        notes = self.notes[self.notes.index.isin(images.index)]
        frames = {"images": images, "annotations": annotations, "expressions": expressions}
        return dataclasses.replace(self, **frames, notes=notes, counts=_count(notes))

    def image_path(self, image_id: int) -> Path:
        """Return where the image of this id lies. Raises DatasetError for an id that the data set does not have."""
        if image_id not in self.images.index:
            raise DatasetError(f"{self.name} has no image {image_id!r} among its {len(self.images)} images.")
        return self.image_root / str(self.images.at[image_id, "file_name"])

    def load_image(self, image_id: int) -> Image.Image:
        """Return one image in RGB. Raises DatasetError when it is missing, damaged or not of the size annotated."""
        image = open_picture(self.image_path(image_id))
        size = tuple(self.images.loc[image_id, ["width", "height"]])
        if image.size != size:
            raise DatasetError(f"{self.image_path(image_id)}: has {image.width}×{image.height} pixels, but {self.name} says "
                               f"{size[0]}×{size[1]}, so its boxes would be misplaced. Put the right picture there.")  # fmt: skip
        return image

    def missing_images(self) -> list[str]:
        """Return the file names that are not on disk, so that a run can stop before it encodes anything."""
        return [name for name in self.images["file_name"] if not os.path.isfile(self.image_root / name)]


def load_refer(
    root: str | Path, dataset: str = "refcoco", split_by: str | None = None, image_root: str | Path | None = None
) -> ReferDataset:
    """Read the data set in the folder `root/dataset`: the first of these that is there.

    - `refs(<split_by>).p` with `instances.json`, the UNC layout; `split_by` is "umd" for refcocog, "unc" for all others
    - `expressions.csv`: file_name, x, y, w, h (pixels), text and perhaps split, category, segmentation, width, height
    - `<dataset>_<split>.json`: a list of img_id, sents, bbox, width, height (RefCOCO's splits as evaluation kits have them)

    The boxes of a table are taken from `instances.json`, with their masks and neighbours, where there is one. Pictures lie
    in `image_root`, else in `root/dataset/images` or `root/images/mscoco/images/train2014`. Expressions of white space and
    boxes without area are left out, boxes that leave their image clipped, each counted; all else that is wrong, and a target
    without area, raises DatasetError.

    >>> list(load_refer("data/refshapes", "refshapes").expressions.columns)
    ['ref_id', 'ann_id', 'image_id', 'split', 'text']
    """
    root, folder, split_by = Path(root), Path(root) / dataset, split_by or ("umd" if dataset == "refcocog" else "unc")
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder. Get the data set with `bsap data get {dataset}`, or pass as "
                           f"root the folder that holds the folder {dataset}.")  # fmt: skip
    present, instances, own = sorted(folder.glob("refs(*).p")), folder / "instances.json", folder / "images"
    pictures = Path(image_root) if image_root else own if own.is_dir() else root / COCO_FOLDER
    path = folder / f"refs({split_by}).p" if present else _table_path(folder, dataset)
    table = None if present else _read_table(path, dataset)
    if present and path not in present:
        raise DatasetError(f"{path}: there is no such file, but {', '.join(path.name for path in present)}. Pass as split_by "
                           "(SPLIT_BY in notebooks) what stands in parentheses.")  # fmt: skip
    if table is None or instances.is_file():
        images, annotations = _clean(*_read_instances(instances), instances)
    else:
        images, annotations = _clean(*_boxes_of(table, pictures), path)
    expressions = _read_refs(path, annotations) if table is None else _find_targets(table, path, images, annotations)
    target = annotations.index.get_indexer(expressions["ann_id"])
    no_area, clipped, dropped = (annotations.pop(what).to_numpy() for what in (NO_AREA, CLIPPED, DEGENERATE))
    refuse(no_area[target], f"{path}: expression ", "its target has no area inside its image", expressions.index)
    no_text = (expressions["text"].str.strip() == "").to_numpy()
    ids = annotations["image_id"].to_numpy()
    counted = {CLIPPED: ids[clipped], NO_AREA: ids[no_area], DEGENERATE: np.repeat(ids, dropped)}
    counted[NO_TEXT] = expressions["image_id"].to_numpy()[no_text]
    notes = pd.concat([pd.Series(what, index=of, dtype=str) for what, of in counted.items()])
    frames = images, annotations[~no_area], expressions[~no_text]
    return ReferDataset(dataset, split_by, pictures, *frames, _count(notes), notes)


def _read_instances(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images and annotations of a file in COCO's form."""
    tables = read_table([read_json(path)], f"{path}: file ", images=list, annotations=list, categories=list).iloc[0]
    images = read_table(tables["images"], f"{path}: images", id=int, file_name=str, width=int, height=int)
    names = read_table(tables["categories"], f"{path}: categories", id=int, name=str)
    kinds = {"id": int, "image_id": int, "category_id": int, "bbox": list, "area": float, "iscrowd": int}
    annotations = read_table(tables["annotations"], where := f"{path}: annotations", **kinds, segmentation=object)
    annotations[XYWH] = box_array(annotations["bbox"], where)
    row = unique(names["id"], f"{path}: categories").get_indexer(annotations["category_id"])
    refuse(row < 0, where, "'category_id' is not among the categories")
    annotations["category"] = pd.Categorical(names["name"].to_numpy()[row], categories=names["name"].unique())
    return images, annotations


def _clean(images: pd.DataFrame, annotations: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both frames by their ids, checked and clipped; annotations with columns NO_AREA, CLIPPED, DEGENERATE."""
    where, pixels = f"{path}: images", images["width"] * images["height"].astype(float)
    refuse((images[["width", "height"]] < 1).any(axis=1) | (pixels > MAX_PIXELS), where,
           f"'width' × 'height' must be from 1 to {MAX_PIXELS:,} pixels")  # fmt: skip
    leaves = images["file_name"].astype(object).str.contains(r"^\s*$|^/|\\|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|\x00")
    refuse(leaves, where, "'file_name' is empty or leads out of the image folder")
    images = images.set_index(unique(images["id"], where).rename("image_id"))[["file_name", "width", "height"]]
    row = images.index.get_indexer(annotations["image_id"])
    refuse(row < 0, f"{path}: annotations", "'image_id' is not among the images")
    sizes = images[["width", "height"]].to_numpy()[row]
    boxes, has_area, clipped = clip_boxes(annotations[XYWH].to_numpy(), sizes)
    shapes = [
        drop_degenerate(one, h, w) for one, (w, h) in zip(annotations["segmentation"], sizes.tolist(), strict=True)
    ]
    index = unique(annotations["id"], f"{path}: annotations").rename("ann_id")
    kept = ["image_id", "category", *XYWH, "area", "iscrowd"]
    annotations = annotations.assign(**dict(zip(XYWH, boxes.T, strict=True)))[kept].set_index(index)
    annotations["segmentation"] = pd.Series([shape for shape, _ in shapes], index=index, dtype=object)
    counted = {NO_AREA: ~has_area, CLIPPED: clipped, DEGENERATE: [dropped for _, dropped in shapes]}
    return images, annotations.assign(**counted)


def _read_refs(path: Path, annotations: pd.DataFrame) -> pd.DataFrame:
    """Return the expressions of a pickle of refs: index sent_id; ref_id, ann_id, image_id, split, text."""
    kinds = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    refs = read_table(_unpickle(path), where := f"{path}: refs", **kinds)
    unique(refs["ref_id"], where)
    target = annotations.index.get_indexer(refs["ann_id"])
    refuse(target < 0, where, "'ann_id' is not among the annotations of instances.json")
    elsewhere = refs["image_id"].to_numpy() != annotations["image_id"].to_numpy()[target]
    refuse(elsewhere, where, "'image_id' is not the image of annotation 'ann_id' in instances.json")
    lists = refs.pop("sentences")
    texts = read_table(
        list(chain.from_iterable(lists)), where := f"{path}: sentences of all refs", sent_id=int, sent=str
    )
    expressions = refs.iloc[np.repeat(np.arange(len(refs)), list(map(len, lists)))]
    return expressions.set_index(unique(texts["sent_id"], where)).assign(text=texts["sent"].to_numpy())


def _table_path(folder: Path, dataset: str) -> Path:
    """Return the file, of several splits the first, that holds the expressions of a folder without refs."""
    paths = [folder / "expressions.csv", *sorted(folder.glob(f"{dataset}_*.json"))]
    if found := next((path for path in paths if path.is_file()), None):
        return found
    raise DatasetError(f"{folder}: holds no expressions. Put there refs(unc).p and instances.json, or expressions.csv, or "
                       f"{dataset}_SPLIT.json, as data/README.md shows.")  # fmt: skip


def _read_table(path: Path, dataset: str) -> pd.DataFrame:
    """Return one row an expression: file_name, x, y, w, h, text, split, category, segmentation, perhaps width, height."""
    if path.suffix == ".json":
        lists = sorted(path.parent.glob(f"{dataset}_*.json"))
        return pd.concat([_read_split(one, one.stem.removeprefix(f"{dataset}_")) for one in lists], ignore_index=True)
    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)), dtype=str, keep_default_na=False, encoding="utf-8-sig")
        shapes = [json.loads(one) if one.strip() else None for one in table.get("segmentation", [""] * len(table))]
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path}: is no CSV in UTF-8, or a segmentation in it no JSON ({error}). Correct it."
        ) from error
    table.columns = table.columns.str.strip()
    if lacking := [name for name in ["file_name", *XYWH, "text"] if name not in table]:
        raise DatasetError(
            f"{path}: has no column {', '.join(lacking)}, only {', '.join(table)}. Its first line names them."
        )
    for name in [*XYWH, *(side for side in ("width", "height") if side in table)]:
        table[name] = pd.to_numeric(table[name], errors="coerce")
        refuse(~np.isfinite(table[name]), f"{path}: line ", f"{name!r} is no number", table.index + 2)
    defaults = {key: value for key, value in {"split": "all", "category": ""}.items() if key not in table}
    return table.assign(**defaults, segmentation=pd.Series(shapes, dtype=object))


def _read_split(path: Path, split: str) -> pd.DataFrame:
    """Return the table of one list of an evaluation kit; img_id is the name of a COCO picture and a suffix of the ref."""
    kinds = {"img_id": str, "sents": str, "bbox": list, "width": int, "height": int}
    table = read_table(read_json(path), where := f"{path}: entry ", **kinds)
    names = table["img_id"].str.replace(r"^(COCO_\w+_\d{12})_\d+$", r"\1", regex=True)
    table["file_name"] = names.where(names.str.contains(r"\.\w+$"), names + ".jpg")
    table[XYWH] = box_array(table["bbox"], where)
    return table.assign(text=table["sents"], split=split, category="", segmentation=None)


def _boxes_of(table: pd.DataFrame, pictures: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images and the de-duplicated boxes of a table, as `_read_instances` does.

    An image's id is the number at the end of its name, as COCO has it, where all names have one of their own.
    """
    images = table.drop_duplicates("file_name").assign(id=lambda frame: range(1, len(frame) + 1))
    numbers = images["file_name"].str.extract(r"(\d{1,18})(?:\.\w+)?$")[0]
    if numbers.notna().all() and numbers.astype(np.int64).is_unique:
        images["id"] = numbers.astype(np.int64)
    if not {"width", "height"} <= set(images):
        images[["width", "height"]] = [open_picture(pictures / name).size for name in images["file_name"]]
    images[["width", "height"]] = images[["width", "height"]].astype(np.int64)
    boxes = table.drop_duplicates(["file_name", *XYWH])
    boxes = boxes.assign(
        image_id=boxes["file_name"].map(images.set_index("file_name")["id"]), id=range(1, len(boxes) + 1)
    )
    return images, boxes.assign(category=boxes["category"].astype("category"), area=boxes["w"] * boxes["h"], iscrowd=0)


def _find_targets(table: pd.DataFrame, path: Path, images: pd.DataFrame, annotations: pd.DataFrame) -> pd.DataFrame:
    """Return the expressions of a table, each with the annotation that has its box, give or take a pixel."""
    row = pd.Index(images["file_name"]).get_indexer(table["file_name"])
    refuse(row < 0, f"{path}: expression ", "'file_name' is not among the images of instances.json")
    boxes, *_ = clip_boxes(table[XYWH].to_numpy(), images[["width", "height"]].to_numpy()[row])
    sides = pd.DataFrame(boxes, columns=XYWH).assign(image_id=images.index.to_numpy()[row], sent_id=range(len(table)))
    pairs = sides.merge(annotations[["image_id", *XYWH]].reset_index(), on="image_id", suffixes=("", "_known"))
    away = np.abs(pairs[XYWH].to_numpy() - pairs[[f"{side}_known" for side in XYWH]].to_numpy()).max(1)
    nearest = pairs.assign(away=away).sort_values("away", kind="stable").drop_duplicates("sent_id").set_index("sent_id")
    nearest = nearest.reindex(range(len(table)))
    refuse(~(nearest["away"] <= 1), f"{path}: expression ", "no annotation of its picture has its box")
    ids = nearest["ann_id"].astype(np.int64)
    found = {"ref_id": ids, "ann_id": ids, "image_id": sides["image_id"], "split": table["split"].astype(str)}
    frame = pd.DataFrame({**found, "text": table["text"].astype(str)})
    return frame.rename_axis("sent_id")


def drop_degenerate(segmentation: Any, height: int, width: int) -> tuple[Any, int]:
    """Return a segmentation without polygons that are no list of three points or more, and how many were dropped.

    Where nothing is left, it is None: unknown. RLE and matrices stay as they are.
    """
    if not isinstance(segmentation, list) or is_matrix(segmentation, height, width):
        return segmentation or None, 0
    sound = [polygon for polygon in segmentation
             if type(polygon) is not list or (len(polygon) > 5 and len(polygon) % 2 == 0) or type(polygon[:1]) is bool]  # fmt: skip
    return sound or None, len(segmentation) - len(sound)


def is_matrix(segmentation: Any, height: int, width: int) -> bool:
    """Tell whether a segmentation is a mask written out: rows of true and false, or of 0 and 1, of the picture's size."""
    rows = segmentation if isinstance(segmentation, list) and len(segmentation) == height else [None]
    return all(type(row) is list and len(row) == width and set(row) <= {0, 1} for row in rows)


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip `boxes` [N, 4] (xywh, pixels) to images of `sizes` [N, 2] (width, height).

    Returns the boxes [N, 4], which of them have an area inside their image [N], and which of these were moved [N]. A
    thousandth of a pixel outside is rounding, and such boxes stay as they are.

    >>> clip_boxes(np.array([[-5.0, 2, 15, 4]]), np.array([[20, 10]]))
    (array([[ 0.,  2., 10.,  4.]]), array([ True]), array([ True]))
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are what has_area is for
        near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        outside = (near < -1e-3).any(1) | (far > sizes + 1e-3).any(1)
        near, far = np.clip(near, 0, sizes), np.clip(far, 0, sizes)
        clipped = np.where(outside[:, None], np.hstack([near, far - near]), boxes)
        has_area = np.isfinite(boxes).all(1) & (far > near).all(1)
    return clipped, has_area, has_area & outside


KINDS: dict[Any, set[type]] = {float: {int, float}, object: {dict, list, type(None)}}


def read_table(records: Any, where: str, **kinds: Any) -> pd.DataFrame:
    """Return some keys of a list of records as a frame: the columns `kinds`, of int, float, str, list or object.

    object is a segmentation, and may be missing. Raises DatasetError for the first value that is of another type (True is
    no int), an integer of more than 64 bits, or text that is not Unicode.
    """
    if type(records) is not list:
        raise DatasetError(f"{where}: {_show(records)} is no list of records.")
    data = {}
    for key, kind in kinds.items():
        admitted, values = KINDS.get(kind, {kind}), [one.get(key) if type(one) is dict else one for one in records]
        wrong = [type(value) not in admitted or not _is_sound(value) for value in values]
        wrong = [bad or type(one) is not dict for bad, one in zip(wrong, records, strict=True)]
        i = wrong.index(True) if True in wrong else -1
        if i >= 0:
            raise DatasetError(
                f"{where}[{i}]: '{key}' is {_show(values[i])}, but must be {kind.__name__}. Correct this entry."
            )
        data[key] = pd.Series(values, dtype={int: np.int64, float: np.float64, str: str}.get(kind, object))
    return pd.DataFrame(data)


def _is_sound(value: Any) -> bool:
    """Tell whether an integer fits 64 bits and a text is Unicode (JSON may hold half a character)."""
    if type(value) is str:
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    return type(value) is not int or abs(value) < 2**63


def box_array(boxes: Iterable, where: str, names: Any = None) -> np.ndarray:
    """Return boxes, each a list of four numbers (xywh), as float64 [N, 4]. Raises DatasetError for the first that is not."""
    boxes = list(boxes)
    for i, box in enumerate(boxes):
        if type(box) is not list or len(box) != 4 or not all(type(v) in (int, float) and _is_sound(v) for v in box):
            name = i if names is None else names[i]
            raise DatasetError(
                f"{where}[{name}]: {_show(box)} is no box of four numbers [x, y, w, h]. Correct this entry."
            )
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def refuse(wrong: Any, where: str, problem: str, names: Any = None) -> None:
    """Raise DatasetError for the first entry that is wrong, and say how many there are."""
    rows = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if len(rows):
        name = rows[0] if names is None else names[rows[0]]
        raise DatasetError(f"{where}[{name}]: {problem} ({len(rows)} such entries). Correct the file.")


def unique(ids: pd.Series, where: str) -> pd.Index:
    """Return ids as an index. Raises DatasetError for the first that is there twice."""
    refuse(ids.duplicated(), where, f"'{ids.name}' is that of an earlier entry too, but must be unique")
    return pd.Index(ids)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles lists, dicts, text and numbers only: a pickle may otherwise run any code.

    It is the pure Python one: in the C one a few damaged bytes can ask for gigabytes of memo. For the same reason
    BYTEARRAY8 is out, which allocates before it reads. Keys are text or numbers of 60 bits: the hash of nested tuples, or
    integers with one hash, can take for ever.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]

    def find_class(self, module: str, name: str) -> Any:
        raise _RefusedError(f"{module}.{name}"[:100])

    def _checked(load: Callable, one: bool) -> Callable:  # type: ignore[misc]
        def checked(self: Any) -> None:
            keys = self.stack[-2:-1] if one else self.stack[::2]
            if not all(type(key) in (str, float) or (type(key) is int and abs(key) < 2**60) for key in keys):
                raise pickle.UnpicklingError("it has keys that are neither text nor numbers")
            load(self)

        return checked

    for code in (pickle.SETITEM, pickle.SETITEMS, pickle.DICT):
        dispatch[code[0]] = _checked(dispatch[code[0]], code == pickle.SETITEM)


class _RefusedError(Exception):
    pass


def _unpickle(path: Path) -> Any:
    """Return the content of a pickle of plain data, of any protocol, from Python 2 or 3. Nothing in it is executed."""
    data = read_bytes(path, MAX_PICKLE)
    try:
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:  # byte strings of Python 2 in another encoding; Latin-1 reads any byte
            return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _RefusedError as error:
        raise DatasetError(f"{path}: asks for {error}, which was refused and not executed: it may hold lists, dicts, text and "
                           "numbers. Do not trust this file.") from None  # fmt: skip
    except Exception as error:  # damaged opcodes raise nearly anything
        problem = f"is no whole pickle of plain data ({type(error).__name__}: {_show(str(error))})"
        raise DatasetError(f"{path}: {problem}. Get the file again.") from error


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file. Raises DatasetError when it is missing, none, or of more than `limit` bytes."""
    try:
        if path.exists() and not path.is_file():
            raise DatasetError(f"{path}: is no regular file. Pass the path of one.")
        if path.stat().st_size > limit:
            raise DatasetError(f"{path}: has more than {limit:,} bytes, which is the limit. Pass a smaller file.")
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises DatasetError when it is missing or malformed."""
    try:
        return json.loads(read_bytes(Path(path)))
    except DatasetError:
        raise
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is not valid JSON ({error}). Check that the file is whole.") from error


def write_file(path: str | Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: `content`, or what a function writes to the temporary path that it is given.

    The temporary name has the suffix of `path` and the process in it, so that two may write at once. Raises DatasetError
    where a link or a folder has the name.
    """
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


def _show(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def _count(notes: pd.Series) -> dict[str, int]:
    return {what: int((notes == what).sum()) for what in (CLIPPED, NO_AREA, NO_TEXT, DEGENERATE)}


def _splits_of(mark: str) -> set[str]:
    """The splits that expressions marked so belong to: {"testA", "testB"} for "testAB", else itself."""
    several = re.fullmatch("test([A-Z]{2,})", mark)
    return {f"test{letter}" for letter in several[1]} if several else {mark}
