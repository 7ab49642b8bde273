"""RefCOCO, RefCOCO+, RefCOCOg (Yu et al., ECCV 2016) and data of one's own as pandas frames; all reading and writing of files."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

XYWH = ["x", "y", "w", "h"]
FORMATS = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF"]  # none starts a program, as EPS does
MAX_BYTES = 2 << 30  # of a file; PIL itself refuses pictures of more than 178,956,970 pixels


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


def open_picture(source: Path | str | bytes | Image.Image, upright: bool = False) -> Image.Image:
    """Return a picture, from a file or its bytes, in RGB and without metadata; of an animation the first frame.

    16 bits are scaled to 8 by 65,535, 32 bits and floats by their maximum, at least 1. Raises DatasetError.
    `upright` turns it by its EXIF orientation: not where boxes are in raw pixels, as COCO's.
    """
    name, content = (source, read_bytes(source)) if isinstance(source, Path | str) else ("The picture", source)
    with reading(name, f"a whole picture of a format among {', '.join(FORMATS)}"):
        image = Image.open(io.BytesIO(content), formats=FORMATS) if isinstance(content, bytes) else content
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode.startswith("I") or image.mode == "F":  # PIL would cut off all above 255
            values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
            top = 65_535 if image.mode.startswith("I;16") else max(values.max(), 1)
            image = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
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

    def select(self, split: str | Sequence[str] | None = None, limit: int | None = None) -> "ReferDataset":
        """Return one or several splits (None: all) with their images, and of each the first `limit` images (0: all)."""
        if not isinstance(split, str | None):  # refcocog's splits share images
            parts, names = [self.select(one, limit) for one in split], ("images", "annotations", "expressions")
            joint = {name: pd.concat([getattr(part, name) for part in parts]) for name in names}
            return dataclasses.replace(self, **{name: one[~one.index.duplicated()] for name, one in joint.items()})
        if split not in (None, *self.splits):
            raise DatasetError(f"{self.name} has no split {split!r}, only {', '.join(self.splits) or 'none'}.")
        if (limit or 0) < 0:
            raise DatasetError(f"limit is {limit}: pass how many images to take, or 0 for all.")
        chosen = self.expressions if split is None else self.expressions[self.expressions["split"] == split]
        images = self.images[self.images.index.isin(chosen["image_id"])].iloc[: limit or None]
        within = [frame[frame["image_id"].isin(images.index)] for frame in (self.annotations, chosen)]
        return dataclasses.replace(self, images=images, annotations=within[0], expressions=within[1])

    def image_path(self, image_id: int) -> Path:
        """Return where the image of this id lies."""
        return self.image_root / self.images.at[image_id, "file_name"]

    def load_image(self, image_id: int) -> Image.Image:
        """Return one image in RGB. Raises DatasetError when it is missing, damaged or not of the size annotated."""
        path, size = self.image_path(image_id), [*map(int, self.images.loc[image_id, ["width", "height"]])]
        if list((image := open_picture(path)).size) != size:
            raise DatasetError(f"{path}: has {image.size} pixels, not {size} as annotated. Put the right one there.")
        return image

    def missing_images(self) -> list[str]:
        """Return the file names that are not on disk, so that a run can stop before it encodes anything."""
        return [name for name in self.images["file_name"] if not os.path.isfile(self.image_root / name)]


def load_refer(root: str | Path, dataset: str = "refcoco", split_by: str | None = None,
               image_root: str | Path | None = None) -> ReferDataset:  # fmt: skip
    """Read the data set in the folder `root/dataset`: the first of these that is there (data/README.md shows each).

    `refs(<split_by>).p` ("umd" for refcocog, else "unc") with `instances.json`, `expressions.csv`, `<dataset>_<split>.json`;
    an `instances.json` beside the latter two gives their boxes masks and neighbours. Boxes that leave their image are
    clipped, those without area and expressions of white space left out, each counted; all else raises DatasetError.
    """
    folder, split_by = Path(root) / dataset, split_by or ("umd" if dataset == "refcocog" else "unc")
    refs, instances, own = folder / f"refs({split_by}).p", folder / "instances.json", folder / "images"
    image_root = Path(image_root or (own if own.is_dir() else Path(root) / "images/mscoco/images/train2014"))
    tables = sorted([*folder.glob("expressions.csv")] or folder.glob(f"{dataset}_[tv]*.json"))  # train, val, test, …
    if not refs.is_file() and not tables:
        raise DatasetError(f"{refs}: no such file, nor a table. Run `bsap data get`, or pass another name or split_by.")
    with reading(folder, "a data set as data/README.md describes it"):
        if refs.is_file():
            images, annotations, expressions = *_read_instances(instances), _read_refs(refs)
        else:
            rows = pd.concat(map(_read_rows, tables), ignore_index=len(tables) > 1)
            images, annotations, expressions = _split_up(rows, instances)
        images, annotations, counts = _clean(images, annotations, folder, image_root, instances.is_file())
    image = expressions["ann_id"].map(annotations["image_id"])
    where = f"{refs}: expression " if refs.is_file() else f"{tables[0] if len(tables) == 1 else folder}: row "
    refuse(image != expressions["image_id"], where, "its target is no object with area in its image")
    blank = expressions["text"].str.strip() == ""
    counts["expressions without text left out"] = int(blank.sum())
    return ReferDataset(dataset, split_by, image_root, images, annotations, expressions[~blank], counts)


def _read_instances(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images and the annotations of a file in COCO's form."""
    content = read_json(path)
    images = read_table(content["images"], f"{path}: images", id=int, file_name=str, width=int, height=int)
    names = read_table(content["categories"], f"{path}: categories", id=int, name=str)
    kinds = {"id": int, "image_id": int, "category_id": int, "bbox": XYWH, "area": float, "iscrowd": int}
    annotations = read_table(content["annotations"], f"{path}: annotations", **kinds, segmentation=object)
    category = annotations["category_id"].map(names.set_index("id")["name"])
    refuse(category.isna(), f"{path}: annotations", "'category_id' is not among the categories")
    return images, annotations.assign(category=pd.Categorical(category, names["name"].unique()))


def _clean(images: pd.DataFrame, annotations: pd.DataFrame, folder: Path, image_root: Path, published: bool) -> tuple:
    """Return both frames by their ids, checked, boxes clipped and degenerate polygons dropped; and counts."""
    names = images.set_index(images["file_name"])["file_name"]  # so that what is refused is named
    leaves = names.str.contains(r"^\s*$|^/|\\|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|\x00", regex=True)
    refuse(leaves, f"{folder}: images", "'file_name' is empty or leads out of the image folder")
    if "width" not in images:
        absent = pd.Series([not (image_root / name).is_file() for name in names], names)
        refuse(absent, f"{folder}: picture ", f"not in {image_root}, by this very name")
        images[["width", "height"]] = [open_picture(image_root / name).size for name in images["file_name"]]
    images = images.set_index("id").rename_axis("image_id")[["file_name", "width", "height"]]
    masks = [clean_mask(mask) for mask in annotations["segmentation"]]
    annotations["segmentation"] = pd.Series([mask for mask, _ in masks], annotations.index, object)
    if not published:
        check_boxes(annotations, images, folder)
    annotations, counts = clip_boxes(annotations.set_index("id").rename_axis("ann_id"), images)
    counts["degenerate polygons dropped"] = sum(dropped for _, dropped in masks)
    return images, annotations[["image_id", "category", *XYWH, "area", "iscrowd", "segmentation"]], counts


def _read_refs(path: Path) -> pd.DataFrame:
    """Return the expressions of a pickle of refs, of any protocol, from Python 2 or 3. Nothing in it is executed."""
    kinds = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sent_id": int, "sent": str}
    with reading(path, "a whole pickle of lists, dicts, text and numbers, from where you trust it"):
        refs = _PlainUnpickler(io.BytesIO(read_bytes(path)), encoding="utf-8", errors="replace").load()
        table = read_table([{**ref, **text} for ref in refs for text in ref["sentences"]], f"{path}: refs", **kinds)
        return table.set_index("sent_id").rename(columns={"sent": "text"})


def _read_rows(path: Path) -> pd.DataFrame:
    """Return a row an expression of a CSV or of the list of an evaluation kit, whose img_id is COCO's name and a number."""
    kinds = {"file_name": str, "text": str, "split": str, "bbox": XYWH, "category": str, "segmentation": object}
    with reading(path, "a CSV in UTF-8, its first line file_name,x,y,w,h,text, or a list (data/README.md shows both)"):
        if path.suffix == ".csv":
            table, split = _read_csv(path), ""
            if "segmentation" in table:
                table["segmentation"] = [json.loads(mask or "null") for mask in table["segmentation"]]
        else:
            table, split = pd.DataFrame(read_json(path)), path.stem.removeprefix(f"{path.parent.name}_")
            table["file_name"] = table["img_id"].str.replace(r"^([^.]+?)((?<=_\d{12})_\d+)?$", r"\1.jpg", regex=True)
            table["text"] = table["sents"]
        sizes = {"width": int, "height": int} if "width" in table else {}
        records = [{"split": split, "category": "", **record} for record in table.to_dict("records")]
    return read_table(records, f"{path}: row", **kinds, **sizes).set_axis(table.index)


def _read_csv(path: Path) -> pd.DataFrame:
    """Return the rows of a table that are not empty, numbered as a spreadsheet does; Excel's semicolons and commas are read."""
    text = read_bytes(path).decode("utf-8-sig")
    mark = max(",;\t", key="".join(text.splitlines()[:1]).count)
    how: Any = {"sep": mark, "skipinitialspace": True, "keep_default_na": False, "skip_blank_lines": False}
    table = pd.read_csv(io.StringIO(text), dtype=str, **how).apply(lambda cells: cells.str.strip())
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("a row has more cells than the first line: put texts with commas into quotes")
    table = table.rename(columns=lambda name: name.strip().lower())
    if wrong := [name for name in ["file_name", *XYWH, "text", *table] if [*table].count(name) != 1]:
        raise ValueError(f"its first line should name {wrong[0]} once; it has {', '.join(table)}")
    table = table.set_axis(table.index + 2)[(table != "").any(axis=1).to_numpy()]
    if table.empty:
        raise ValueError("there is no row below its first line")
    refuse(table["text"].str.contains("[\r\n]"), f"{path}: row ", "its text goes on in the next row: is a quote open?")
    swap = {r"\.": "?", ",": "."} if mark == ";" and "," in "".join(table[XYWH].sum()) else {}  # so 1.200 is no 1.2
    boxes = table[XYWH].replace(swap, regex=True).apply(pd.to_numeric, errors="coerce")
    refuse(~np.isfinite(boxes).all(axis=1), f"{path}: row ", "x, y, w and h should be numbers")
    paths = table["file_name"].str.replace("\\", "/").map(lambda name: name and posixpath.normpath(name))
    splits = table["split"].replace("", "all") if "split" in table else "all"
    return table.assign(file_name=paths, bbox=boxes.to_numpy().tolist(), split=splits)


def _split_up(table: pd.DataFrame, instances: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return images, objects (those of `instances`, if it is there) and expressions, each of the object that has its box."""
    if instances.is_file():
        images, objects = _read_instances(instances)
    else:
        numbers = table["file_name"].str.extract(r"(\d{1,18})(?:\.\w+)?$")[0].astype("Int64")  # COCO's ids
        if numbers.isna().any() or numbers.nunique() < table["file_name"].nunique():
            numbers = table.groupby("file_name", sort=False).ngroup() + 1
        table["image_id"] = numbers.astype(np.int64)
        images = table.drop_duplicates("image_id").rename(columns={"image_id": "id"})
        objects = table.replace("", None).groupby(["image_id", *XYWH], sort=False, as_index=False).first()
        objects = objects.fillna({"category": ""}).astype({"category": "category"})
        objects = objects.assign(id=objects.index + 1, area=objects["w"] * objects["h"], iscrowd=0)
    names = images["file_name"].str.strip().map(posixpath.normpath).to_frame().assign(image_id=images["id"])
    pairs = table.reset_index(names="sent_id").merge(names).merge(objects, on="image_id", suffixes=("", "_"))
    pairs["gap"] = np.abs(pairs[XYWH].to_numpy() - pairs[[f"{side}_" for side in XYWH]].to_numpy()).max(1)
    found = pairs[pairs["gap"] < 0.1001].sort_values(["sent_id", "gap"]).drop_duplicates("sent_id").set_index("sent_id")
    refuse(~table.index.to_series().isin(found.index), f"{instances.parent}: row ", "no object has its box")
    found["ann_id"] = found["ref_id"] = found["id"]
    return images, objects, found[["ref_id", "ann_id", "image_id", "split", "text"]]


def clean_mask(segmentation: Any) -> tuple[Any, int]:
    """Return a segmentation as RLE or polygons of three points or more (None: there are none), and how many had less."""
    if not isinstance(segmentation, list):
        return segmentation or None, 0
    kept = [part for part in segmentation if type(part) is not list or (len(part) > 5 and len(part) % 2 == 0)]
    return kept or None, len(segmentation) - len(kept)


def check_boxes(frame: pd.DataFrame, images: pd.DataFrame, where: Any) -> None:
    """Raise DatasetError if over 20 % of the boxes, and two, have no area or leave their images by 5 %, or none is over 1."""
    boxes, sizes = frame[XYWH].to_numpy(), images.loc[frame["image_id"], ["width", "height"]].to_numpy()
    far = (boxes[:, :2] < -1 - sizes / 20) | (boxes[:, :2] + boxes[:, 2:] > 1 + 1.05 * sizes)
    leave = (far | ~(boxes[:, 2:] > 0)).any(1)
    if leave.sum() > max(1, 0.2 * len(boxes)) or 0 < boxes.max(initial=0) <= 1:
        raise DatasetError(f"{where}: {leave.mean():.0%} of the boxes leave their picture, or they are shares of 1. Write x, y, "
                           "w, h in pixels of these pictures in this size, not corners or centres.")  # fmt: skip


def clip_boxes(frame: pd.DataFrame, images: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Clip the boxes of a frame to their images, and leave out those without area; return the others, and counts."""
    boxes, sizes = frame[XYWH].to_numpy(), images.loc[frame["image_id"], ["width", "height"]].to_numpy()
    near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    outside = (near < -1e-3).any(1) | (far > sizes + 1e-3).any(1)
    near, far = np.clip(near, 0, sizes), np.clip(far, 0, sizes)
    has_area = np.isfinite(boxes).all(1) & (far > near).all(1)
    clipped = np.where(outside[:, None], np.hstack([near, far - near]), boxes)
    counts = {"boxes clipped to their image": has_area & outside, "boxes without area left out": ~has_area}
    frame = frame.assign(**dict(zip(XYWH, clipped.T, strict=True)))[has_area]
    return frame, {what: int(rows.sum()) for what, rows in counts.items()}


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
            if key in ("id", "sent_id"):
                refuse(columns[key].duplicated(), where, f"'{key}' is that of an earlier entry too")
    return pd.DataFrame(columns)


def refuse(wrong: pd.Series, where: str, problem: str) -> None:
    """Raise DatasetError for the first entry that is wrong, by its index, and say how many there are."""
    if wrong.any():
        entry = wrong.idxmax() if where.endswith(" ") else f"[{wrong.idxmax()}]"
        raise DatasetError(f"{where}{entry}: {problem} ({wrong.sum()} such entries). Correct the file.")


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles plain data, for a pickle may run any code; in Python, for a few bytes can make the C one ask for gigabytes."""

    dispatch = dict(pickle._Unpickler.dispatch)
    for code in (pickle.BYTEARRAY8, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.FROZENSET):
        del dispatch[code[0]]  # as many bytes as it says; and nested keys, which can take for ever to hash

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:99] + ", which was refused and not executed")


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a regular file of at most MAX_BYTES. Raises DatasetError when it is missing or no such."""
    with reading(path, f"the path of a regular file of at most {MAX_BYTES:,} bytes"):
        if os.path.getsize(path) > MAX_BYTES or not os.path.isfile(path):
            raise ValueError("it is a folder or a device, or too large")
        return Path(path).read_bytes()


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises DatasetError when it is missing or malformed."""
    with reading(path, "a whole file of valid JSON"):
        return json.loads(read_bytes(path))


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
