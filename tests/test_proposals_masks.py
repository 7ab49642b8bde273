"""Masks as candidates, against slow readings with dense arrays; and the masks of the sample."""

import copy
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from bsap_utils import ROOT, refshapes
from bsap_utils.datasets import DatasetError, ReferDataset
from bsap_utils.proposals import (
    decode_masks,
    from_boxes,
    from_masks,
    ground_truth,
    load_proposals,
    mask_areas,
    suppress,
)

HEIGHT, WIDTH = 30, 40
SAMPLE_MASKS = ROOT / "data" / "refshapes" / "refshapes_masks.json"
OUTSIDE = "masks of images outside the data set ignored"
EMPTY = "empty masks left out"
WHOLE = "images without a candidate, given the whole image as one"


@pytest.fixture(scope="module")
def ds():
    """Three images of 40 × 30, not in the order of their ids, without regions."""
    images = pd.DataFrame(
        {"file_name": "x.jpg", "width": WIDTH, "height": HEIGHT}, index=pd.Index([20, 3, 8], name="image_id")
    )
    regions = pd.DataFrame(columns=["image_id", "category", "x", "y", "w", "h", "area", "iscrowd", "segmentation"])
    expressions = pd.DataFrame(columns=["ref_id", "ann_id", "image_id", "split", "text"])
    return ReferDataset("toy", "unc", Path("nowhere"), images, regions, expressions, {})


def box(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def compressed(mask):
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def uncompressed(mask):
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.r_[flat[1:] != flat[:-1], True]) + 1
    return {"size": list(mask.shape), "counts": [0] * int(flat[0]) + np.diff(np.r_[0, ends]).tolist()}


def result(image_id, mask, score, kind=compressed):
    return {"image_id": image_id, "segmentation": kind(mask) if kind else mask, "score": score, "category_id": 1}


def save(content, folder) -> Path:
    path = Path(folder) / "masks.json"
    path.write_text(json.dumps(content))
    return path


def test_every_kind_of_segmentation(ds, tmp_path):
    square = [[5.0, 6, 15, 6, 15, 16, 5, 16]]
    entries = [
        result(20, box(1, 2, 3, 4), 0.5),
        result(3, box(0, 0, 9, 5), 0.25, uncompressed),
        result(999, box(0, 0, 1, 1), 1),
        result(20, square, 0.75, None),
        result(20, box(0, 0, 0, 0), 0.9),
    ]
    frame = from_masks(ds, save(entries, tmp_path))
    assert list(frame.columns) == ["image_id", "x", "y", "w", "h", "score", "segmentation"]
    boxes = frame[["image_id", "x", "y", "w", "h"]].to_numpy().tolist()
    assert boxes == [[3, 0, 0, 9, 5], [8, 0, 0, 40, 30], [20, 1, 2, 3, 4], [20, 5, 6, 10, 10]]
    assert frame["score"].tolist()[::2] == [0.25, 0.5] and math.isnan(frame["score"][1])
    assert frame["segmentation"][1] is None
    masks = decode_masks(frame["segmentation"].tolist(), HEIGHT, WIDTH)
    assert (masks[[0, 2]] == [box(0, 0, 9, 5), box(1, 2, 3, 4)]).all() and masks[1].all() and masks[3].sum() == 100
    assert frame.attrs["counts"] == {OUTSIDE: 1, EMPTY: 1, WHOLE: 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 6), st.floats(0.1, 0.9))
def test_against_dense_arrays(ds, seed, min_area, top_k, nms_iou):
    """Area, then suppression, then the best k of each image, as one would write it down with decoded masks."""
    rng = np.random.default_rng(seed)
    entries = []
    for _ in range(rng.integers(1, 25)):
        x, y, w, h = rng.integers(0, 12, 4)
        scored = float(rng.choice([0.1, 0.5, 0.9, rng.random()]))
        entries.append(result(int(rng.choice([20, 3])), box(x, y, w, h), scored))
    with tempfile.TemporaryDirectory() as folder:
        frame = from_masks(ds, save(entries, folder), top_k=top_k, min_area=min_area, nms_iou=nms_iou)
    for image_id in (3, 20):
        masks = [coco.decode(e["segmentation"]).astype(bool) for e in entries if e["image_id"] == image_id]
        scores = [e["score"] for e in entries if e["image_id"] == image_id]
        kept = []
        for i in sorted(range(len(masks)), key=lambda i: -scores[i]):
            if masks[i].sum() >= max(min_area, 1) and all(
                (masks[i] & masks[j]).sum() <= nms_iou * (masks[i] | masks[j]).sum() for j in kept
            ):
                kept.append(i)
        wanted = [masks[i] for i in sorted(kept[:top_k])] or [box(0, 0, WIDTH, HEIGHT)]
        found = decode_masks(frame.loc[frame["image_id"] == image_id, "segmentation"].tolist(), HEIGHT, WIDTH)
        assert len(found) == len(wanted) and (found == wanted).all()
    counts = frame.attrs["counts"]
    left_out = sum(number for what, number in counts.items() if "left out" in what)
    assert len(frame) == len(entries) - left_out + counts[WHOLE]


def test_more_masks_in_an_image_than_pycocotools_can_count(ds, tmp_path):
    """`area` of pycocotools 2.0 fails on more than 255 masks."""
    entries = [result(20, box(i % 30, i // 30, 3, 2), i / 400) for i in range(400)]
    frame = from_masks(ds, save(entries, tmp_path), min_area=6, nms_iou=0.99)
    assert (frame["image_id"] == 20).sum() == 400
    assert mask_areas(frame["segmentation"].tolist()[2:]).tolist() == [6] * 400


def test_suppression_is_greedy():
    """The second falls to the first, so the third, which only the second overlaps much, stays."""
    masks = [coco.encode(np.asfortranarray(box(x, 0, 10, 10), dtype=np.uint8)) for x in (0, 4, 8)]
    assert suppress(masks, 0.4).tolist() == [True, False, True]
    assert suppress(masks[1:], 0.4).tolist() == [True, False]
    assert suppress([], 0.5).tolist() == []


def test_without_scores(ds, tmp_path):
    entry = result(3, box(0, 0, 9, 5), 1)
    del entry["score"]
    path = save([entry], tmp_path)
    assert list(from_masks(ds, path).columns) == ["image_id", "x", "y", "w", "h", "segmentation"]
    for options in ({"top_k": 3}, {"nms_iou": 0.5}):
        with pytest.raises(DatasetError, match=r"masks\.json: has no scores"):
            from_masks(ds, path, **options)
    with pytest.raises(DatasetError, match=r"entry \[1\], key 'score': there is no such key"):
        from_masks(ds, save([result(3, box(0, 0, 9, 5), 1), entry], tmp_path))


def test_nothing_of_this_data_set(ds, tmp_path):
    assert from_masks(ds, save([], tmp_path)).attrs["counts"][WHOLE] == 3
    with pytest.raises(DatasetError, match="none of its 1 masks is of an image of this data set"):
        from_masks(ds, save([result(999, box(0, 0, 1, 1), 1)], tmp_path))
    empty = from_masks(ds, save([result(3, box(0, 0, 0, 0), 1)], tmp_path), top_k=1, nms_iou=0.5, min_area=1)
    assert empty["w"].tolist() == [40] * 3 and empty.attrs["counts"][EMPTY] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, r"size \[40, 30\], but its image has \[30, 40\]"),
        ({"segmentation": {"size": [30, 40], "counts": [5, 7]}}, "fill 12 pixels"),
        ({"segmentation": {"size": [30, 40], "counts": "\u20ac"}}, "cannot be read"),
        ({"segmentation": {"size": [30, 40]}}, "cannot be read"),
        ({"segmentation": [[1, 2, 3, 4]]}, "three points"),
        ({"segmentation": []}, "three points"),
        ({"segmentation": None}, "key 'segmentation'"),
        ({"segmentation": "abc"}, "key 'segmentation'"),
        ({"image_id": "3"}, "key 'image_id'"),
        ({"score": math.nan}, "NaN is no score"),
        ({"score": "high"}, "key 'score'"),
    ],
)
def test_a_wrong_entry_is_named(ds, tmp_path, wrong, said):
    entries = [result(20, box(0, 0, 5, 5), 1), {**result(3, box(0, 0, 5, 5), 1), **wrong}]
    with pytest.raises(DatasetError, match=rf"masks\.json: entry \[1\].*{said}"):
        from_masks(ds, save(entries, tmp_path))


@pytest.mark.parametrize("content", [{"3": [[0, 0, 1, 1]]}, 5, "abc", None, [5], [[]]])
def test_a_file_of_another_kind(ds, tmp_path, content):
    with pytest.raises(DatasetError, match=r"masks\.json"):
        from_masks(ds, save(content, tmp_path))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"nms_iou": 1.5}, {"nms_iou": -0.1}])
def test_options_that_make_no_sense(ds, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        from_masks(ds, save([], tmp_path), **options)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_hostile_files_end_as_dataset_errors_or_candidates(ds, data):
    good = [
        result(3, box(1, 2, 3, 4), 0.5),
        result(20, box(0, 0, 5, 5), 1, uncompressed),
        result(8, [[0, 0, 9, 0, 9, 9]], 1, None),
    ]
    node = content = copy.deepcopy(good)
    while True:
        key = data.draw(st.sampled_from(list(node if isinstance(node, dict) else range(len(node)))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANYTHING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            frame = from_masks(ds, save(content, folder), top_k=2, min_area=1, nms_iou=0.5)
        except DatasetError as error:
            assert "masks.json" in str(error)
        else:
            assert set(frame["image_id"]) == {3, 8, 20} and (frame[["w", "h"]] > 0).all(axis=None)


def test_load_proposals_tells_masks_from_boxes(sample, tmp_path):
    val = sample.select(split="val", limit=5)
    root = ROOT / "data" / "refshapes"
    pd.testing.assert_frame_equal(load_proposals(val, "gt", root), ground_truth(val))
    masks = load_proposals(val, "masks", root, top_k=6)
    pd.testing.assert_frame_equal(masks, from_masks(val, SAMPLE_MASKS, top_k=6))
    assert masks.groupby("image_id").size().max() == 6
    pd.testing.assert_frame_equal(load_proposals(val, str(SAMPLE_MASKS), root), from_masks(val, SAMPLE_MASKS))
    boxes = root / "refshapes_dets_dict.json"
    pd.testing.assert_frame_equal(load_proposals(val, str(boxes), root), from_boxes(val, boxes))
    image_id = int(val.images.index[0])
    coco_boxes = save([{"image_id": image_id, "bbox": [1, 2, 3, 4], "score": 0.5}], tmp_path)
    assert "segmentation" not in load_proposals(val, str(coco_boxes), root)
    with pytest.raises(DatasetError, match=r"toy_masks|nowhere"):
        load_proposals(val, "masks", tmp_path / "nowhere")


# The sample's masks


def test_the_committed_masks_are_what_the_generator_draws(tmp_path):
    refshapes.write_benchmark(tmp_path, images_per_split=2)
    committed = json.loads(SAMPLE_MASKS.read_text())
    drawn = json.loads((tmp_path / "refshapes_masks.json").read_text())
    for image_id in (1, 10_002, 20_001):
        ours, theirs = ([e for e in entries if e["image_id"] == image_id] for entries in (drawn, committed))
        assert [e["score"] for e in ours] == pytest.approx([e["score"] for e in theirs], abs=0.01)
        iou = coco.iou(*([e["segmentation"] for e in entries] for entries in (ours, theirs)), [0] * len(theirs))
        assert iou.diagonal().min() > 0.95  # another libjpeg or NumPy may move a pixel


def test_the_masks_look_like_a_segmenters(sample):
    """Neither perfect nor useless: 5 to 20 an image, most objects found roughly, few exactly; background among them."""
    regions = from_masks(sample, SAMPLE_MASKS)
    assert regions.attrs["counts"] == {OUTSIDE: 0, EMPTY: 0, WHOLE: 0}
    per_image = regions.groupby("image_id").size()
    assert set(per_image.index) == set(sample.images.index) and per_image.min() >= 5 and per_image.max() <= 20
    truth = ground_truth(sample.select(split="val"))
    best, of_candidate = [], []
    for image_id, objects in truth.groupby("image_id"):
        candidates = regions.loc[regions["image_id"] == image_id, "segmentation"].tolist()
        iou = coco.iou(candidates, objects["segmentation"].tolist(), [0] * len(objects))
        best += iou.max(0).tolist()
        of_candidate += iou.max(1).tolist()
    best, of_candidate = np.array(best), np.array(of_candidate)
    assert 0.85 < (best > 0.5).mean() < 0.99 and 0.7 < best.mean() < 0.9
    assert (best == 1).mean() < 0.35 and 0.15 < (of_candidate < 0.1).mean() < 0.4
    split_or_merged = (of_candidate > 0.25) & (of_candidate < 0.75)
    assert 0.1 < split_or_merged.mean() < 0.5
    scores = regions[regions["image_id"].isin(truth["image_id"])]["score"].to_numpy()
    assert 0.5 < np.corrcoef(scores, of_candidate)[0, 1] < 0.97, "a score says something, but not all"


def test_segments_are_of_the_seed_and_leave_the_scene_alone():
    scene = refshapes.draw_scene(np.random.default_rng(5))
    before = [thing.mask.copy() for thing in scene.objects]
    one, two, other = (refshapes.segment(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((a == b).all() and x == y for (a, x), (b, y) in zip(one, two, strict=True))
    assert [score for _, score in one] != [score for _, score in other]
    assert all((a == thing.mask).all() for a, thing in zip(before, scene.objects, strict=True))
    assert all(mask.shape == (240, 320) and mask.dtype == bool and mask.any() and 0 < score < 1 for mask, score in one)
