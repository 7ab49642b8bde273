"""Candidates and pairs against slow readings of the same files, and overlaps against counted pixels."""

import copy
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from scipy import ndimage

from bsap_utils.datasets import XYWH, DatasetError, ReferDataset, load_refer
from bsap_utils.regions import (
    box_iou,
    decode_masks,
    from_boxes,
    from_masks,
    ground_truth,
    load_candidates,
    pair_up,
    to_rle,
    whole_images,
)

HEIGHT, WIDTH = 30, 40
OUTSIDE = "entries of images outside the data set ignored"
WHOLE = "images without a candidate, given the whole image as one"
EMPTY = "empty masks left out"
CLIPPED, NO_AREA = "boxes clipped to their image", "boxes without area left out"


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture(scope="module")
def ds():
    """Three images of 40 × 30, not in the order of their ids; annotations 2 (a crowd) and 5 in image 3, 4 in image 20."""
    images = pd.DataFrame(
        {"file_name": ["c.jpg", "a.jpg", "b.jpg"], "width": WIDTH, "height": HEIGHT},
        index=pd.Index([20, 3, 8], name="image_id"),
    )
    boxes = [[0, 0, 20, 20], [5, 5, 10, 10], [20, 10, 20, 20]]
    annotations = pd.DataFrame({"image_id": [3, 20, 3], "category": "mug"}, index=pd.Index([2, 4, 5], name="ann_id"))
    annotations[XYWH] = np.array(boxes, dtype=float)
    shapes = pd.Series([rectangle(*box) for box in boxes], index=annotations.index, dtype=object)
    annotations = annotations.assign(area=100.0, iscrowd=[1, 0, 0], segmentation=shapes)
    expressions = pd.DataFrame(
        {"ref_id": [0, 1, 1, 2], "ann_id": [5, 4, 4, 2], "image_id": [3, 20, 20, 3], "split": "val", "text": "a mug"},
        index=pd.Index([100, 101, 102, 103], name="sent_id"),
    )
    return ReferDataset("toy", "unc", Path("nowhere"), images, annotations, expressions, {})


def save(content, folder) -> Path:
    path = Path(folder) / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def rows(frame):
    return list(frame[["image_id", *XYWH]].itertuples(index=False, name=None))


def result(image_id, bbox, score, **more):
    return {"image_id": image_id, "bbox": bbox, "score": score, "category_id": 1, **more}


def box(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def compressed(mask):
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def runs_of(mask):
    """Uncompressed RLE by hand: lengths of runs down the columns, the first of zeros."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.r_[flat[1:] != flat[:-1], True]) + 1
    return [0] * int(flat[0]) + np.diff(np.r_[0, ends]).tolist()


def uncompressed(mask):
    return {"size": list(mask.shape), "counts": runs_of(mask)}


def masked(image_id, mask, score, kind=compressed):
    return {"image_id": image_id, "segmentation": kind(mask) if kind else mask, "score": score, "category_id": 1}


# Ground truth and boxes


def test_ground_truth(ds):
    frame = ground_truth(ds)
    assert rows(frame) == [(20, 5, 5, 10, 10), (3, 20, 10, 20, 20), (8, 0, 0, 40, 30)]
    assert frame["ann_id"].tolist() == [4, 5, -1] and frame["ann_id"].dtype == np.int64
    assert frame["segmentation"].tolist()[:2] == [rectangle(5, 5, 10, 10), rectangle(20, 10, 20, 20)]
    assert decode_masks([frame["segmentation"][2]], HEIGHT, WIDTH).all() and frame.index.equals(pd.RangeIndex(3))
    crowds = {"crowd regions left out": 1, "expressions that mean a crowd region": 1}
    assert frame.attrs["counts"] == crowds | {WHOLE: 1}


def test_objects_without_masks(ds):
    """All unknown: boxes; some unknown: these are their box."""
    unknown = dataclasses.replace(ds, annotations=ds.annotations.assign(segmentation=None))
    assert "segmentation" not in ground_truth(unknown) and len(ground_truth(unknown)) == 3
    some = unknown.annotations.copy()
    some.at[5, "segmentation"] = rectangle(20, 10, 10, 10)
    masks = decode_masks(ground_truth(dataclasses.replace(ds, annotations=some))["segmentation"], HEIGHT, WIDTH)
    assert (masks == [box(5, 5, 10, 10), box(20, 10, 10, 10), box(0, 0, WIDTH, HEIGHT)]).all()


def test_whole_images(ds):
    frame = whole_images(ds)
    assert rows(frame) == [(20, 0, 0, 40, 30), (3, 0, 0, 40, 30), (8, 0, 0, 40, 30)]
    assert frame.dtypes[XYWH].eq(np.float64).all() and frame.attrs["counts"] == {WHOLE: 3}


def test_boxes_as_reclip_publishes_them(ds, tmp_path):
    detections = {
        "20": [[1, 2, 3, 4], [0.5, 0, 41, 10], *[[5, 5, 10, 10]] * 8, [-5, -5, 5, 5]],
        "999": [[0, 0, 1, 1]] * 3,
        "a.jpg": [[9, 9, 9, 9]],  # image 3, by its name
        "8": [],
    }
    frame = from_boxes(ds, save(detections, tmp_path))
    assert rows(frame)[:2] == [(20, 1, 2, 3, 4), (20, 0.5, 0, 39.5, 10)]
    assert rows(frame)[10:] == [(3, 9, 9, 9, 9), (8, 0, 0, 40, 30)]
    assert list(frame.columns) == ["image_id", *XYWH]
    assert frame.attrs["counts"] == {OUTSIDE: 3, CLIPPED: 1, NO_AREA: 1, WHOLE: 1}


def test_boxes_as_coco_results(ds, tmp_path):
    results = [
        result(20, [0, 0, 1, 1], 0.5),
        result(3, [0, 0, 9, 9], 0.05, segmentation=rectangle(0, 0, 5, 5)),
        result("c.jpg", [0, 0, 2, 2], 0.9),
        result(1, [0, 0, 9, 9], 0.9),
        result(20, [0, 0, 3, 3], 0.9),
        result(20, [0, 0, 4, 4], 0.2),
    ]
    path = save(results, tmp_path)
    frame = from_boxes(ds, path)
    assert list(frame.columns) == ["image_id", *XYWH, "score", "segmentation"]
    assert frame["image_id"].tolist() == [20] * 4 + [3, 8] and frame["w"].tolist() == [1, 2, 3, 4, 9, 40]
    assert frame["score"].tolist()[:5] == [0.5, 0.9, 0.9, 0.2, 0.05] and np.isnan(frame["score"][5])
    masks = decode_masks(frame["segmentation"], HEIGHT, WIDTH)  # one without is its box
    assert masks.sum((1, 2)).tolist() == [1, 4, 9, 16, 25, WIDTH * HEIGHT]
    assert frame.attrs["counts"] == {OUTSIDE: 1, CLIPPED: 0, NO_AREA: 0, WHOLE: 1}
    assert list(from_boxes(ds, save(results[2:3], tmp_path)).columns) == ["image_id", *XYWH, "score"]


@pytest.mark.parametrize("empty", [{}, []])
def test_no_boxes_at_all(ds, tmp_path, empty):
    frame = from_boxes(ds, save(empty, tmp_path))
    assert rows(frame) == [(image, 0, 0, 40, 30) for image in (20, 3, 8)]
    assert (frame.dtypes[XYWH] == np.float64).all() and frame["image_id"].dtype == np.int64


NAMES = {"20": "c.jpg", "3": "a.jpg", "8": "b.jpg"}
GOOD = {"3": [[1, 2, 3, 4], [0, 0, 5, 5]], "20": [[0, 0, 9, 9]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"999": [[0, 0, 1, 1]]}, r"entry\[0\]: 'image_id' is none of toy's, e\.g\. 20"),
        ([result(999, [0, 0, 1, 1], 1.0)], "'image_id' is none of toy's"),
        ("boxes", "boxes.json cannot be read"),
        ({"3": [[1, 2, 3]]}, "key 'bbox', cannot be read"),
        ({"3": [[1, 2, 3, 4, 0.9]]}, "key 'bbox', cannot be read"),
        ({"3": [[1, 2, 3, 4, 0.9]] * 4}, "key 'bbox', cannot be read"),
        ({"8": [], "3": [[1, 2, 3, 4], [1, 2, 3, "wide"]]}, "key 'bbox'.*'wide'"),
        ({"3": [[1, 2, 3, 10**400]]}, "key 'bbox'"),
        ({"3": {"boxes": []}}, "key 'bbox'"),
        ({"detections": GOOD}, "key 'image_id'.*'detections'"),
        ({"COCO_train2014_000000000003": [[1, 2, 3, 4]]}, "key 'image_id'.*'COCO_train2014_000000000003'"),
        ([[1, 2, 3, 4]], "boxes.json cannot be read"),
        ([{"image_id": 3, "box": [1, 2, 3, 4], "score": 1.0}], r"key 'bbox', cannot be read \(no 'bbox'\)"),
        ([{"scores": [0.9], "labels": ["x"], "boxes": [[1, 2, 3, 4]]}], r"cannot be read \(no 'image_id'\)"),
        ([result(3, [0, 0, 1, 1], "high")], "boxes.json cannot be read .*'high'"),
        ([result(3.5, [0, 0, 1, 1], 1)], "key 'image_id'"),
        ([result(None, [0, 0, 1, 1], 1)], "key 'image_id'"),
        ([result([3], [0, 0, 1, 1], 1)], "boxes.json"),
    ],
)
def test_wrong_files_are_named(ds, tmp_path, content, message):
    with pytest.raises(DatasetError, match=rf"boxes\.json.*{message}|{message}") as caught:
        from_boxes(ds, save(content, tmp_path))
    assert "bsap data get" not in str(caught.value)  # a file of one's own cannot be got again


@pytest.mark.parametrize(
    "content",
    [
        {NAMES[key]: boxes for key, boxes in GOOD.items()},
        {key.zfill(12): boxes for key, boxes in GOOD.items()},
        [{"image_id": float(key), "bbox": one} for key, boxes in GOOD.items() for one in boxes],
        [{"image_id": key, "bbox": one, "score": "0.5"} for key, boxes in GOOD.items() for one in boxes],
        [{"image_id": NAMES[key], "bbox": one} for key, boxes in GOOD.items() for one in boxes],
    ],
)
def test_other_ways_to_write_the_same(ds, tmp_path, content):
    assert rows(from_boxes(ds, save(content, tmp_path))) == rows(from_boxes(ds, save(GOOD, tmp_path)))


def test_missing_and_malformed_files(ds, tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.json cannot be read"):
        from_boxes(ds, tmp_path / "nothing.json")
    for text in ('{"3": [[0, 0, 1', "[" * 100_000, "\n".join(['{"image_id": 3}'] * 2)):
        (tmp_path / "boxes.json").write_text(text)
        with pytest.raises(DatasetError, match=r"boxes\.json cannot be read.*JSON"):
            from_boxes(ds, tmp_path / "boxes.json")


NUMBER = st.one_of(st.integers(-60, 60), st.floats(-60, 60), st.sampled_from([math.nan, math.inf, 1e308, 0]))
BOX = st.lists(NUMBER, min_size=4, max_size=4)
FITTING = [[1.0, 1.0, 5.0, 5.0]]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(["3", "8", "20", "77"]), st.lists(BOX, max_size=5)), st.booleans())
def test_any_boxes_end_inside_their_image(ds, detections, as_results):
    """Against a loop over the boxes; most are good ones, else all are refused as being of another form."""
    detections = {image: detections.get(image, []) + FITTING * 20 for image in ("3", "8", "20", "77")}
    results = [result(int(image), box, 0.5) for image, boxes in detections.items() for box in boxes]
    with tempfile.TemporaryDirectory() as folder:
        frame = from_boxes(ds, save(results if as_results else detections, folder))
    expected, moved, dropped = [], 0, 0
    for image in (20, 3, 8):
        for x, y, w, h in detections[str(image)]:
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, 40), min(y + h, 30)
            if all(map(math.isfinite, (x, y, w, h))) and right > left and bottom > top:
                expected.append((image, left, top, right - left, bottom - top))
                moved += min(x, y) < -1e-3 or x + w > 40 + 1e-3 or y + h > 30 + 1e-3
            else:
                dropped += 1
    np.testing.assert_allclose(np.array(rows(frame)), np.array(expected, dtype=float), atol=2e-3)
    counts = frame.attrs["counts"]
    assert (counts[CLIPPED], counts[NO_AREA], counts[OUTSIDE]) == (moved, dropped, len(detections["77"]))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=5) | BOX,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
HOSTILE = {
    "boxes": (from_boxes, GOOD),
    "results": (from_boxes, [result(3, [1, 2, 3, 4], 0.5, segmentation=rectangle(1, 2, 3, 4))] * 2),
    "masks": (
        from_masks,
        [
            masked(3, box(1, 2, 3, 4), 0.5),
            masked(20, box(0, 0, 5, 5), 1, uncompressed),
            masked(8, [[0, 0, 9, 0, 9, 9]], 1, None),
        ],
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_hostile_files_end_as_dataset_errors_or_candidates(ds, kind, data):
    read, good = HOSTILE[kind]
    node = content = copy.deepcopy(good)
    while True:
        key = data.draw(st.sampled_from(list(node if isinstance(node, dict) else range(len(node)))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANYTHING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            frame = read(ds, save(content, folder))
        except DatasetError as error:
            assert "boxes.json" in str(error)
        else:
            assert set(frame["image_id"]) == {3, 8, 20} and np.isfinite(frame[XYWH].to_numpy()).all()
            assert (frame[["w", "h"]] > 0).all(axis=None)


# Boxes in another form


@pytest.fixture(scope="module")
def detected(detections, sample_val):
    boxes, sizes = (
        detections[XYWH].to_numpy(),
        sample_val.images.loc[detections["image_id"], ["width", "height"]].to_numpy(),
    )
    near, far, wide = boxes[:, :2], boxes[:, 2:], np.hstack([sizes, sizes])
    corners, centres = np.hstack([near, near + far]), np.hstack([near + far / 2, far])
    forms = {"right": boxes, "corners": corners, "centres": centres, "twice": boxes * 2, "others": boxes[::-1]}
    return forms | {"shares": boxes / wide, "shares, corners": corners / wide, "shares, centres": centres / wide}


def keyed(detections, boxes):
    groups = detections.groupby("image_id").indices
    return {str(image): boxes[rows].tolist() for image, rows in groups.items()}


FORMS = ("corners", "centres", "shares", "shares, corners", "shares, centres", "twice", "others")


@pytest.mark.parametrize("form", FORMS)
def test_boxes_in_another_form_are_refused(sample_val, detections, detected, tmp_path, form):
    path = save(keyed(detections, detected[form]), tmp_path)
    for read in (from_boxes, lambda ds, path: load_candidates(ds, str(path), tmp_path)):
        with pytest.raises(
            DatasetError, match=r"boxes\.json: \d+% of the (boxes|targets).*x, y, w, h\]? in pixels of these pictures"
        ):
            read(sample_val, path)


def test_boxes_that_are_right_or_too_few_to_tell_pass(sample_val, detections, detected, ds, tmp_path):
    frame = from_boxes(sample_val, save(keyed(detections, detected["right"]), tmp_path))
    assert np.allclose(frame[XYWH], detections[XYWH])
    missed = {"3": [[30, 0, 5, 5]], "20": [[0, 0, 3, 3]]}
    assert len(from_boxes(ds, save(missed, tmp_path))) == 3


def test_shares_and_boxes_outside_are_refused_without_many_targets(ds, tmp_path):
    for boxes, message in (
        ([[0.1, 0.1, 0.5, 0.5]] * 3, "shares of 1"),
        ([[1, 1, 5, 5], [30, 20, 35, 25], [30, 5, 35, 8]], "67% of the boxes leave"),
        ([[9, 9, -5, 5], [9, 9, 0, 0], [9, 9, float("nan"), 5]], "100% of the boxes leave"),
    ):
        with pytest.raises(DatasetError, match=message):
            from_boxes(ds, save({"8": boxes}, tmp_path))


# Pairs


def slow_pairs(ds, candidates, mask=None):
    """One row a pair, in plain Python: expression, candidate, image, intersection, union of the boxes or masks."""
    for expression, row in enumerate(ds.expressions.itertuples()):
        target = ds.annotations.loc[row.ann_id]
        for candidate, other in enumerate(candidates.itertuples()):
            if other.image_id == row.image_id:
                image = ds.images.index.tolist().index(row.image_id)
                if mask:
                    a, b = mask(target["segmentation"]), mask(other.segmentation)
                    yield expression, candidate, image, (a & b).sum(), (a | b).sum()
                else:
                    w = min(target["x"] + target["w"], other.x + other.w) - max(target["x"], other.x)
                    h = min(target["y"] + target["h"], other.y + other.h) - max(target["y"], other.y)
                    shared = max(w, 0) * max(h, 0)
                    yield expression, candidate, image, shared, target["w"] * target["h"] + other.w * other.h - shared


@pytest.mark.parametrize("masks", [False, True])
def test_pairs_against_a_plain_loop(sample, masks):
    some = sample.select("test", limit=6)
    candidates = load_candidates(some, "masks" if masks else "detections", "data/refshapes")
    pairs = pair_up(some, candidates, masks=masks)
    mask = (lambda one: decode_masks([one], 240, 320)[0]) if masks else None
    *ids, shared, union = np.array(list(slow_pairs(some, candidates, mask)), dtype=float).T
    assert [tensor.tolist() for tensor in (pairs.expression, pairs.candidate, pairs.image)] == [i.tolist() for i in ids]
    np.testing.assert_allclose(pairs.iou, shared / union, atol=1e-12)
    assert pairs.iou.dtype == torch.float64 and pairs.expression.dtype == pairs.candidate.dtype == torch.int64
    if masks:
        assert (pairs.intersection.tolist(), pairs.union.tolist()) == (shared.tolist(), union.tolist())
    assert list(pairs.frame()) == [
        "expression",
        "candidate",
        "image",
        "iou",
        *(["intersection", "union"] if masks else []),
    ]
    assert len(pairs) == len(pairs.frame()) == len(shared)


def test_pairs_of_a_toy(ds):
    pairs = pair_up(ds, ground_truth(ds), masks=True)
    assert pairs.frame()[["expression", "candidate", "image"]].to_numpy().tolist() == [
        [0, 1, 1],
        [1, 0, 0],
        [2, 0, 0],
        [3, 1, 1],
    ]
    assert pairs.iou.tolist() == [1, 1, 1, 0]  # the last means a crowd, which is no candidate
    assert pairs.union.tolist() == [400, 100, 100, 800] and pairs.intersection.tolist() == [400, 100, 100, 0]


def test_candidates_in_any_order(sample_val, detections):
    pairs = pair_up(sample_val, detections)
    order = np.random.default_rng(0).permutation(len(detections))
    other = pair_up(sample_val, detections.iloc[order].reset_index(drop=True)).frame()
    other["candidate"] = order[other["candidate"]]
    pd.testing.assert_frame_equal(
        other.sort_values(["expression", "candidate"], ignore_index=True), pairs.frame(), check_exact=True
    )


def test_what_cannot_be_paired(ds):
    with pytest.raises(DatasetError, match="Image 3 has expressions but no candidate"):
        pair_up(ds, ground_truth(ds)[lambda frame: frame["image_id"] != 3])
    with pytest.raises(DatasetError, match="candidates are boxes, but RIS needs masks"):
        pair_up(ds, whole_images(ds), masks=True)
    unknown = dataclasses.replace(ds, annotations=ds.annotations.assign(segmentation=None))
    with pytest.raises(DatasetError, match="3 targets have no mask"):
        pair_up(unknown, ground_truth(ds), masks=True)
    damaged = ds.annotations.copy()
    damaged.at[5, "segmentation"] = {"size": [3, 4], "counts": [12]}
    with pytest.raises(DatasetError, match="mask"):
        pair_up(dataclasses.replace(ds, annotations=damaged), ground_truth(ds), masks=True)


def test_an_empty_mask_has_no_overlap(ds):
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    candidates = ground_truth(ds)
    candidates["segmentation"] = [empty] * 3
    truth = ds.annotations.copy()
    truth.at[5, "segmentation"] = empty
    pairs = pair_up(dataclasses.replace(ds, annotations=truth), candidates, masks=True)
    assert pairs.iou.tolist() == [0] * 4 and pairs.union.tolist() == [0, 100, 100, 400]


def test_pairs_of_refcoco_val_in_well_under_a_second(real_expressions, tmp_path):
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco/refcoco_val.json").symlink_to(real_expressions / "refcoco_val.json")
    val = load_refer(tmp_path, "refcoco")
    rng = np.random.default_rng(0)
    candidates = pd.DataFrame({"image_id": np.repeat(val.images.index, 13)})
    candidates[XYWH] = rng.uniform(1, 200, (len(candidates), 4))
    start = time.process_time()
    pairs = pair_up(val, candidates)
    assert len(pairs) == 13 * 10_834 and time.process_time() - start < 1


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 12)] * 8), min_size=1, max_size=20))
def test_iou_is_that_of_counted_pixels(pairs):
    pairs = np.array(pairs)
    grid_y, grid_x = np.mgrid[:24, :24]

    def pixels(box):
        x, y, w, h = box
        return (grid_x >= x) & (grid_x < x + w) & (grid_y >= y) & (grid_y < y + h)

    for a, b, iou in zip(pairs[:, :4], pairs[:, 4:], box_iou(pairs[:, :4], pairs[:, 4:]), strict=True):
        union = (pixels(a) | pixels(b)).sum()
        assert iou == pytest.approx((pixels(a) & pixels(b)).sum() / union if union else 0)
    assert box_iou(pairs[:, None, :4], pairs[None, :, 4:]).shape == (len(pairs), len(pairs))


# Masks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32), st.floats(0, 1))
def test_masks_are_the_same_from_every_kind_of_segmentation(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[: height // 2] = mask[0]  # some long runs
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    plain = {"size": [height, width], "counts": runs_of(mask)}
    kinds = [rle, compressed(mask), plain]
    decoded = decode_masks(kinds, height, width)
    assert decoded.dtype == bool and decoded.flags.c_contiguous and (decoded == mask).all()
    assert to_rle(plain, height, width) == rle
    assert to_rle({**plain, "counts": [*plain["counts"], 0, 0]}, height, width) == rle


def test_polygons_are_filled_and_joined():
    polygons = [[5.0, 5, 30, 5, 30, 20, 5, 20], [40.0, 10, 55, 35, 30, 38], [-9.0, 30, 8, 30, 8, 60, -9, 60]]
    image = Image.new("1", (60, 40))
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=1)
    (mask,) = decode_masks([[*polygons, [1.0, 2, 3, 4]]], 40, 60)  # the last has two points only
    outline = ndimage.binary_dilation(image) & ~ndimage.binary_erosion(image)  # which COCO rounds otherwise than PIL
    assert (mask == image)[~outline].all() and np.logical_xor(mask, image).sum() < 100
    assert mask[10, 20] and mask[30, 42] and mask[39, 0] and not mask[0].any()


SIZE = {"size": [3, 4]}
WRONG = [
    {"size": [4, 3], "counts": [12]},
    {"counts": [12]},
    {**SIZE, "counts": [5, 3]},
    {**SIZE, "counts": [5, 30]},
    {**SIZE, "counts": [20, -8]},
    {**SIZE, "counts": [2**32 + 12]},
    {**SIZE, "counts": [2**63 - 1, 2**63 - 1, 14]},
    {**SIZE, "counts": [10**30]},
    {**SIZE, "counts": [[12]]},
    {**SIZE, "counts": ["a"]},
    {**SIZE, "counts": None},
    {**SIZE, "counts": ""},
    {**SIZE, "counts": "\u20ac"},
    {**SIZE, "counts": "o"},
    {**SIZE, "counts": "\x10"},
    {**SIZE, "counts": "oooooooo0"},
    None,
    [],
    [[1.0, 2, 3, 4]],
    [[1.0, 2, 3, 4, 5]],
    "text",
    5,
    [5],
    [["a"] * 6],
    [[[1, 2], [3, 4], [5, 6]]],
    [[0, 0, 1e9, 0, 1, 1]],
    [[0, 0, math.nan, 0, 1, 1]],
    [[0.1, 0.1, 0.9, 0.1, 0.9, 1.0]],  # shares of 1
    np.ones((4, 3), dtype=bool).tolist(),
    [[True] * 6] * 2,
]


@pytest.mark.parametrize("segmentation", WRONG, ids=lambda one: repr(one)[:40])
def test_a_wrong_segmentation_is_an_error(segmentation):
    with pytest.raises(DatasetError, match="A mask cannot be read"):
        decode_masks([segmentation], 3, 4)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_text_as_counts_is_a_whole_mask_or_an_error(counts):
    try:
        (mask,) = decode_masks([{"size": [6, 5], "counts": counts}], 6, 5)
    except DatasetError:
        return
    assert mask.shape == (6, 5) and mask.sum() == coco.area({"size": [6, 5], "counts": counts})


def test_from_masks_reads_every_kind_of_segmentation(ds, tmp_path):
    entries = [
        masked(20, box(1, 2, 3, 4), 0.5),
        masked("a.jpg", box(0, 0, 9, 5), 0.25, uncompressed),
        masked(999, box(0, 0, 1, 1), 1),
        masked(20, [*rectangle(5.0, 6, 10, 10), [1.0, 2, 3, 4]], 0.75, None),
        masked(20, box(0, 0, 0, 0), 0.9),
        masked(3, box(2, 2, 2, 2), 0.5),
        masked(3, box(4, 4, 6, 2), 0.5),
    ]
    frame = from_masks(ds, save(entries, tmp_path))
    assert list(frame.columns) == ["image_id", *XYWH, "score", "segmentation"]
    assert [list(row) for row in rows(frame)] == [
        [20, 1, 2, 3, 4],
        [20, 5, 6, 10, 10],
        [3, 0, 0, 9, 5],
        [3, 2, 2, 2, 2],
        [3, 4, 4, 6, 2],
        [8, 0, 0, 40, 30],
    ]
    assert frame["score"].tolist()[:5] == [0.5, 0.75, 0.25, 0.5, 0.5] and math.isnan(frame["score"][5])
    masks = decode_masks(frame["segmentation"], HEIGHT, WIDTH)
    assert (masks == [box(*map(int, row[1:])) for row in rows(frame)]).all()
    assert frame.attrs["counts"] == {OUTSIDE: 1, EMPTY: 1, WHOLE: 1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, r"entry \[1\]"),
        ({"segmentation": [[1, 2, 3, 4]]}, r"entry \[1\]"),
        ({"segmentation": None}, r"entry \[1\]"),
        ({"segmentation": "abc"}, r"entry \[1\]"),
        ({"image_id": "x"}, "key 'image_id'"),
        ({"score": "high"}, "could not convert"),
    ],
)
def test_a_wrong_mask_is_named(ds, tmp_path, wrong, message):
    entries = [masked(20, box(0, 0, 5, 5), 1), {**masked(3, box(0, 0, 5, 5), 1), **wrong}]
    with pytest.raises(DatasetError, match=rf"boxes\.json.*{message}"):
        from_masks(ds, save(entries, tmp_path))


def test_more_masks_in_an_image_than_pycocotools_can_count(ds, tmp_path):
    """`area` of pycocotools fails on more than 255 masks."""
    entries = [masked(20, box(i % 30, i // 30, 3, 2), i / 400) for i in range(400)]
    frame = from_masks(ds, save(entries, tmp_path))
    assert (frame["image_id"] == 20).sum() == 400
    pairs = pair_up(ds, frame, masks=True)
    both = (pairs.intersection + pairs.union)[pairs.expression == pairs.expression[pairs.image == 0][0]]
    assert len(both) == 400 and (both == both[0]).all() and both[0] > 6


def test_load_candidates_tells_masks_from_boxes(sample, tmp_path):
    val, root = sample.select(split="val", limit=5), Path("data/refshapes")
    pd.testing.assert_frame_equal(load_candidates(val, "gt", root), ground_truth(val))
    pd.testing.assert_frame_equal(load_candidates(val, "whole", root), whole_images(val))
    masks, boxes = root / "refshapes_masks.json", root / "refshapes_dets_dict.json"
    pd.testing.assert_frame_equal(load_candidates(val, "masks", root), from_masks(val, masks))
    pd.testing.assert_frame_equal(load_candidates(val, str(masks), root), from_masks(val, masks))
    pd.testing.assert_frame_equal(load_candidates(val, str(boxes), root), from_boxes(val, boxes))
    (tmp_path / "refshapes_rpn_dict.json").write_text(boxes.read_text())
    pd.testing.assert_frame_equal(load_candidates(val, "rpn", tmp_path), from_boxes(val, boxes))
    results = [{"image_id": int(val.images.index[0]), "bbox": [1, 2, 3, 4], "score": 0.5}]
    assert "segmentation" not in load_candidates(val, str(save(results, tmp_path)), root)
    with pytest.raises(DatasetError, match="refshapes_masks.json: no such file. Take other"):
        load_candidates(val, "masks", tmp_path / "nowhere")


# The sample and the real photographs


def test_the_masks_of_the_sample_lie_in_their_boxes(sample_val):
    for row in ground_truth(sample_val).head(60).itertuples():
        (mask,) = decode_masks([row.segmentation], 240, 320)
        y, x = mask.nonzero()
        assert [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()] == [row.x, row.y, row.w, row.h]


def test_real_photographs(real_photos, photos):
    for root, name in ((photos, "refcoco"), (real_photos, "refcoco"), (real_photos, "refcocog")):
        ds = load_refer(root, name)
        truth = ground_truth(ds)
        assert len(truth) == (ds.annotations["iscrowd"] == 0).sum()
        for image_id, objects in ds.annotations.groupby("image_id"):
            masks = decode_masks(objects["segmentation"].tolist(), *ds.images.loc[image_id, ["height", "width"]])
            area = objects["area"].to_numpy()
            assert (np.abs(masks.sum((1, 2)) - area) <= np.maximum(20, 0.05 * area)).all()
        pairs = pair_up(ds, truth, masks=True)
        best = pairs.frame().groupby("expression")["iou"].max()
        assert (best == 1).all() and len(best) == len(ds.expressions)
    assert len(from_boxes(load_refer(photos), photos / "refcoco_dets_dict.json")) == 17


def test_the_same_picks_from_a_table_of_ones_own(real_photos, scorer, tmp_path):
    """A REC run on photographs, from the UNC layout and from a CSV with detections keyed by file name."""
    unc = load_refer(real_photos, "refcoco")
    rows = unc.expressions.join(unc.annotations[XYWH], on="ann_id").join(unc.images["file_name"], on="image_id")
    (tmp_path / "mine").mkdir()
    rows[["file_name", *XYWH, "text", "split"]].to_csv(tmp_path / "mine/expressions.csv", index=False)
    own = load_refer(tmp_path, "mine", image_root=unc.image_root)
    boxes = ground_truth(unc).join(unc.images["file_name"], on="image_id").groupby("file_name")
    detections = {name: frame[XYWH].to_numpy().tolist() for name, frame in boxes}
    (tmp_path / "mine_dets_dict.json").write_text(json.dumps(detections))
    picks = []
    for ds in (unc, own):
        candidates = from_boxes(ds, tmp_path / "mine_dets_dict.json")
        pairs = pair_up(ds, candidates)
        text = scorer.encode_texts(ds.expressions["text"].tolist())
        scores = scorer.pair_logits(scorer.encode_regions(ds, candidates), text, pairs)
        table = pairs.frame().assign(score=scores.numpy())
        best = table.loc[table.groupby("expression")["score"].idxmax()]
        named = candidates.join(ds.images["file_name"], on="image_id").iloc[best["candidate"]]
        picks.append(
            named[["file_name", *XYWH]].assign(text=ds.expressions["text"].to_numpy(), iou=best["iou"].to_numpy())
        )
    pd.testing.assert_frame_equal(*(one.reset_index(drop=True) for one in picks))
    assert len(picks[0]) == 47


def test_boxes_of_other_pictures_are_counted_whether_by_id_or_by_file_name(ds, tmp_path):
    named = {"c.jpg": [[1, 2, 3, 4]], "elsewhere.jpg": [[1, 1, 9, 9], [2, 2, 9, 9]]}
    numbered = {"20": [[1, 2, 3, 4]], "77": [[1, 1, 9, 9], [2, 2, 9, 9]]}
    by_name, by_id = (from_boxes(ds, save(content, tmp_path)) for content in (named, numbered))
    assert rows(by_name) == rows(by_id) and by_name.attrs["counts"] == by_id.attrs["counts"]
    assert by_id.attrs["counts"]["entries of images outside the data set ignored"] == 2
