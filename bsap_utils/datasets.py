"""RefCOCO, RefCOCO+, RefCOCOg and any data set in the same UNC layout, read into three pandas frames.

The layout is that of the published archives (Yu et al., "Modeling Context in Referring Expressions", ECCV 2016): images
under `images/mscoco/images/train2014`, annotations in `<dataset>/instances.json` (COCO's format), expressions in the
pickle `<dataset>/refs(<split_by>).p`. Whatever is wrong in these files ends as a `DatasetError` that names file, entry
and remedy, or as a number in `ReferDataset.counts`: an evaluation is never shorter than its data set without a word.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import re
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

XYWH = ["x", "y", "w", "h"]

# What the loader touches or keeps out; the keys of ReferDataset.counts, in words that a notebook can print.
CLIPPED = "boxes clipped to their image"
NO_AREA = "boxes without area left out"
NO_TEXT = "expressions without text left out"
NO_SENTENCES = "refs without any sentence"
UNGIVEN = "sent_ids without a sentence"
NOTES = (CLIPPED, NO_AREA, NO_TEXT, NO_SENTENCES, UNGIVEN)

_GET_AGAIN = "Get the file again with `bsap data get`."
_REMEDY = f"Correct this entry, or: {_GET_AGAIN}"


class DatasetError(ValueError):
    """A data set that cannot be used as it is. The message says in which file, what is wrong and what to do."""


_no_notes = partial(pd.DataFrame, columns=["what", "image_id", "split"])


@dataclasses.dataclass(frozen=True, eq=False)
class ReferDataset:
    """Images, regions and expressions of a referring-expression data set, as `load_refer` reads them.

    images       index image_id: file_name, width, height (pixels)
    regions      index ann_id: image_id, category (name), x, y, w, h (pixels, inside the image), area, iscrowd,
                 segmentation (as COCO stores it: polygons or RLE). Every annotation of an image, crowds included.
    expressions  index sent_id: ref_id, ann_id (the region meant), image_id, split, text
    counts       what was clipped or left out, by plain-English key; after `select`, what concerns the selection
    notes        what, image_id, split: one row for each thing counted, so that `select` can count again

    >>> ds = load_refer("data/refshapes", "refshapes")
    >>> ds.splits, ds.categories[:2], len(ds.missing_images())
    (['test', 'train', 'val'], ['apple', 'bell'], 0)
    >>> ds.image_path(1).name, ds.load_image(1).size
    ('COCO_train2014_000000000001.jpg', (320, 240))
    """

    name: str
    split_by: str
    image_root: Path
    images: pd.DataFrame
    regions: pd.DataFrame
    expressions: pd.DataFrame
    counts: dict[str, int]
    notes: pd.DataFrame = dataclasses.field(default_factory=_no_notes, repr=False)

    @property
    def categories(self) -> list[str]:
        """Names of all categories of the data set, sorted; also those that a selection has no region of."""
        return sorted(self.regions["category"].astype("category").cat.categories)

    @property
    def splits(self) -> list[str]:
        """Names that `select` accepts, sorted."""
        return sorted(set().union(*map(_parts_of, self.expressions["split"].unique())))

    def select(self, split: str, limit: int | None = None) -> ReferDataset:
        """Return the expressions of one split, the images that have them, and all regions of these images.

        `limit` takes the first that many images only, for a quick look. Expressions marked `testAB` belong to `testA`
        and to `testB`. Raises DatasetError for a split that is not there.

        >>> val = load_refer("data/refshapes", "refshapes").select(split="val")
        >>> set(val.expressions["split"]), val.regions["image_id"].isin(val.images.index).all().item()
        ({'val'}, True)
        """
        marks = {*self.expressions["split"], *self.notes["split"]}
        marks = {mark for mark in marks if split in _parts_of(mark)}
        expressions = self.expressions[self.expressions["split"].isin(marks)]
        if expressions.empty:
            present = ", ".join(self.splits) or "none"
            raise DatasetError(f"{self.name} ({self.split_by}) has no split {split!r}. Pass one of these: {present}.")
        images = self.images[self.images.index.isin(expressions["image_id"])].iloc[:limit]
        expressions = expressions[expressions["image_id"].isin(images.index)]
        regions = self.regions[self.regions["image_id"].isin(images.index)]
        here = self.notes["image_id"].isin(images.index)
        of_image, of_split = here & (self.notes["split"] == ""), self.notes["split"].isin(marks)
        notes = self.notes[of_image | (of_split if limit is None else of_split & here)]
        frames = {"images": images, "regions": regions, "expressions": expressions}
        return dataclasses.replace(self, **frames, notes=notes, counts=_count(notes))

    def image_path(self, image_id: int) -> Path:
        """Return where the image of this id lies. Raises DatasetError for an id that the data set does not have."""
        if image_id not in self.images.index:
            raise DatasetError(f"{self.name} has no image {image_id!r} among its {len(self.images)} images.")
        return self.image_root / str(self.images.at[image_id, "file_name"])

    def load_image(self, image_id: int) -> Image.Image:
        """Return one image in RGB. Raises DatasetError when it is missing, damaged or not of the size annotated."""
        path = self.image_path(image_id)
        width, height = (int(self.images.at[image_id, side]) for side in ("width", "height"))
        remedy = "Get it again with `bsap data get`, or pass the right `image_root`."
        try:
            with Image.open(path) as image:
                if image.size == (width, height):  # before decoding: a bomb or a wrong picture costs nothing
                    return image.convert("RGB")
                found = "{}×{}".format(*image.size)
        except FileNotFoundError as error:
            raise DatasetError(f"{path}: image {image_id} of {self.name} is missing. {remedy}") from error
        except Exception as error:  # damaged bytes raise nearly anything in PIL's decoders, struct.error included
            raise DatasetError(f"{path}: image {image_id} cannot be decoded ({error}). {remedy}") from error
        raise DatasetError(f"{path}: image {image_id} has {found} pixels, but instances.json says {width}×{height} ('width', "
                           f"'height'), so its boxes would be misplaced. {remedy}")  # fmt: skip

    def missing_images(self) -> list[str]:
        """Return the file names that are not on disk, so that a run can stop before it encodes anything."""
        return [name for name in self.images["file_name"] if not os.path.isfile(self.image_root / name)]


def load_refer(
    root: str | Path, dataset: str = "refcoco", split_by: str | None = None, image_root: str | Path | None = None
) -> ReferDataset:
    """Read `root/<dataset>/instances.json` and `root/<dataset>/refs(<split_by>).p`.

    `split_by` is "umd" for refcocog and "unc" for all others when not given; `image_root` is
    `root/images/mscoco/images/train2014`. Images are opened by `ReferDataset.load_image` only.

    The text of an expression is `sent` (lower case, cleaned by the authors) where there is one, else `raw`. Expressions
    of white space are left out and counted: CLIP would score the template around them. Boxes that leave their image are
    clipped and counted. Boxes without area there (NaN and infinity too) are left out and counted; an expression that
    means such a box is an error, since no method could be right about it. All else that is wrong raises DatasetError.

    >>> ds = load_refer("data/refshapes", dataset="refshapes")
    >>> list(ds.expressions.columns), ds.splits
    (['ref_id', 'ann_id', 'image_id', 'split', 'text'], ['test', 'train', 'val'])
    """
    root, split_by = Path(root), split_by or ("umd" if dataset == "refcocog" else "unc")
    folder = root / dataset
    if not folder.is_dir():
        raise DatasetError(f"{folder}: there is no such folder. Get the data set with `bsap data get {dataset}`, or pass as "
                           f"`root` the folder that holds '{dataset}/instances.json'.")  # fmt: skip
    refs_path = folder / f"refs({split_by}).p"
    if not refs_path.is_file():
        present = ", ".join(sorted(path.name for path in folder.glob("refs(*).p"))) or "none"
        raise DatasetError(f"{refs_path}: there is no such file (present: {present}). Pass another `split_by`.")
    images, regions, has_area, clipped = _read_instances(folder / "instances.json")
    expressions, notes = _read_refs(refs_path, regions, has_area)
    image_ids, touched = regions["image_id"].to_numpy(), {CLIPPED: clipped, NO_AREA: ~has_area}
    frames = [pd.DataFrame({"what": what, "image_id": image_ids[mask], "split": ""}) for what, mask in touched.items()]
    notes = pd.concat([*frames, notes], ignore_index=True)
    image_root = Path(image_root) if image_root is not None else root / "images/mscoco/images/train2014"
    return ReferDataset(dataset, split_by, image_root, images, regions[has_area], expressions, _count(notes), notes)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises DatasetError when it is missing or malformed."""
    content = _read(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is not valid JSON ({error}). A broken download? {_GET_AGAIN}") from error


def column(
    records: Sequence, key: str, types: set[type], path: Path, name: Callable[[int], str], otherwise: str | None = None
) -> list:
    """Return `record[key]` of all records, where that is missing `record[otherwise]`; all are of one of `types`.

    Raises DatasetError for the first record, called `name(i)`, where that is not so. Integers must fit 64 bits, and
    text must be valid Unicode.
    """

    def problem(record: Any) -> str | None:
        if type(record) is not dict:
            return f"the entry is {_show(record)}, no record of keys"
        if key not in record and otherwise not in record:
            return "there is no such key"
        value = record[key if key in record else otherwise]
        return None if _sound([value], types) else f"{_show(value)} is no valid {wanted}"

    wanted = " or ".join(sorted(kind.__name__ for kind in types))
    get = itemgetter(key) if otherwise is None else lambda record: record[key if key in record else otherwise]
    try:
        values = list(map(get, records))
        if _sound(values, types):
            return values
    except (KeyError, TypeError, IndexError):  # from a record that is no dict, any of these
        pass
    i, what = next((i, what) for i, record in enumerate(records) if (what := problem(record)))
    raise DatasetError(f"{path}: {name(i)}, key '{key}': {what}. {_REMEDY}")


def box_array(boxes: Sequence[list], path: Path, name: Callable[[int], str]) -> np.ndarray:
    """Return boxes, each a list of four numbers (xywh), as float64 [N, 4]. Raises DatasetError for the first that is not."""
    numbers = {int, float}
    if set(map(type, boxes)) <= {list} and set(map(len, boxes)) <= {4}:
        flat = list(chain.from_iterable(boxes))
        if _sound(flat, numbers):
            return np.array(flat, dtype=np.float64).reshape(-1, 4)
    good = (type(box) is list and len(box) == 4 and _sound(box, numbers) for box in boxes)
    i, box = next((i, box) for i, (box, is_good) in enumerate(zip(boxes, good, strict=True)) if not is_good)
    raise DatasetError(f"{path}: {name(i)}: {_show(box)} is no box of four numbers [x, y, w, h]. {_REMEDY}")


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip `boxes` [N, 4] (xywh, pixels) to images of `sizes` [N, 2] (width, height).

    Returns the boxes [N, 4], which of them have an area inside their image [N], and which of these were moved [N]. A
    thousandth of a pixel outside is rounding, and such boxes stay as they are.

    >>> clip_boxes(np.array([[-5.0, 2, 15, 4], [3, 3, 2, 0]]), np.array([[20, 10], [20, 10]]))
    (array([[ 0.,  2., 10.,  4.],
           [ 3.,  3.,  2.,  0.]]), array([ True, False]), array([ True, False]))
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are what has_area is for
        near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        outside = (near < -1e-3).any(1) | (far > sizes + 1e-3).any(1)
        near, far = np.clip(near, 0, sizes), np.clip(far, 0, sizes)
        clipped = np.where(outside[:, None], np.hstack([near, far - near]), boxes)
        has_area = np.isfinite(boxes).all(1) & (far > near).all(1)
    return clipped, has_area, has_area & outside


def _read_instances(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray, np.ndarray]:
    """Return images, all annotations with clipped boxes, which of these have an area, and which were clipped."""
    content, names = [read_json(path)], ("images", "annotations", "categories")
    tables = {table: column(content, table, {list}, path, lambda i: "the whole file")[0] for table in names}

    def name(table: str) -> Callable[[int], str]:
        return (table + "[{}]").format

    def read(table: str, key: str, *types: type) -> list:
        return column(tables[table], key, set(types), path, name(table))

    images = pd.DataFrame(
        {
            "file_name": pd.Series(read("images", "file_name", str), dtype=str),
            "width": np.array(read("images", "width", int), dtype=np.int64),
            "height": np.array(read("images", "height", int), dtype=np.int64),
        }
    ).set_index(_unique(read("images", "id", int), "image_id", "id", path, name("images")))
    no_size = (images["width"] <= 0) | (images["height"] <= 0)
    _refuse(no_size, path, name("images"), "'width' and 'height' must be positive")
    leaves = images["file_name"].astype(object).str.contains(r"^\s*$|^/|\\|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|\x00")
    _refuse(leaves, path, name("images"), "'file_name' is empty or leads out of the image folder, which none may do")

    categories = np.array(read("categories", "name", str), dtype=object)
    category_ids = _unique(read("categories", "id", int), "category_id", "id", path, name("categories"))
    category = category_ids.get_indexer(read("annotations", "category_id", int))
    _refuse(category < 0, path, name("annotations"), "'category_id' is not among the categories")
    image_ids = np.array(read("annotations", "image_id", int), dtype=np.int64)
    image = images.index.get_indexer(image_ids)
    _refuse(image < 0, path, name("annotations"), "'image_id' is not among the images")
    boxes = box_array(read("annotations", "bbox", list), path, lambda i: f"annotations[{i}], key 'bbox'")
    boxes, has_area, clipped = clip_boxes(boxes, images[["width", "height"]].to_numpy()[image])
    regions = pd.DataFrame(
        {
            "image_id": image_ids,
            "category": pd.Categorical(categories[category], categories=pd.unique(categories)),
            **dict(zip(XYWH, boxes.T, strict=True)),
            "area": np.array(read("annotations", "area", int, float), dtype=np.float64),
            "iscrowd": np.array(read("annotations", "iscrowd", int), dtype=np.int64),
            "segmentation": pd.Series(read("annotations", "segmentation", dict, list, type(None)), dtype=object),
        }
    ).set_index(_unique(read("annotations", "id", int), "ann_id", "id", path, name("annotations")))
    return images, regions, has_area, clipped


def _read_refs(path: Path, regions: pd.DataFrame, has_area: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the expressions that have a text, and notes of what is left out."""
    records, name = _unpickle(path), "refs[{}]".format
    if type(records) is not list:
        raise DatasetError(f"{path}: holds {_show(records)}, not a list of refs. {_REMEDY}")
    ids = ("ref_id", "ann_id", "image_id")
    refs = pd.DataFrame({key: np.array(column(records, key, {int}, path, name), dtype=np.int64) for key in ids})
    refs["split"] = pd.Series(column(records, "split", {str}, path, name), dtype=str)
    _unique(refs["ref_id"], "ref_id", "ref_id", path, name)
    region = regions.index.get_indexer(refs["ann_id"])
    _refuse(region < 0, path, name, "'ann_id' is not among the annotations of instances.json")
    other_image = refs["image_id"].to_numpy() != regions["image_id"].to_numpy()[region]
    _refuse(other_image, path, name, "'image_id' is not the image of annotation 'ann_id' in instances.json")
    cannot_be_found = "'ann_id' means an annotation whose 'bbox' in instances.json has no area inside its image"
    _refuse(~has_area[region], path, name, cannot_be_found)

    sentences, row = _flatten(column(records, "sentences", {list}, path, name))
    first = np.searchsorted(row, row)  # the first sentence of the same ref

    def sentence(i: int) -> str:
        return f"refs[{row[i]}]['sentences'][{i - first[i]}]"

    sent_ids = _unique(column(sentences, "sent_id", {int}, path, sentence), "sent_id", "sent_id", path, sentence)
    text = column(sentences, "sent", {str}, path, sentence, otherwise="raw")
    expressions = refs.iloc[row].set_index(sent_ids).assign(text=pd.Series(text, index=sent_ids, dtype=str))
    has_text = np.array([bool(words.strip()) for words in text], dtype=bool)

    listed, listed_row = _flatten(column(records, "sent_ids", {list}, path, name))
    listed = column([{"sent_ids": i} for i in listed], "sent_ids", {int}, path, lambda i: name(listed_row[i]))
    left_out = {
        NO_TEXT: expressions[~has_text],
        NO_SENTENCES: refs[~refs.index.isin(row)],
        UNGIVEN: refs.iloc[listed_row[sent_ids.get_indexer(listed) < 0]],
    }
    notes = pd.concat([frame[["image_id", "split"]].assign(what=what) for what, frame in left_out.items()])
    return expressions[has_text], notes


def _flatten(lists: list[list]) -> tuple[list, np.ndarray]:
    """Return the items of all lists, and the number of the list that each is from."""
    lengths = np.array(list(map(len, lists)), dtype=np.int64)
    return list(chain.from_iterable(lists)), np.repeat(np.arange(len(lists)), lengths)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles plain data only: a pickle may otherwise run any code.

    It is the pure Python one (some seconds more for RefCOCO): in the C one, a few damaged bytes can ask for gigabytes
    of memo. For the same reason BYTEARRAY8 is out, which allocates before it reads.
    """

    dispatch = {code: method for code, method in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}
    allowed = dict(dict=dict, list=list, tuple=tuple, str=str, int=int, float=float, bool=bool, unicode=str, long=int)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in self.allowed:
            return self.allowed[name]
        raise _RefusedError(f"{module}.{name}"[:100])


class _RefusedError(Exception):
    pass


def _unpickle(path: Path) -> Any:
    """Return the content of a pickle of plain data, of any protocol, from Python 2 or 3. Nothing in it is executed."""
    data = _read(path)
    try:
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
        except UnicodeDecodeError:  # byte strings of Python 2 in another encoding; Latin-1 reads any byte
            return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _RefusedError as error:
        problem = f"asks for {error}, which was refused and not executed: it may hold lists, dicts, text and numbers"
        raise DatasetError(f"{path}: {problem}. Do not trust this file. {_GET_AGAIN}") from None
    except Exception as error:  # damaged opcodes raise nearly anything
        problem = f"is not a complete pickle ({type(error).__name__}: {_show(str(error))})"
        raise DatasetError(f"{path}: {problem}. A broken download? {_GET_AGAIN}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}). Check the path. {_GET_AGAIN}") from error


def _sound(values: Sequence, types: set[type]) -> bool:
    """Tell whether all values are exactly of `types` (True is no int), fit 64 bits and, if text, are valid Unicode."""
    if not set(map(type, values)) <= types:
        return False
    try:
        if str in types:
            "".join(values).encode()
        elif int in types:
            np.array(values, dtype=np.float64 if float in types else np.int64)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def _show(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def _unique(ids: Any, index_name: str, key: str, path: Path, name: Callable[[int], str]) -> pd.Index:
    index = pd.Index(np.array(ids, dtype=np.int64), name=index_name)
    _refuse(index.duplicated(), path, name, f"'{key}' is that of an earlier entry too, and must be unique")
    return index


def _refuse(wrong: Any, path: Path, name: Callable[[int], str], problem: str) -> None:
    """Raise DatasetError for the first entry that is wrong, and say how many there are."""
    rows = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if len(rows):
        raise DatasetError(f"{path}: {name(rows[0])}: {problem} ({len(rows)} such entries). {_REMEDY}")


def _count(notes: pd.DataFrame) -> dict[str, int]:
    return {what: int((notes["what"] == what).sum()) for what in NOTES}


def _parts_of(split: str) -> set[str]:
    """The splits that expressions marked `split` belong to: {"testA", "testB"} for "testAB", else itself."""
    several = re.fullmatch("test([A-Z]{2,})", split)
    return {f"test{letter}" for letter in several[1]} if several else {split}
