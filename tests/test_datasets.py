"""The loader against a plain reading of the same files, with what is hostile, damaged or merely odd in them."""

import copy
import csv
import json
import math
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bsap_utils import datasets
from bsap_utils.datasets import XYWH, DatasetError, load_refer

CLIPPED, NO_AREA = "boxes clipped to their image", "boxes without area left out"
NO_TEXT, DEGENERATE = "expressions without text left out", "degenerate polygons dropped"
NOTHING = dict.fromkeys((CLIPPED, NO_AREA, NO_TEXT, DEGENERATE), 0)


def sentence(sent_id, text):
    return {"sent_id": sent_id, "sent": text, "raw": text.upper(), "tokens": text.split()}


def annotation(ann_id, image_id, bbox, category_id=1, iscrowd=0, segmentation=None):
    ids = {"id": ann_id, "image_id": image_id, "category_id": category_id}
    return ids | {"bbox": bbox, "iscrowd": iscrowd, "area": 12.5, "segmentation": segmentation}


def ref(ref_id, ann_id, image_id, split, sentences):
    ids = {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split}
    return ids | {"sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences], "file_name": "not the image"}


SQUARE = [1.0, 2, 9, 2, 9, 9]
INSTANCES = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
        {"id": 9, "file_name": "c.jpg", "width": 8, "height": 8},
    ],
    "annotations": [
        annotation(11, 7, [1, 2.5, 10, 10], segmentation=[SQUARE]),
        annotation(12, 7, [-4, 20, 10, 20], category_id=5),  # leaves the image
        annotation(10, 3, [0, 0, 20, 10], segmentation={"size": [10, 20], "counts": "whatever"}),
        annotation(13, 3, [5, 5, 4.0, 0.0]),  # no area
        annotation(14, 7, [30, 1, 5, 5], iscrowd=1),
        annotation(15, 9, [2, 2, 3, 3], category_id=5),
    ],
    "categories": [{"id": 5, "name": "star"}, {"id": 1, "name": "mug"}, {"id": 2, "name": "key"}],
}
REFS = [
    ref(100, 11, 7, "train", [sentence(1000, "the mug")]),
    ref(101, 12, 7, "val", [sentence(1003, "left star"), sentence(1001, "étoile"), sentence(1002, " \t")]),
    ref(102, 10, 3, "testA", [sentence(1004, "mug")]),
    ref(103, 15, 9, "testB", [sentence(1005, "star")]),
    ref(104, 15, 9, "testB", []),
]


def write(root, instances=INSTANCES, refs=REFS, protocol=2, name="refcoco"):
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs(unc).p").write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol))
    return Path(root)


def plain_reading(folder):
    """The oracle: the same files, one record after the other, in plain Python."""
    instances = json.loads((folder / "instances.json").read_text())
    refs = pickle._loads(next(folder.glob("refs(*).p")).read_bytes(), encoding="utf-8")  # the C one may take all memory
    images, annotations, expressions, counts = {}, {}, {}, dict(NOTHING)
    for image in instances["images"]:
        images[image["id"]] = {key: image[key] for key in ("file_name", "width", "height")}
    names = {category["id"]: category["name"] for category in instances["categories"]}
    for ann in instances["annotations"]:
        width, height = images[ann["image_id"]]["width"], images[ann["image_id"]]["height"]
        x, y, w, h = ann["bbox"]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if not all(map(math.isfinite, (x, y, w, h))) or right <= left or bottom <= top:
            counts[NO_AREA] += 1
            continue
        counts[CLIPPED] += (left, top, right, bottom) != (x, y, x + w, y + h)
        box = {"x": left, "y": top, "w": right - left, "h": bottom - top}
        more = {key: ann[key] for key in ("area", "iscrowd", "segmentation")}
        annotations[ann["id"]] = {"image_id": ann["image_id"], "category": names[ann["category_id"]]} | box | more
    for one in refs:
        assert annotations[one["ann_id"]]["image_id"] == one["image_id"]
        ids = {key: one[key] for key in ("ref_id", "ann_id", "image_id", "split")}
        for s in one["sentences"]:
            counts[NO_TEXT] += not s["sent"].strip()
            if s["sent"].strip():
                expressions[s["sent_id"]] = ids | {"text": s["sent"]}
    return images, annotations, expressions, counts


def assert_same(ds, oracle):
    *frames, counts = oracle
    ours = {"image_id": ds.images, "ann_id": ds.annotations, "sent_id": ds.expressions}
    for (index, frame), records in zip(ours.items(), frames, strict=True):
        assert frame.index.name == index and frame.index.tolist() == list(records)
        for row, record in zip(frame.to_dict("records"), records.values(), strict=True):
            assert row.keys() == record.keys()
            for key, value in record.items():
                close = isinstance(value, float) and math.isclose(row[key], value, abs_tol=2e-3)
                same = close or row[key] == value or (value != value and row[key] != row[key])
                assert same, (index, key, row[key], value)
    assert ds.counts == counts


# The UNC layout


def test_reads_the_same_as_a_plain_reading(tmp_path):
    ds = load_refer(write(tmp_path))
    assert_same(ds, plain_reading(tmp_path / "refcoco"))
    assert ds.counts == NOTHING | {CLIPPED: 1, NO_AREA: 1, NO_TEXT: 1}
    assert ds.annotations.loc[12, XYWH].tolist() == [0, 20, 6, 10]
    assert ds.categories == ["key", "mug", "star"] and ds.splits == ["testA", "testB", "train", "val"]
    twice = edited("instances.categories.2.name", "mug")  # two ids of one name
    assert load_refer(write(tmp_path / "twice", **twice)).categories == ["mug", "star"]
    assert (ds.name, ds.split_by, ds.image_root) == ("refcoco", "unc", tmp_path / "images/mscoco/images/train2014")


def test_reads_the_sample_and_real_photographs(sample, photos, real_photos):
    assert_same(sample, plain_reading(Path("data/refshapes/refshapes")))
    for root, name in ((photos, "refcoco"), *((real_photos, name) for name in ("refcoco", "refcoco+", "refcocog"))):
        ds = load_refer(root, name)
        assert_same(ds, plain_reading(root / name))
        assert ds.counts == NOTHING and ds.missing_images() == [] and ds.load_image(ds.images.index[0]).mode == "RGB"


def test_an_empty_data_set(tmp_path):
    ds = load_refer(write(tmp_path, {"images": [], "annotations": [], "categories": []}, []))
    full = load_refer(write(tmp_path / "full"))
    for name in ("images", "annotations", "expressions"):
        assert getattr(ds, name).empty and getattr(ds, name).dtypes.drop("category", errors="ignore").equals(
            getattr(full, name).dtypes.drop("category", errors="ignore")
        )
    with pytest.raises(DatasetError, match="none"):
        ds.select("val")


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_and_large_ids(tmp_path, protocol):
    instances, refs = copy.deepcopy(INSTANCES), copy.deepcopy(REFS)
    new = {7: 2**53 + 1, 3: -3, 9: 2**62}
    for image in instances["images"]:
        image["id"] = new[image["id"]]
    for record in (*instances["annotations"], *refs):
        record["image_id"] = new[record["image_id"]]
    ds = load_refer(write(tmp_path, instances, refs, protocol))
    assert_same(ds, plain_reading(tmp_path / "refcoco"))


@pytest.mark.parametrize(("raw", "text"), [("étoile".encode(), "étoile"), ("étoile".encode("latin1"), "\ufffdtoile")])
def test_byte_strings_of_python_2(tmp_path, raw, text):
    refs = copy.deepcopy(REFS)
    refs[1]["sentences"][1]["sent"] = "@@"
    python2 = pickle.dumps(refs, 2).replace(b"X\x02\x00\x00\x00@@", b"U" + bytes([len(raw)]) + raw)
    assert load_refer(write(tmp_path, refs=python2)).expressions.at[1001, "text"] == text


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["system", "eval", "_reconstructor", "getattr", "OrderedDict", "list"])
def test_code_in_a_pickle_is_refused_by_name_and_not_executed(tmp_path, name, protocol):
    import collections
    import copyreg

    marker = tmp_path / "executed"
    calls = {
        "system": (os.system, f"touch '{marker}'"),
        "eval": (eval, f"open({str(marker)!r}, 'w')"),
        "_reconstructor": (copyreg._reconstructor, dict, object, None),
        "getattr": (getattr, dict, "__subclasses__"),
        "OrderedDict": (collections.OrderedDict,),
        "list": (list,),
    }
    write(tmp_path, refs=[*REFS, Evil(*calls[name])], protocol=protocol)
    with pytest.raises(DatasetError, match=rf"refs\(unc\)\.p.*asks for .*{name}.*not executed"):
        load_refer(tmp_path)
    assert not marker.exists()


GARBAGE = [b"", b"\x80\x04", b"not a pickle", b"p9999999999\n.", b"P1\n.", b"\x80\x02J.", b"\x80\x02r\xff\xff\xff\x7f."]
GARBAGE += [
    b"\x80\x05\x96" + (2**40).to_bytes(8, "little"),
    pickle.dumps({"a": 1}),
    pickle.dumps(None),
]
GARBAGE += [pickle.dumps([{1, 2}], 4), pickle.dumps([{(1, 2): 3}], 2), pickle.dumps([{(1,): 3}], 0)]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: repr(data[:12]))
def test_garbage_pickles_end_as_dataset_errors_at_once(tmp_path, data):
    start = time.perf_counter()
    with pytest.raises(DatasetError, match=r"refs\(unc\)\.p"):
        load_refer(write(tmp_path, refs=data))
    assert time.perf_counter() - start < 2


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 5))
def test_damaged_pickles_end_as_dataset_errors_or_right_answers(data, protocol):
    damaged = bytearray(pickle.dumps(REFS, protocol))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        try:
            ds = load_refer(write(folder, refs=bytes(damaged)))
        except DatasetError as error:
            assert folder in str(error)
        else:  # pickle itself must agree, which may still be a changed letter of a text
            assert len(ds.expressions) + ds.counts[NO_TEXT] == sum(
                len(one["sentences"]) for one in pickle._loads(bytes(damaged), encoding="utf-8")
            )


HOSTILE = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 7, 11, 1.5, 2**63, 10**400, math.nan, math.inf, "", " ", "7", "val"]),
    st.sampled_from(["../x.jpg", "/etc/passwd", "a\\b", "\ud800", "\x00", [], {}, [[]], [1, 2, 3], [1, 2, 3, "x"]]),
    st.sampled_from([[0, 0, math.nan, 5], [0, 0, math.inf, 5], [-9, -9, 5, 5], [1e308, 0, 1e308, 5], [3, 3, -2, 4]]),
    st.sampled_from([[3, 3, 1e-9, 2], [0, 0, 99, 99], ["x"], [{"sent_id": 1}], [None] * 4]),
    st.integers(-5, 40) | st.text(max_size=4) | st.lists(st.floats(-50, 50), min_size=4, max_size=4),
)


def places(node):
    """All (container, key) pairs in a nest of dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from places(value)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_annotations_end_as_dataset_errors_or_data_sets(data):
    content = {"instances": copy.deepcopy(INSTANCES), "refs": copy.deepcopy(REFS)}
    for _ in range(data.draw(st.integers(1, 2))):
        where = [place for place in places(content) if place[0] is not content]
        container, key = where[data.draw(st.integers(0, len(where) - 1))]
        what = data.draw(st.sampled_from(["replace", "delete", "double", "rename"]))
        if what == "replace":
            container[key] = copy.deepcopy(data.draw(HOSTILE))
        elif what == "delete":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif what == "rename":
            container[f"{key}_"] = container.pop(key)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, **content)
        try:
            ds = load_refer(folder)
        except DatasetError as error:
            assert folder in str(error)
            return
        inside = ds.annotations.join(ds.images[["width", "height"]], on="image_id")
        assert (inside["x"] + inside["w"] <= inside["width"] + 2e-3).all() and (inside[["w", "h"]] > 0).all(axis=None)
        assert ds.expressions["ann_id"].isin(ds.annotations.index).all()
        assert ds.images.index.is_unique and ds.annotations.index.is_unique and ds.expressions.index.is_unique
        for split in ds.splits:
            part = ds.select(split)
            assert part.expressions["image_id"].isin(part.images.index).all()


del_ = object()


def edited(path, value):
    """INSTANCES and REFS with one place changed: 'refs.0.ann_id'; `del_` deletes it."""
    content = {"instances": copy.deepcopy(INSTANCES), "refs": copy.deepcopy(REFS)}
    *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
    node = content
    for step in way:
        node = node[step]
    if value is del_:
        del node[last]
    else:
        node[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("instances.images", del_, r"'images'"),
        ("instances.images.1.file_name", del_, r"instances\.json: images, key 'file_name'"),
        ("instances.images.1.file_name", "../../x.jpg", r"images\[.*\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "/x.jpg", r"images\[.*\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "a\\..\\x.jpg", r"images\[.*\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "C:x.jpg", r"images\[.*\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "sub/..", r"images\[.*\]: 'file_name' .*leads out"),
        ("instances.images.1.id", 7, r"images\[1\]: 'id' is that of an earlier entry"),
        ("instances.images.1.width", 0, r"expression 1004: its target is no object"),  # nothing of its box remains
        ("instances.annotations.2.id", 11, r"annotations\[2\]: 'id' is that of an earlier entry"),
        ("instances.annotations.2.image_id", 8, r"cannot be read \(no .*8"),
        ("instances.annotations.2.category_id", 8, r"annotations\[2\]: 'category_id' is not among"),
        ("instances.annotations.2.bbox", [1, 2, 3], r"annotations, key 'bbox', cannot be read"),
        (
            "instances.annotations.2.bbox",
            [1, 2, 0, 4],
            r"expression 1004: its target is no object",
        ),
        ("instances.annotations.2.iscrowd", "no", r"annotations, key 'iscrowd'.*'no'"),
        ("refs.2", 5, r"refs\(unc\)\.p cannot be read"),
        ("refs.2.ann_id", 999, r"expression 1004: its target is no object"),
        ("refs.2.ann_id", [10, 11], r"refs, key 'ann_id'"),  # gRefCOCO
        ("refs.2.ann_id", -1, r"expression 1004: its target is no object"),
        ("refs.2.image_id", 7, r"expression 1004: its target is no object with area in its image"),
        ("refs.2.split", None, r"refs, key 'split'"),
        ("refs.1.sentences.1.sent_id", 1000, r"refs\(unc\)\.p: refs\[2\]: 'sent_id' is that of an earlier entry"),
        ("refs.1.sentences.1.sent", 5, r"refs, key 'sent'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, path, value, message):
    with pytest.raises(DatasetError, match=message):
        load_refer(write(tmp_path, **edited(path, value)))


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[1]", "\udcff", "[" * 100_000])
def test_malformed_json(tmp_path, text):
    (write(tmp_path) / "refcoco/instances.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match="refcoco"):
        load_refer(tmp_path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DatasetError, match=r"no such file.*bsap data get"):
        load_refer(tmp_path)
    write(tmp_path)
    with pytest.raises(DatasetError, match=r"refs\(google\)\.p: no such file.*another name or split_by"):
        load_refer(tmp_path, split_by="google")
    os.rename(tmp_path / "refcoco", tmp_path / "refcocog")
    with pytest.raises(DatasetError, match=r"refs\(umd\)\.p: no such file"):
        load_refer(tmp_path, "refcocog")
    assert load_refer(tmp_path, "refcocog", split_by="unc").split_by == "unc"
    (tmp_path / "refcocog/instances.json").unlink()
    with pytest.raises(DatasetError, match=r"instances\.json cannot be read"):
        load_refer(tmp_path, "refcocog", split_by="unc")


def test_files_that_are_none_or_too_large(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(datasets, "MAX_BYTES", 100)
    with pytest.raises(DatasetError, match="at most 100 bytes"):
        load_refer(tmp_path)
    os.remove(tmp_path / "refcoco/instances.json")
    os.mkfifo(tmp_path / "refcoco/instances.json")
    with pytest.raises(DatasetError, match=r"instances\.json .*regular file"):
        load_refer(tmp_path)


def test_select(tmp_path):
    ds = load_refer(write(tmp_path))
    val = ds.select(split="val")
    assert val.expressions["text"].tolist() == ["left star", "étoile"]
    assert val.images.index.tolist() == [7] and val.annotations.index.tolist() == [11, 12, 14]
    assert val.categories == ds.categories and val.name == ds.name
    assert len(ds.select().expressions) == len(ds.expressions) == 5
    assert ds.select(limit=0).images.index.tolist() == [7, 3, 9] and ds.select(limit=2).images.index.tolist() == [7, 3]
    assert ds.select(limit=2).expressions["image_id"].isin([7, 3]).all()
    with pytest.raises(DatasetError, match="limit is -1"):
        ds.select(["val", "testB"], limit=-1)
    both = ds.select(["testB", "val", "train", "val"])  # image 7 is in two of them
    assert both.images.index.tolist() == [9, 7] and both.expressions["split"].unique().tolist() == [
        "testB",
        "val",
        "train",
    ]
    assert both.annotations.index.tolist() == [15, 11, 12, 14] and both.expressions.index.is_unique
    with pytest.raises(DatasetError, match="no split 'test'.*testA, testB, train, val"):
        ds.select(split="test")
    with pytest.raises(DatasetError, match="no split 'train', only val"):
        val.select(split="train")


def test_rounding_is_not_clipping(tmp_path):
    """COCO's boxes have two decimals, and x + w may pass the width by a rounding error."""
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.bbox", [13.1, 0.1, 26.9 + 1e-9, 29.9])))
    assert ds.counts[CLIPPED] == 1 and ds.annotations.at[11, "w"] == 26.9 + 1e-9
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.bbox", [-1e-9, 0.1, 26.9, 29.9])))
    assert ds.counts[CLIPPED] == 1
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.bbox", [13.1, 0.1, 26.91, 29.9])))
    assert ds.counts[CLIPPED] == 2 and ds.annotations.at[11, "w"] == pytest.approx(26.9)


@pytest.mark.parametrize(
    ("given", "kept", "dropped"),
    [
        ([SQUARE, [1.0, 2.0, 3.0, 4.0]], [SQUARE], 1),
        ([[1.0, 2.0, 3.0, 4.0]], None, 1),
        ([[]], None, 1),
        ([], None, 0),
        (None, None, 0),
        ([SQUARE, SQUARE[:5]], [SQUARE], 1),
    ],
)
def test_degenerate_polygons_are_dropped_and_counted(tmp_path, given, kept, dropped):
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.segmentation", given)))
    assert ds.annotations.at[11, "segmentation"] == kept and ds.counts[DEGENERATE] == dropped


def test_images(tmp_path):
    ds = load_refer(write(tmp_path))
    (ds.image_root / "sub").mkdir(parents=True)
    for image in ds.images.itertuples():
        Image.new("L", (image.width, image.height)).save(ds.image_root / image.file_name)
    assert ds.missing_images() == [] and ds.load_image(3).mode == "RGB" and ds.load_image(3).size == (20, 10)
    elsewhere = load_refer(tmp_path, image_root=str(tmp_path / "other"))
    assert elsewhere.image_path(3) == tmp_path / "other/sub/b.png" and len(elsewhere.missing_images()) == 3
    ds.image_path(7).unlink()
    assert ds.missing_images() == ["a.jpg"]
    with pytest.raises(DatasetError, match=r"a\.jpg cannot be read"):
        ds.load_image(7)
    Image.new("RGB", (10, 20)).save(ds.image_path(3))
    with pytest.raises(DatasetError, match=r"b\.png: has \(10, 20\) pixels, not .20, 10. as annotated"):
        ds.load_image(3)


def test_a_picture_of_a_data_set_is_not_turned(tmp_path):
    """COCO's boxes are in raw pixels."""
    ds = load_refer(write(tmp_path))
    ds.image_root.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(ds.image_path(7), exif=exif)
    assert ds.load_image(7).size == (40, 30)


# Tables of one's own


HEAD = ["file_name", *XYWH, "text"]
ROWS = [
    ["a.jpg", 1, 2, 10, 10, "the mug"],
    ["b.png", 0, 0, 20, 10, "the other, on the left"],
    ["a.jpg", 1, 2, 10, 10, "étoile"],
    ["a.jpg", 20, 2.5, 10, 10, "not the mug"],
    ["b.png", 5, 5, 5, 9, " "],
]


def write_csv(root, rows=ROWS, head=HEAD, name="mine", pictures=True):
    folder = Path(root) / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "expressions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    if pictures:
        Image.new("RGB", (40, 30)).save(folder / "images/a.jpg")
        Image.new("RGB", (20, 10)).save(folder / "images/b.png")
    return Path(root)


def test_the_example_of_the_page_on_data(tmp_path):
    lines = [line[4:] for line in Path("data/README.md").read_text().splitlines() if line.startswith("    ")]
    start = next(i for i, line in enumerate(lines) if line.startswith("file_name,"))
    write_csv(tmp_path, [line for line in csv.reader(lines[start + 1 : start + 6])], lines[start].split(","))
    (tmp_path / "mine/images/street").mkdir()
    for name in ("kitchen.jpg", "street/4.png"):
        Image.new("RGB", (640, 480)).save(tmp_path / "mine/images" / name)
    ds = load_refer(tmp_path, "mine")
    assert len(ds.expressions) == 5 and len(ds.annotations) == 4 and ds.categories == ["car", "mug", "person"]
    assert ds.splits == ["test"] and ds.counts == NOTHING


def test_a_csv(tmp_path):
    ds = load_refer(write_csv(tmp_path), "mine")
    assert ds.images.to_dict("records") == [
        {"file_name": "a.jpg", "width": 40, "height": 30},
        {"file_name": "b.png", "width": 20, "height": 10},
    ]
    assert ds.annotations[["image_id", *XYWH]].to_numpy().tolist() == [
        [1, 1, 2, 10, 10],
        [2, 0, 0, 20, 10],
        [1, 20, 2.5, 10, 10],
        [2, 5, 5, 5, 5],  # clipped
    ]
    assert ds.expressions["text"].tolist() == [row[5] for row in ROWS[:4]]
    assert ds.expressions["ann_id"].tolist() == [1, 2, 1, 3] and ds.splits == ["all"]
    assert ds.counts == NOTHING | {CLIPPED: 1, NO_TEXT: 1} and ds.categories == []
    assert ds.load_image(2).size == (20, 10)
    full = load_refer(write(tmp_path / "unc"))
    for name in ("images", "annotations", "expressions"):
        ours, theirs = getattr(ds, name), getattr(full, name)
        assert list(ours) == list(theirs) and ours.index.name == theirs.index.name
        assert ours.drop(columns="category", errors="ignore").dtypes.equals(
            theirs.drop(columns="category", errors="ignore").dtypes
        )


def test_all_columns_of_a_csv(tmp_path):
    head = [*HEAD, "split", "category", "segmentation", "width", "height"]
    mask = {"size": [30, 40], "counts": [0, 1200]}
    rows = [["x1.jpg", 1, 2, 10, 10, "mug", "val", "mug", json.dumps(mask), 40, 30]]
    rows += [["y7.jpg", 0, 0, 20, 10, "star", "test", "star", "", 40, 30]]
    ds = load_refer(write_csv(tmp_path, rows, head, pictures=False), "mine")  # with sizes no picture is opened
    assert ds.splits == ["test", "val"] and ds.categories == ["mug", "star"] and ds.images.index.tolist() == [1, 7]
    assert ds.annotations["segmentation"].tolist() == [mask, None]
    assert ds.select("test").annotations["category"].tolist() == ["star"]


def test_what_any_line_of_a_csv_says_of_a_box_is_kept(tmp_path):
    mask = {"size": [30, 40], "counts": [0, 1200]}
    head = [*HEAD, "category", "segmentation", "width", "height"]
    rows = [
        ["a.jpg", 1, 2, 10, 10, "mug", "", "", 40, 30],
        ["a.jpg", 1, 2, 10, 10, "cup", "mug", json.dumps(mask), 40, 30],
    ]
    ds = load_refer(write_csv(tmp_path, rows, head, pictures=False), "mine")
    assert ds.annotations[["category", "segmentation"]].values.tolist() == [["mug", mask]] and len(ds.expressions) == 2


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        (
            ROWS,
            ["file_name", "x1", "y1", "x2", "y2", "text"],
            r"expressions\.csv cannot be read \(its first line should name x once; it has file_name, x1, y1, x2, y2, text\)",
        ),
        ([["a.jpg", 1, 2, "ten", 10, "mug"]], HEAD, r"expressions\.csv: row 2: x, y, w and h should be num"),
        ([["a.jpg", 1, 2, "nan", 10, "mug"]], HEAD, r"csv: row 2: x, y, w and h should be numbers"),
        ([["a.jpg", 50, 2, 3, 10, "mug"]], HEAD, r"csv: row 2: its target is no object with area in its image"),
        ([["../a.jpg", 1, 2, 3, 10, "mug"]], HEAD, r"leads out of the image folder"),
        ([["/etc/passwd", 1, 2, 3, 10, "mug"]], HEAD, r"leads out of the image folder"),
        ([["c.jpg", 1, 2, 3, 10, "mug"]], HEAD, r"picture c\.jpg: not in .*images"),
        ([], HEAD, "there is no row below its first line"),
        ([["a.jpg", 1, 2, 3, 10, "mug", "cup"]], [*HEAD, "Text"], "should name text once"),
        (
            [["a.jpg", 1, 2, 3, 10, "a mug", " left"]],
            HEAD,
            "a row has more cells than the first line: put texts",
        ),
        (
            [["a.jpg", 1, 2, 3, 10, "mug"], ["", "", "", "", "", ""], ["a.jpg", "", 2, 3, 10, "mug"]],
            HEAD,
            r"row 4: x, y",
        ),
        ([["a.jpg", 0.1, 0.2, 0.3, 0.5, "mug"]], HEAD, r"shares of 1\. Write x, y, w, h in pixels"),
        ([["a.jpg", 20, 20, 30, 29, "mug"], ["a.jpg", 25, 15, 39, 29, "cup"]], HEAD, "100% of the boxes leave"),
        ([["a.jpg", 1, 2, 3, 10, "mug", "{"]], [*HEAD, "segmentation"], r"expressions\.csv cannot be read"),
        ([["a.jpg", 1, 2, 3, 10, "mug", 40, "?"]], [*HEAD, "width", "height"], r"key 'height', cannot be read"),
        ([["a.jpg", 1, 2, 3, 10, "mug", 40, "inf"]], [*HEAD, "width", "height"], r"key 'height', cannot be read"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path, rows, head, message):
    with pytest.raises(DatasetError, match=message):
        load_refer(write_csv(tmp_path, rows, head), "mine")


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    """Semicolons and decimal commas, capitals and spaces, empty rows, other ways to write a path."""
    folder = write_csv(tmp_path) / "mine"
    lines = [
        "File_Name; X;Y ;W;H;Text;Split",
        "a.jpg;1,5;2;10;10;the mug, left;test",
        ";;;;;;",
        "./a.jpg ;20;2,5;10;10;cup;test ",
    ]
    lines += ["images\\..\\b.png;0;0;20;10;star;"]
    (folder / "expressions.csv").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    ds = load_refer(tmp_path, "mine")
    assert ds.images["file_name"].tolist() == ["a.jpg", "b.png"] and ds.splits == ["all", "test"]
    assert ds.annotations["x"].tolist() == [1.5, 20, 0] and ds.expressions.index.tolist() == [2, 4, 5]
    assert ds.select("test").expressions["text"].tolist() == ["the mug, left", "cup"]
    assert ds.expressions["ann_id"].map(ds.annotations["image_id"]).tolist() == [1, 1, 2]


def test_quotes_after_a_space_and_other_numbers_of_a_csv(tmp_path):
    folder = write_csv(tmp_path) / "mine"
    (folder / "expressions.csv").write_text('file_name, x, y, w, h, text\ra.jpg, 1e0, 2, 10, 10, "the cup, left"\r')
    ds = load_refer(tmp_path, "mine")
    assert ds.expressions["text"].tolist() == ["the cup, left"] and ds.annotations["x"].tolist() == [1]
    (folder / "expressions.csv").write_text("file_name;x;y;w;h;text\na.jpg;1,5;2;10;10;mug\na.jpg;1.200;2;10;10;cup\n")
    with pytest.raises(DatasetError, match="row 3: x, y, w and h should be numbers"):  # is it 1,200 or 1.2?
        load_refer(tmp_path, "mine")
    lines = [
        "file_name,x,y,w,h,text",
        'a.jpg,1,2,10,10,"tall mug',
        "a.jpg,9,2,10,10,cup",
        'a.jpg,5,2,9,9,"red" mug',
        "",
    ]
    for end in "\n\r":  # the second quote closes the first, and the rows between would be its text
        (folder / "expressions.csv").write_text(end.join(lines), newline="")
        with pytest.raises(DatasetError, match="row 2: its text goes on in the next row: is a quote open"):
            load_refer(tmp_path, "mine")
    root = write(tmp_path / "with", name="mine")
    (root / "mine/refs(unc).p").unlink()
    write_csv(root, [["./a.jpg ", 1, 2.45, 10, 10, "a mug"]])
    assert load_refer(root, "mine").expressions["ann_id"].tolist() == [11]


def test_a_csv_beside_instances_has_their_masks_and_neighbours(tmp_path):
    root = write(write_csv(tmp_path, [["a.jpg", 1, 2.45, 10, 10, "a mug"]]), name="mine")
    (root / "mine/refs(unc).p").unlink()
    ds = load_refer(root, "mine")
    assert ds.expressions["ann_id"].tolist() == [11] and ds.annotations.index.tolist() == [11, 12, 10, 14, 15]
    assert ds.annotations.at[11, "segmentation"] == [SQUARE] and ds.categories == ["key", "mug", "star"]
    for row in (["a.jpg", 1, 2.5, 10, 12, "a mug"], ["z.jpg", 1, 2.5, 10, 10, "a mug"]):
        write_csv(tmp_path, [row])
        with pytest.raises(DatasetError, match="no object has its box"):
            load_refer(root, "mine")


def as_lists(ds):
    """A data set as lists of an evaluation kit: {split: [record]}."""
    rows = ds.expressions.merge(ds.annotations[XYWH], left_on="ann_id", right_index=True)
    rows = rows.merge(ds.images, left_on="image_id", right_index=True)
    return {
        split: [
            {"img_id": f"{row.file_name[:-4]}_{row.ref_id}", "sents": row.text, "bbox": [row.x, row.y, row.w, row.h]}
            | {"height": row.height, "width": row.width}
            for row in part.itertuples()
        ]
        for split, part in rows.groupby("split", sort=False)
    }


def boxes_of(ds):
    """What a REC run needs of a data set, whatever its ids: split, picture, text and box, as sorted rows."""
    rows = ds.expressions.merge(ds.annotations[XYWH], left_on="ann_id", right_index=True)
    rows = rows.assign(size=[str(ds.images.loc[image].tolist()) for image in rows["image_id"]])
    columns = ["split", "image_id", "text", *XYWH, "size"]
    return rows[columns].sort_values(columns[:3]).reset_index(drop=True)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_the_same_from_a_csv_from_lists_and_from_the_unc_layout(real_photos, tmp_path, name):
    ds = load_refer(real_photos, name)
    rows = ds.expressions.merge(ds.annotations[XYWH], left_on="ann_id", right_index=True)
    rows = rows.merge(ds.images, left_on="image_id", right_index=True)
    (tmp_path / name).mkdir()
    rows[[*HEAD, "split"]].to_csv(tmp_path / name / "expressions.csv", index=False)
    from_csv = load_refer(tmp_path, name, image_root=ds.image_root)
    pd.testing.assert_frame_equal(boxes_of(from_csv), boxes_of(ds), check_dtype=False)
    assert from_csv.expressions["text"].tolist() == rows["text"].tolist()
    (tmp_path / name / "expressions.csv").unlink()
    for split, records in as_lists(ds).items():
        (tmp_path / name / f"{name}_{split}.json").write_text(json.dumps(records))
    pd.testing.assert_frame_equal(boxes_of(load_refer(tmp_path, name)), boxes_of(ds), check_dtype=False)


OFFICIAL = {
    "refcoco": {"val": 10_834, "testA": 5_657, "testB": 5_095},
    "refcoco+": {"val": 10_758, "testA": 5_726, "testB": 4_889},
    "refcocog": {"val": 4_896, "test": 9_602},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_counts_of_all_splits(real_expressions, tmp_path, name):
    (tmp_path / name).mkdir()
    for split in OFFICIAL[name]:
        shutil.copy(real_expressions / f"{name}_{split}.json", tmp_path / name)
    ds = load_refer(tmp_path, name)
    assert {split: len(ds.select(split).expressions) for split in ds.splits} == OFFICIAL[name]
    assert ds.images["file_name"].str.fullmatch(r"COCO_train2014_\d{12}\.jpg").all() and ds.counts == NOTHING
    numbers = ds.images["file_name"].str[-16:-4].astype(int)
    assert numbers.tolist() == ds.images.index.tolist()  # detections are keyed by COCO's ids


@pytest.mark.parametrize("content", ['{"a": 1}', "[5]", '[{"img_id": "a"}]', "{"])
def test_wrong_lists_are_named(tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine_val.json").write_text(content)
    with pytest.raises(DatasetError, match=r"mine_val\.json"):
        load_refer(tmp_path, "mine")
