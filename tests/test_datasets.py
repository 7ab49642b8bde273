"""The loader against a plain reading of the same files, with what is hostile, damaged or merely odd in them."""

import copy
import io
import json
import math
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bsap_utils import datasets
from bsap_utils.datasets import DatasetError, load_refer

KEYS = (
    "id",
    "file_name",
    "width",
    "height",
    "image_id",
    "category_id",
    "bbox",
    "area",
    "iscrowd",
    "segmentation",
    "name",
)
KEYS += ("images", "annotations", "categories", "ref_id", "ann_id", "split", "sentences", "sent_ids", "sent_id", "sent")
FILES = ("instances.json", "refs(unc).p")


def sentence(sent_id, text):
    return {"sent_id": sent_id, "sent": text, "raw": text.upper(), "tokens": text.split()}


def annotation(ann_id, image_id, bbox, category_id=1, iscrowd=0):
    polygon = [[float(v) for v in bbox]]
    return {"id": ann_id, "image_id": image_id, "bbox": bbox, "category_id": category_id, "iscrowd": iscrowd} | {
        "area": 12.5,
        "segmentation": polygon,
    }


def ref(ref_id, ann_id, image_id, split, sentences):
    return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "category_id": 1} | {
        "sentences": sentences,
        "sent_ids": [s["sent_id"] for s in sentences],
        "file_name": "not the image",
    }


INSTANCES = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
        {"id": 9, "file_name": "c.jpg", "width": 8, "height": 8},
    ],
    "annotations": [
        annotation(11, 7, [1, 2.5, 10, 10]),
        annotation(12, 7, [-4, 20, 10, 20], category_id=5),  # leaves the image
        annotation(10, 3, [0, 0, 20, 10]),
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
    ref(103, 15, 9, "testAB", [{"sent_id": 1005, "raw": "A Star", "tokens": []}]),
    ref(104, 15, 9, "testB", []),
]


def write(root, instances=INSTANCES, refs=REFS, protocol=2):
    folder = Path(root) / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs(unc).p").write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol))
    return Path(root)


def plain_reading(root):
    """The oracle: the same files, one record after the other, in plain Python."""
    instances = json.loads((root / "refcoco/instances.json").read_text())
    refs = pickle._loads((root / "refcoco/refs(unc).p").read_bytes(), encoding="utf-8")  # the C one may exhaust memory
    images, regions, expressions, counts = {}, {}, {}, dict.fromkeys(datasets.NOTES, 0)
    for image in instances["images"]:
        assert image["id"] not in images
        images[image["id"]] = {key: image[key] for key in ("file_name", "width", "height")}
    names = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(names) == len(instances["categories"])
    for ann in instances["annotations"]:
        width, height = images[ann["image_id"]]["width"], images[ann["image_id"]]["height"]
        x, y, w, h = ann["bbox"]
        if not all(map(math.isfinite, (x, y, w, h))):
            counts[datasets.NO_AREA] += 1
            continue
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if right <= left or bottom <= top:
            counts[datasets.NO_AREA] += 1
            continue
        counts[datasets.CLIPPED] += (left, top, right, bottom) != (x, y, x + w, y + h)
        assert ann["id"] not in regions
        regions[ann["id"]] = {
            "image_id": ann["image_id"],
            "category": names[ann["category_id"]],
            "x": left,
            "y": top,
        } | {"w": right - left, "h": bottom - top, **{key: ann[key] for key in ("area", "iscrowd", "segmentation")}}
    assert len({r["ref_id"] for r in refs}) == len(refs)
    for r in refs:
        assert regions[r["ann_id"]]["image_id"] == r["image_id"]
        counts[datasets.NO_SENTENCES] += not r["sentences"]
        given_ids = [s["sent_id"] for s in r["sentences"]]
        counts[datasets.UNGIVEN] += sum(i not in given_ids for i in r["sent_ids"])
        for s in r["sentences"]:
            text = s["sent"] if "sent" in s else s["raw"]
            if not text.strip():
                counts[datasets.NO_TEXT] += 1
                continue
            assert s["sent_id"] not in expressions
            expressions[s["sent_id"]] = {key: r[key] for key in ("ref_id", "ann_id", "image_id", "split")} | {
                "text": text
            }
    return images, regions, expressions, counts


def assert_same(ds, oracle):
    *frames, counts = oracle
    for frame, index, records in zip(
        (ds.images, ds.regions, ds.expressions), ("image_id", "ann_id", "sent_id"), frames, strict=True
    ):
        assert frame.index.name == index and frame.index.tolist() == list(records)
        read = frame.to_dict("records")
        for row, record in zip(read, records.values(), strict=True):
            assert row.keys() == record.keys()
            for key, value in record.items():
                close = isinstance(value, float) and math.isclose(row[key], value, abs_tol=2e-3)
                assert close or row[key] == value or (value != value and row[key] != row[key]), (
                    index,
                    key,
                    row[key],
                    value,
                )
    assert ds.counts == counts


def test_reads_the_same_as_a_plain_reading(tmp_path):
    ds = load_refer(write(tmp_path))
    assert_same(ds, plain_reading(tmp_path))
    assert ds.counts == dict(zip(datasets.NOTES, (1, 1, 1, 1, 0), strict=True))
    assert ds.regions.loc[12, ["x", "y", "w", "h"]].tolist() == [0, 20, 6, 10]
    assert ds.expressions.at[1005, "text"] == "A Star" and ds.expressions.at[1001, "text"] == "étoile"
    assert ds.categories == ["key", "mug", "star"] and ds.splits == ["testA", "testB", "train", "val"]
    assert list(ds.regions.columns) == ["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "segmentation"]
    assert (ds.name, ds.split_by, ds.image_root) == ("refcoco", "unc", tmp_path / "images/mscoco/images/train2014")


def test_reads_the_real_photo(photos):
    ds = load_refer(photos)
    assert_same(ds, plain_reading(photos))
    assert len(ds.expressions) == 25 and ds.regions["iscrowd"].sum() == 1 and not any(ds.counts.values())
    assert ds.select("val").load_image(142238).size == (640, 427) and ds.missing_images() == []


def test_reads_the_sample(sample):
    assert_same(sample, plain_reading_of_sample())


def plain_reading_of_sample():
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree("data/refshapes/refshapes", f"{folder}/refcoco")
        return plain_reading(Path(folder))


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol(tmp_path, protocol):
    assert_same(load_refer(write(tmp_path, protocol=protocol)), plain_reading(tmp_path))


@pytest.mark.parametrize("raw", ["étoile".encode(), "étoile".encode("latin1")])
def test_byte_strings_of_python_2(tmp_path, raw):
    refs = copy.deepcopy(REFS)
    refs[1]["sentences"][1]["sent"] = "@@"
    python2 = pickle.dumps(refs, 2).replace(b"X\x02\x00\x00\x00@@", b"U" + bytes([len(raw)]) + raw)
    assert load_refer(write(tmp_path, refs=python2)).expressions.at[1001, "text"] == "étoile"


def test_plain_types_by_name_are_admitted(tmp_path):
    """Some pickles hold plain values as calls of their type: `__builtin__.int`, `__builtin__.unicode`."""
    calls = b"(l(dS'ref_id'\nc__builtin__\nint\n(I100\ntRsS'ann_id'\nc__builtin__\nlong\n(I11\ntRsS'image_id'\nI7\ns"
    calls += b"S'split'\nc__builtin__\nunicode\n(S'val'\ntRs"
    calls += b"S'sent_ids'\ncbuiltins\nlist\n(tRsS'sentences'\ncbuiltins\nlist\n(tRsa."
    ds = load_refer(write(tmp_path, refs=calls))
    assert ds.counts[datasets.NO_SENTENCES] == 1 and ds.expressions.empty


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["system", "eval", "_reconstructor", "getattr", "OrderedDict", "scalar"])
def test_code_in_a_pickle_is_refused_by_name_and_not_executed(tmp_path, name, protocol):
    marker = tmp_path / "executed"
    import collections
    import copyreg

    calls = {
        "system": (os.system, f"touch '{marker}'"),
        "eval": (eval, f"open({str(marker)!r}, 'w')"),
        "_reconstructor": (copyreg._reconstructor, dict, object, None),
        "getattr": (getattr, dict, "__subclasses__"),
        "OrderedDict": (collections.OrderedDict,),
        "scalar": (np.int64(3).__reduce__()[0], *np.int64(3).__reduce__()[1]),
    }
    write(tmp_path, refs=[*REFS, Evil(*calls[name])], protocol=protocol)
    with pytest.raises(DatasetError, match=rf"refs\(unc\)\.p.*asks for .*{name}"):
        load_refer(tmp_path)
    assert not marker.exists()


GARBAGE = [b"", b"\x80\x04", b"not a pickle", b"p9999999999\n.", b"P1\n.", b"\x80\x02J.", b"\x80\x02r\xff\xff\xff\x7f."]
GARBAGE += [b"\x80\x05\x96" + (2**40).to_bytes(8, "little"), pickle.dumps({"a": 1}), pickle.dumps(None)]


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_pickles_end_as_dataset_errors(tmp_path, data):
    with pytest.raises(DatasetError, match=r"refs\(unc\)\.p: (is not a complete pickle|holds)"):
        load_refer(write(tmp_path, refs=data))


@settings(max_examples=150, deadline=None)
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
            assert any(file in str(error) for file in FILES)
        else:  # pickle itself must agree, which may still be a changed letter of a text
            assert_same(ds, plain_reading(Path(folder)))


HOSTILE = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1, 7, 11, 1.5, 2**63, 10**400, math.nan, math.inf, -math.inf, "", " ", "7", "val"]
    ),
    st.sampled_from(
        ["../x.jpg", "/etc/passwd", "a\\b", "\ud800", "\x00", [], {}, [[]], [1, 2, 3], [1, 2, 3, "4"], [None] * 4]
    ),
    st.sampled_from([[0, 0, math.nan, 5], [0, 0, math.inf, 5], [-9, -9, 5, 5], [1e308, 0, 1e308, 5], [3, 3, -2, 4]]),
    st.sampled_from([[3, 3, 1e-9, 2], [0, 0, 99, 99], ["x"], [{"sent_id": 1}]]),
    st.integers(-5, 40),
    st.text(max_size=4),
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
)


def places(node):
    """All (container, key) pairs in a nest of dicts and lists, but for what the loader hands on as it is."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        if key not in ("segmentation", "tokens"):
            yield node, key
            yield from places(value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_annotations_end_as_dataset_errors_or_right_answers(data):
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
            assert any(file in str(error) for file in FILES)
            assert any(f"'{key}'" in str(error) for key in KEYS), error
        else:
            assert_same(ds, plain_reading(Path(folder)))
            for split in ds.splits:
                part = ds.select(split)
                assert part.expressions["image_id"].isin(part.images.index).all()


def edited(path, value):
    """INSTANCES and REFS with one place changed: 'refs.0.ann_id'; `del` deletes it."""
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


del_ = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("instances.images", del_, r"instances.json: the whole file, key 'images': there is no such key"),
        ("instances.annotations", {}, r"instances.json: the whole file, key 'annotations': \{\} is no valid list"),
        ("instances.images.1.file_name", del_, r"instances.json: images\[1\], key 'file_name'"),
        ("instances.images.1.file_name", "../../x.jpg", r"images\[1\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "/x.jpg", r"images\[1\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "a\\..\\x.jpg", r"images\[1\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "C:x.jpg", r"images\[1\]: 'file_name' .*leads out"),
        ("instances.images.1.file_name", "sub/..", r"images\[1\]: 'file_name' .*leads out"),
        ("instances.images.1.id", 7, r"images\[1\]: 'id' is that of an earlier entry"),
        ("instances.images.1.id", True, r"images\[1\], key 'id': True is no valid int"),
        ("instances.images.1.width", 0, r"images\[1\]: 'width' and 'height' must be positive"),
        ("instances.annotations.2.id", 11, r"annotations\[2\]: 'id' is that of an earlier entry"),
        ("instances.annotations.2.image_id", 8, r"annotations\[2\]: 'image_id' is not among the images"),
        ("instances.annotations.2.category_id", 8, r"annotations\[2\]: 'category_id' is not among"),
        ("instances.annotations.2.bbox", [1, 2, 3], r"annotations\[2\], key 'bbox': \[1, 2, 3\] is no box"),
        ("instances.annotations.2.bbox", [1, 2, 3, True], r"annotations\[2\], key 'bbox'"),
        (
            "instances.annotations.2.bbox",
            [1, 2, 0, 4],
            r"refs\[2\]: 'ann_id' means an annotation whose 'bbox'.*no area",
        ),
        ("instances.annotations.2.iscrowd", "no", r"annotations\[2\], key 'iscrowd': 'no' is no valid int"),
        ("refs.2", 5, r"refs\(unc\).p: refs\[2\], key 'ref_id': the entry is 5"),
        ("refs.2.ref_id", 100, r"refs\[2\]: 'ref_id' is that of an earlier entry"),
        ("refs.2.ann_id", 999, r"refs\[2\]: 'ann_id' is not among the annotations"),
        ("refs.2.image_id", 999, r"refs\[2\]: 'image_id' is not the image of annotation"),
        ("refs.2.split", None, r"refs\[2\], key 'split': None is no valid str"),
        ("refs.1.sentences.1.sent_id", 1000, r"refs\[1\]\['sentences'\]\[1\]: 'sent_id' is that of an earlier"),
        ("refs.1.sentences.1.sent", 5, r"refs\[1\]\['sentences'\]\[1\], key 'sent': 5 is no valid str"),
        ("refs.1.sentences.1.sent", "\ud800", r"refs\[1\]\['sentences'\]\[1\], key 'sent': .* is no valid str"),
        ("refs.3.sentences.0.raw", del_, r"refs\[3\]\['sentences'\]\[0\], key 'sent': there is no such key"),
        ("refs.1.sent_ids.0", "1", r"refs\[1\], key 'sent_ids'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, path, value, message):
    try:
        write(tmp_path, **edited(path, value))
    except UnicodeEncodeError:  # only JSON can hold a lone surrogate
        write(tmp_path, refs=pickle.dumps(edited(path, "@@")["refs"], 0).replace(b"V@@", b"V\\ud800"))
    with pytest.raises(DatasetError, match=message):
        load_refer(tmp_path)


def test_an_unlisted_sentence_is_counted(tmp_path):
    ds = load_refer(write(tmp_path, **edited("refs.1.sentences.0", del_)))
    assert ds.counts[datasets.UNGIVEN] == 1 and ds.select("val").counts[datasets.UNGIVEN] == 1


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "[1]", "\udcff", "[" * 100_000])
def test_malformed_json(tmp_path, text):
    (write(tmp_path) / "refcoco/instances.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DatasetError, match="instances.json"):
        load_refer(tmp_path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DatasetError, match="no such folder.*bsap data get refcoco"):
        load_refer(tmp_path)
    write(tmp_path)
    with pytest.raises(DatasetError, match=r"refs\(google\)\.p.*present: refs\(unc\)\.p"):
        load_refer(tmp_path, split_by="google")
    (tmp_path / "refcoco/instances.json").unlink()
    with pytest.raises(DatasetError, match=r"instances\.json: cannot be read"):
        load_refer(tmp_path)
    (tmp_path / "refcoco/instances.json").mkdir()
    with pytest.raises(DatasetError, match=r"instances\.json: cannot be read"):
        load_refer(tmp_path)
    (tmp_path / "refcocog").mkdir()
    with pytest.raises(DatasetError, match=r"refs\(umd\)\.p"):
        load_refer(tmp_path, "refcocog")


def test_select(tmp_path):
    ds = load_refer(write(tmp_path))
    val = ds.select(split="val")
    assert val.expressions["text"].tolist() == ["left star", "étoile"]
    assert val.images.index.tolist() == [7] and val.regions.index.tolist() == [11, 12, 14]
    assert val.counts == dict(zip(datasets.NOTES, (1, 0, 1, 0, 0), strict=True))  # of this selection only
    assert val.categories == ds.categories and val.name == ds.name
    assert ds.select("testA").expressions.index.tolist() == [1004, 1005]
    assert ds.select("testA").counts == dict(zip(datasets.NOTES, (0, 1, 0, 0, 0), strict=True))
    assert ds.select("testB").expressions.index.tolist() == [1005]
    assert ds.select("testB").counts[datasets.NO_SENTENCES] == 1
    assert len(ds.expressions) == 5  # as it was
    with pytest.raises(DatasetError, match="no split 'test'.*testA, testB, train, val"):
        ds.select(split="test")
    with pytest.raises(DatasetError, match="no split 'train'.*: val"):
        val.select(split="train")


def test_rounding_is_not_clipping(tmp_path):
    """COCO's boxes have two decimals, and x + w may pass the width by a rounding error."""
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.bbox", [13.1, 0.1, 26.9 + 1e-9, 29.9])))
    assert ds.counts[datasets.CLIPPED] == 1 and ds.regions.at[11, "w"] == 26.9 + 1e-9
    ds = load_refer(write(tmp_path, **edited("instances.annotations.0.bbox", [13.1, 0.1, 26.91, 29.9])))
    assert ds.counts[datasets.CLIPPED] == 2 and ds.regions.at[11, "w"] == pytest.approx(26.9)


@pytest.fixture
def with_images(tmp_path):
    ds = load_refer(write(tmp_path))
    (ds.image_root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in ds.images.itertuples():
        pixels = rng.integers(0, 255, (image.height, image.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(ds.image_root / image.file_name)
    return ds


def test_images(with_images, tmp_path):
    ds = with_images
    assert ds.missing_images() == []
    assert ds.load_image(3).mode == "RGB" and ds.load_image(3).size == (20, 10)
    Image.new("L", (20, 10)).save(ds.image_path(3))
    assert ds.load_image(3).mode == "RGB"
    elsewhere = load_refer(tmp_path, image_root=str(tmp_path / "other"))
    assert elsewhere.image_path(3) == tmp_path / "other/sub/b.png" and len(elsewhere.missing_images()) == 3
    ds.image_path(7).unlink()
    assert ds.missing_images() == ["a.jpg"]
    with pytest.raises(DatasetError, match="a.jpg: image 7 of refcoco is missing"):
        ds.load_image(7)
    with pytest.raises(DatasetError, match="no image 5 "):
        ds.load_image(5)
    Image.new("RGB", (10, 20)).save(ds.image_path(3))
    with pytest.raises(DatasetError, match=r"b.png: image 3 has 10×20 pixels, but instances.json says 20×10"):
        ds.load_image(3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL on damaged TIFF tags
@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_damaged_images_end_as_dataset_errors_or_images(data, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, min(200, len(damaged) - 1)))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    with tempfile.TemporaryDirectory() as folder:
        ds = load_refer(write(folder), image_root=folder)
        ds.image_path(7).write_bytes(damaged)
        try:
            assert ds.load_image(7).size == (40, 30)
        except DatasetError as error:
            assert "a.jpg" in str(error)


def test_a_data_set_of_nothing(tmp_path):
    ds = load_refer(write(tmp_path, {"images": [], "annotations": [], "categories": []}, []))
    full = load_refer(write(tmp_path / "full"))
    for name in ("images", "regions", "expressions"):
        assert getattr(ds, name).empty and list(getattr(ds, name)) == list(getattr(full, name))
    assert ds.regions["x"].dtype == np.float64 and ds.expressions.index.dtype == np.int64
    with pytest.raises(DatasetError, match="none"):
        ds.select("val")


def test_frames_survive_parquet(tmp_path):
    ds = load_refer(write(tmp_path))
    for frame in (ds.images, ds.regions.drop(columns="segmentation"), ds.expressions):
        frame.to_parquet(tmp_path / "frame.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "frame.parquet"), frame)


def test_a_missing_file_is_not_called_invalid(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.json: cannot be read \(No such file") as caught:
        datasets.read_json(tmp_path / "nowhere.json")
    assert "valid JSON" not in str(caught.value)
