"""Candidate regions against slow readings of the same files, and boxes against counting pixels."""

import copy
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from scipy import ndimage

from bsap_utils.datasets import CLIPPED, NO_AREA, DatasetError, ReferDataset
from bsap_utils.proposals import box_iou, decode_masks, from_boxes, ground_truth, share_right, to_rle

XYWH = ["x", "y", "w", "h"]
OUTSIDE = "boxes of images outside the data set ignored"
WHOLE = "images without a candidate, given the whole image as one"


@pytest.fixture(scope="module")
def ds():
    """Three images of 40 × 30, not in the order of their ids; regions 2 (a crowd) and 5 in image 3, 4 in image 20."""
    images = pd.DataFrame(
        {"file_name": ["c.jpg", "a.jpg", "b.jpg"], "width": 40, "height": 30},
        index=pd.Index([20, 3, 8], name="image_id"),
    )
    boxes = np.array([[0, 0, 20, 20], [5, 5, 10, 10], [20, 10, 20, 20]], dtype=float)
    regions = pd.DataFrame({"image_id": [3, 20, 3], "category": "mug"}, index=pd.Index([2, 4, 5], name="ann_id"))
    regions[XYWH] = boxes
    regions = regions.assign(
        area=100.0, iscrowd=[1, 0, 0], segmentation=pd.Series([{"size": [1, 1]}, [[1.0]], [[2.0]]]).array
    )
    expressions = pd.DataFrame(
        {"ref_id": [0, 1, 1, 2], "ann_id": [5, 4, 4, 2], "image_id": [3, 20, 20, 3], "split": "val", "text": "a mug"},
        index=pd.Index([100, 101, 102, 103], name="sent_id"),
    )
    return ReferDataset("toy", "unc", Path("nowhere"), images.rename_axis("image_id"), regions, expressions, {})


def save(content, folder) -> Path:
    path = Path(folder) / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def rows(frame):
    return list(frame[["image_id", *XYWH]].itertuples(index=False, name=None))


def result(image_id, bbox, score, **more):
    return {"image_id": image_id, "bbox": bbox, "score": score, "category_id": 1, **more}


def test_ground_truth(ds):
    frame = ground_truth(ds)
    assert rows(frame) == [(3, 20, 10, 20, 20), (8, 0, 0, 40, 30), (20, 5, 5, 10, 10)]
    assert frame["ann_id"].tolist() == [5, -1, 4] and frame["ann_id"].dtype == np.int64
    assert frame["segmentation"].tolist() == [[[2.0]], None, [[1.0]]]
    assert frame.index.equals(pd.RangeIndex(3))
    crowds = {"crowd regions left out": 1, "expressions that mean a crowd region": 1}
    assert frame.attrs["counts"] == crowds | {WHOLE: 1}
    assert (share_right(ds, frame) > 0).mean() == 0.75


def test_boxes_as_reclip_publishes_them(ds, tmp_path):
    detections = {
        "20": [[1, 2, 3, 4], [0.5, 0, 100, 10], [-5, -5, 5, 5]],
        "999": [[0, 0, 1, 1]] * 3,
        "3": [[9, 9, 9, 9]],
        "8": [],
    }
    frame = from_boxes(ds, save(detections, tmp_path))
    assert rows(frame) == [(3, 9, 9, 9, 9), (8, 0, 0, 40, 30), (20, 1, 2, 3, 4), (20, 0.5, 0, 39.5, 10)]
    assert list(frame.columns) == ["image_id", *XYWH]
    assert frame.attrs["counts"] == {OUTSIDE: 3, CLIPPED: 1, NO_AREA: 1, WHOLE: 1}
    with pytest.raises(DatasetError, match="boxes.json: has no scores"):
        from_boxes(ds, tmp_path / "boxes.json", top_k=3)
    with pytest.raises(DatasetError, match="boxes.json: has no scores"):
        from_boxes(ds, tmp_path / "boxes.json", score_threshold=0.1)


def test_boxes_as_coco_results(ds, tmp_path):
    results = [
        result(20, [0, 0, 1, 1], 0.5),
        result(3, [0, 0, 9, 9], 0.05, segmentation={"size": [30, 40], "counts": "x"}),
        result(20, [0, 0, 2, 2], 0.9),
        result(1, [0, 0, 9, 9], 0.9),
        result(20, [0, 0, 3, 3], 0.9),
        result(20, [0, 0, 4, 4], 0.2),
        result(20, [0, 0, math.nan, 4], 0.99),
    ]
    path = save(results, tmp_path)
    frame = from_boxes(ds, path)
    assert list(frame.columns) == ["image_id", *XYWH, "score", "segmentation"]
    assert frame["image_id"].tolist() == [3, 8, 20, 20, 20, 20] and frame["w"].tolist() == [9, 40, 1, 2, 3, 4]
    assert frame["score"].tolist()[2:] == [0.5, 0.9, 0.9, 0.2] and np.isnan(frame["score"][1])
    assert frame["segmentation"][0] == {"size": [30, 40], "counts": "x"} and frame["segmentation"][1] is None
    assert frame.attrs["counts"] == {OUTSIDE: 1, CLIPPED: 0, NO_AREA: 1, WHOLE: 1}
    frame = from_boxes(ds, path, score_threshold=0.2, top_k=2)
    assert rows(frame) == [(3, 0, 0, 40, 30), (8, 0, 0, 40, 30), (20, 0, 0, 2, 2), (20, 0, 0, 3, 3)]
    assert frame.attrs["counts"] == {OUTSIDE: 1, CLIPPED: 0, NO_AREA: 1, WHOLE: 2} | {
        "boxes below the score threshold left out": 1,
        "boxes beyond the best 2 of their image left out": 2,
    }
    assert from_boxes(ds, path, top_k=1)["w"].tolist() == [9, 40, 2]  # the first of two equals
    assert list(from_boxes(ds, save(results[:1], tmp_path)).columns) == ["image_id", *XYWH, "score"]
    with pytest.raises(ValueError, match="top_k is 0"):
        from_boxes(ds, path, top_k=0)


def test_the_file_of_another_data_set_is_refused(ds, tmp_path):
    for content in ({"999": [[0, 0, 1, 1]]}, [result(999, [0, 0, 1, 1], 1.0)]):
        with pytest.raises(DatasetError, match="none of its 1 boxes is of an image of toy"):
            from_boxes(ds, save(content, tmp_path))


@pytest.mark.parametrize("empty", [{}, []])
def test_no_boxes_at_all(ds, tmp_path, empty):
    frame = from_boxes(ds, save(empty, tmp_path))
    assert rows(frame) == [(image, 0, 0, 40, 30) for image in (3, 8, 20)]
    assert frame.attrs["counts"][WHOLE] == 3 and frame.attrs["counts"][OUTSIDE] == len(empty)
    assert (frame.dtypes[XYWH] == np.float64).all() and frame["image_id"].dtype == np.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("boxes", "is neither"),
        ({"3": [[1, 2, 3]]}, r"entry '3': \[1, 2, 3\] is no box of four numbers"),
        ({"8": [], "3": [[1, 2, 3, 4], [1, 2, 3, "4"]]}, r"entry '3': \[1, 2, 3, '4'\] is no box"),
        ({"3": [[1, 2, 3, 10**400]]}, "entry '3'"),
        ({"3": {"boxes": []}}, "entry '3' is no image id with a list of boxes"),
        ({"COCO_train2014_3.jpg": []}, "entry 'COCO_train2014_3.jpg' is no image id"),
        ([[1, 2, 3, 4]], r"entry \[0\], key 'bbox': the entry is \[1, 2, 3, 4\]"),
        ([{"image_id": 3, "score": 1.0, "segmentation": []}], r"entry \[0\], key 'bbox': there is no such key"),
        ([result(3, [0, 0, 1, 1], 1), result(3, [0, 0, 1], 1)], r"entry \[1\], key 'bbox'"),
        ([result("3", [0, 0, 1, 1], 1)], r"entry \[0\], key 'image_id': '3' is no valid int"),
        ([result(3, [0, 0, 1, 1], "1")], r"entry \[0\], key 'score'"),
        ([result(3, [0, 0, 1, 1], math.nan)], r"entry \[0\], key 'score': NaN"),
    ],
)
def test_wrong_files_are_named(ds, tmp_path, content, message):
    with pytest.raises(DatasetError, match="boxes.json: " + message):
        from_boxes(ds, save(content, tmp_path))


def test_missing_and_malformed_files(ds, tmp_path):
    with pytest.raises(DatasetError, match="nothing.json: cannot be read"):
        from_boxes(ds, tmp_path / "nothing.json")
    (tmp_path / "boxes.json").write_text('{"3": [[0, 0, 1')
    with pytest.raises(DatasetError, match="boxes.json: is not valid JSON"):
        from_boxes(ds, tmp_path / "boxes.json")


NUMBER = st.one_of(st.integers(-60, 60), st.floats(-60, 60), st.sampled_from([math.nan, math.inf, 1e308, 0]))
BOX = st.lists(NUMBER, min_size=4, max_size=4)
ANYTHING = st.one_of(
    st.none(), st.booleans(), NUMBER, st.text(max_size=3), BOX, st.dictionaries(st.text(max_size=3), NUMBER)
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["3", "8", "20", "77"]), st.lists(BOX, max_size=5)), st.booleans())
def test_any_boxes_end_inside_their_image(ds, detections, as_results):
    """Against a loop over the boxes; the same boxes give the same candidates in both kinds of file."""
    assume(any(detections.get(image) for image in ("3", "8", "20")) or not detections.get("77"))
    results = [result(int(image), box, 0.5) for image, boxes in detections.items() for box in boxes]
    with tempfile.TemporaryDirectory() as folder:
        frame = from_boxes(ds, save(results if as_results else detections, folder))
    expected, moved, dropped = [], 0, 0
    for image in (3, 8, 20):
        before = len(expected)
        for x, y, w, h in detections.get(str(image), []):
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, 40), min(y + h, 30)
            if all(map(math.isfinite, (x, y, w, h))) and right > left and bottom > top:
                expected.append((image, left, top, right - left, bottom - top))
                moved += min(x, y) < -1e-3 or x + w > 40 + 1e-3 or y + h > 30 + 1e-3
            else:
                dropped += 1
        if len(expected) == before:
            expected.append((image, 0, 0, 40, 30))
    np.testing.assert_allclose(np.array(rows(frame)), np.array(expected, dtype=float), atol=2e-3)
    counts = frame.attrs["counts"]
    assert (counts[CLIPPED], counts[NO_AREA], counts[OUTSIDE]) == (moved, dropped, len(detections.get("77", [])))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_files_end_as_dataset_errors_or_candidates(ds, data):
    good = {"3": [[1, 2, 3, 4], [0, 0, 5, 5]], "20": [[0, 0, 9, 9]]}
    if data.draw(st.booleans()):
        good = [result(3, [1, 2, 3, 4], 0.5, segmentation=[[1, 2, 3]]), result(20, [0, 0, 5, 5], 1)]
    node = content = copy.deepcopy(good)
    while True:
        key = data.draw(st.sampled_from(list(node if isinstance(node, dict) else range(len(node)))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANYTHING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            frame = from_boxes(ds, save(content, folder), top_k=1 if isinstance(content, list) else None)
        except DatasetError as error:
            assert "boxes.json" in str(error) and "entry" in str(error)
        else:
            assert set(frame["image_id"]) == {3, 8, 20} and np.isfinite(frame[XYWH].to_numpy()).all()


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
    np.testing.assert_array_equal(box_iou(pairs[:, :4], pairs[:, 4:]), box_iou(pairs[:, 4:], pairs[:, :4]))


@pytest.mark.parametrize(("box", "covered"), [([20, 10, 20, 20], 1), ([20, 10, 10, 20], 0), ([20, 10, 10.1, 20], 1)])
def test_recall_asks_for_more_than_the_threshold(ds, box, covered):
    """Half of a box has IoU 0.5 with it, which does not count."""
    regions = pd.DataFrame([[3, *box], [8, 5, 5, 10, 10]], columns=["image_id", *XYWH])  # image 8 has no expression
    assert (share_right(ds, regions) > 0).mean() == covered / 4
    assert (share_right(ds, regions, threshold=0.4) > 0).mean() == 1 / 4
    assert math.isnan((share_right(dataclasses.replace(ds, expressions=ds.expressions[:0]), regions) > 0).mean())


def test_recall_on_the_sample(sample):
    """Against a loop over the expressions; `share_right` is what no method can pass."""
    val = sample.select(split="val")
    regions = from_boxes(val, "data/refshapes/refshapes_dets_dict.json")
    candidates = {image_id: frame[XYWH].to_numpy() for image_id, frame in regions.groupby("image_id")}
    meant = dict(zip(val.regions.index, val.regions[XYWH].to_numpy(), strict=True))
    found = 0
    for ann_id, image_id in zip(val.expressions["ann_id"], val.expressions["image_id"], strict=True):
        found += any(box_iou(meant[ann_id], box) > 0.5 for box in candidates[image_id])
    assert 0.5 < (share_right(val, regions) > 0).mean() == found / len(val.expressions) < 1
    assert (share_right(val, ground_truth(val)) > 0).mean() == 1


def test_the_real_photo(photos):
    from bsap_utils.datasets import load_refer

    ds = load_refer(photos)
    assert len(ground_truth(ds)) == 17 and ground_truth(ds).attrs["counts"]["crowd regions left out"] == 1
    frame = from_boxes(ds, photos / "refcoco_dets_dict.json")
    assert rows(frame)[0] == (142238, 282, 207, 48, 149) and len(frame) == 17
    assert (share_right(ds, frame) > 0).mean() == 1


# Masks


def runs_of(mask):
    """Uncompressed RLE by hand: lengths of runs down the columns, the first of zeros."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.r_[flat[1:] != flat[:-1], True]) + 1
    return [0] * int(flat[0]) + np.diff(np.r_[0, ends]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32), st.floats(0, 1))
def test_masks_are_the_same_from_every_kind_of_rle(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[: height // 2] = mask[0]  # some long runs
    compressed = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    plain = {"size": [height, width], "counts": runs_of(mask)}
    decoded = decode_masks([compressed, text, plain, None], height, width)
    assert decoded.dtype == bool and decoded.flags.c_contiguous
    assert (decoded[:3] == mask).all() and decoded[3].all()
    assert to_rle(plain, height, width) == compressed


def test_polygons_are_filled_and_joined():
    polygons = [[5.0, 5, 30, 5, 30, 20, 5, 20], [40.0, 10, 55, 35, 30, 38], [-9.0, 30, 8, 30, 8, 60, -9, 60]]
    image = Image.new("1", (60, 40))
    for polygon in polygons:
        ImageDraw.Draw(image).polygon(polygon, fill=1)
    (mask,) = decode_masks([polygons], 40, 60)
    outline = ndimage.binary_dilation(image) & ~ndimage.binary_erosion(image)  # which COCO rounds otherwise than PIL
    assert (mask == image)[~outline].all() and np.logical_xor(mask, image).sum() < 100
    assert mask[10, 20] and mask[30, 42] and mask[39, 0] and not mask[0].any()


SIZE = {"size": [3, 4]}


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [4, 3], "counts": [12]}, r"size \[4, 3\], but its image has \[3, 4\]"),
        ({"counts": [12]}, "size None"),
        ({**SIZE, "counts": [5, 3]}, "fill 8 pixels, but its image has 3×4"),
        ({**SIZE, "counts": [5, 30]}, "fill 35 pixels"),
        ({**SIZE, "counts": [20, -8]}, "fill 12 pixels"),
        ({**SIZE, "counts": [[12]]}, "fill 12 pixels"),
        ({**SIZE, "counts": ["a"]}, "cannot be read"),
        ({**SIZE, "counts": [10**30]}, "cannot be read"),
        ({**SIZE, "counts": ""}, "cannot be read"),
        ({**SIZE, "counts": "zzzz"}, "cannot be read"),
        ({**SIZE, "counts": "\u20ac"}, "cannot be read"),
        ({**SIZE, "counts": "52"}, "fill 7 pixels"),  # pycocotools decodes it, with what lay in memory for the rest
        ({**SIZE, "counts": None}, "cannot be read"),
        (SIZE, "cannot be read"),
        ([], "three points"),
        ([[1, 2, 3, 4]], "three points"),
        ([[0, 0, 1, 0, 1, 1, 2]], "three points"),
        ([[[0, 0], [1, 0], [1, 1]]], "three points"),
        ([0, 0, 1, 0, 1, 1], "three points"),
        ([["a"] * 6], "neither RLE nor polygons"),
        (7, "neither RLE nor polygons"),
        ([[0, 0, 1e9, 0, 1, 1]], "far outside"),
        ([[0, 0, math.nan, 0, 1, 1]], "far outside"),
    ],
)
def test_a_wrong_segmentation_is_an_error(segmentation, said):
    with pytest.raises(DatasetError, match=said):
        decode_masks([None, segmentation], 3, 4)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_text_as_counts_is_a_whole_mask_or_an_error(counts):
    try:
        (mask,) = decode_masks([{"size": [6, 5], "counts": counts}], 6, 5)
    except DatasetError:
        return
    assert mask.shape == (6, 5) and mask.sum() == coco.area({"size": [6, 5], "counts": counts})


def test_the_masks_of_the_sample_lie_in_their_boxes(sample):
    regions = ground_truth(sample.select(split="val")).head(60)
    for row in regions.itertuples():
        (mask,) = decode_masks([row.segmentation], 240, 320)
        y, x = mask.nonzero()
        assert [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()] == [row.x, row.y, row.w, row.h]


def test_the_masks_of_the_real_photo(photos):
    from bsap_utils.datasets import load_refer

    ds = load_refer(photos)
    size = ds.images.iloc[0]
    masks = decode_masks(ds.regions["segmentation"].tolist(), int(size["height"]), int(size["width"]))
    area = ds.regions["area"].to_numpy()
    assert (np.abs(masks.sum((1, 2)) - area) <= np.maximum(20, 0.05 * area)).all()
