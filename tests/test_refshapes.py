"""The generator of the sample benchmark, and the committed benchmark itself."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bsap_utils import ROOT, refshapes

DATA = ROOT / "data" / "refshapes"


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        refshapes.write_benchmark(tmp_path / name, seed=seed, images_per_split=2)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and a != c


def test_the_committed_benchmark_is_what_the_generator_draws(tmp_path):
    refshapes.write_benchmark(tmp_path, images_per_split=2)
    for drawn in (tmp_path / "images").rglob("*.jpg"):
        committed = np.asarray(Image.open(DATA / drawn.relative_to(tmp_path))).astype(int)
        # another libjpeg may round differently
        assert np.abs(committed - np.asarray(Image.open(drawn))).mean() < 1
    detections = json.loads((tmp_path / "refshapes_dets_dict.json").read_text())
    committed = json.loads((DATA / "refshapes_dets_dict.json").read_text())
    assert all(committed[image] == boxes for image, boxes in detections.items())


def test_the_benchmark_has_the_size_it_should(sample):
    for split in ("train", "val", "test"):
        part = sample.select(split=split)
        assert len(part.images) >= 150 and len(part.expressions) >= 600
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 10e6
    per_image = [len(boxes) for boxes in json.loads((DATA / "refshapes_dets_dict.json").read_text()).values()]
    assert min(per_image) >= 5 and max(per_image) <= 20


def test_no_image_is_in_two_splits_and_none_is_missing(sample):
    assert sample.expressions.groupby("image_id")["split"].nunique().max() == 1
    assert all(sample.image_path(i).is_file() for i in sample.images.index)


def test_all_three_kinds_of_expression_occur(sample):
    said = Counter(
        "relation"
        if re.search(r" the ", text)
        else "place"
        if re.search(r" (on|at|in) the ", text + " ")
        else "attributes"
        for text in sample.expressions["text"].str.replace(
            r"(on|at|in) the (left|right|top|bottom|middle)", r"\1 the", regex=True
        )
    )
    assert set(said) >= {"relation", "attributes"}
    assert (sample.expressions["text"].str.contains(r"(?:on|at|in) the (?:left|right|top|bottom|middle)$")).mean() > 0.1


def reference_matches(text, scene):
    """Read an expression from left to right, independently of `describe`: the objects of the scene it is true of."""

    def named(words, objects):
        *adjectives, kind = words.split()
        return [o for o in objects if o.kind == kind and set(adjectives) <= {o.size, o.pattern, o.colour}]

    relation = re.fullmatch(r"(.+?) (above|below|left of|right of|next to) the (.+)", text)
    place = re.fullmatch(r"(.+?) (?:on|at|in) the (left|right|top|bottom|middle)", text)
    if relation:
        mine, how, other = relation.groups()
        anchors = named(other, scene.objects)
        assert len(anchors) == 1, f"the anchor of {text!r} is not unique"
        (ax, ay), found = anchors[0].centre, []
        for o in named(mine, scene.objects):
            dx, dy = o.centre[0] - ax, o.centre[1] - ay
            true = {"above": dy < 0, "below": dy > 0, "left of": dx < 0, "right of": dx > 0, "next to": abs(dx) < 80}
            if o is not anchors[0] and true[how] and refshapes.RELATIONS[how](dx, dy):
                found.append(o)
        return found
    if place:
        mine, where = place.groups()
        side = {
            "left": lambda x, y: x < 0.36 * 320, "right": lambda x, y: x > 0.64 * 320, "top": lambda x, y: y < 0.36 * 240,
            "bottom": lambda x, y: y > 0.64 * 240, "middle": lambda x, y: abs(x - 160) < 42 and abs(y - 120) < 48,
        }  # fmt: skip
        return [o for o in named(mine, scene.objects) if side[where](*o.centre)]
    return named(text, scene.objects)


@pytest.mark.parametrize("kind", ["attributes", "place", "relation"])
def test_an_expression_is_true_of_its_object_alone(kind):
    rng, told = np.random.default_rng(3), 0
    for seed in range(25):
        scene = refshapes.draw_scene(np.random.default_rng([11, seed]))
        for target in scene.objects:
            text = refshapes.describe(scene, target, kind, rng)
            if text:
                told += 1
                assert [id(o) for o in reference_matches(text, scene)] == [id(target)], text
    assert told > 30


def test_masks_and_boxes_agree_and_occlusion_is_partial():
    for seed in range(10):
        scene = refshapes.draw_scene(np.random.default_rng([12, seed]))
        assert 1 <= len(scene.objects) <= 9
        union = np.zeros(scene.image.shape[:2], int)
        for thing in scene.objects:
            x, y, w, h = thing.box
            assert thing.mask[y : y + h, x : x + w].sum() == thing.mask.sum() > 0
            union += thing.mask
        assert union.max() == 1, "the visible parts of two objects share a pixel"


def test_detections_stay_inside_and_cover_most_objects():
    hits = total = 0
    for seed in range(15):
        rng = np.random.default_rng([13, seed])
        scene = refshapes.draw_scene(rng)
        boxes = np.array(refshapes.detect(scene, rng))
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= 320.1).all() and (boxes[:, 1] + boxes[:, 3] <= 240.1).all()
        for thing in scene.objects:
            x, y, w, h = thing.box
            cover = np.clip(
                np.minimum(boxes[:, :2] + boxes[:, 2:], [x + w, y + h]) - np.maximum(boxes[:, :2], [x, y]), 0, None
            ).prod(1)
            hits += (cover / (boxes[:, 2:].prod(1) + w * h - cover)).max() > 0.5
            total += 1
    assert 0.8 < hits / total < 0.99, "a detector misses some objects, not most"


def test_training_pairs_are_long_tailed_and_stay_off_the_benchmark():
    pictures, captions = refshapes.training_pool(400, seed=1, size=32, chunk=200)
    assert pictures.shape == (400, 32, 32, 3) and pictures.dtype == np.uint8
    kinds = Counter(k for c in captions for k in refshapes.KINDS if f" {k} " in f" {c} ")
    assert kinds["star"] > 4 * kinds["bell"]
    again, _ = refshapes.training_pool(400, seed=1, size=32, chunk=200)
    assert (pictures == again).all()
