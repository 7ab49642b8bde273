"""`data/refshapes/generate.py`: what it draws, and that the committed benchmark is what it draws."""

import json
import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parent.parent / "data/refshapes"
sys.path.insert(0, str(DATA))
import generate  # noqa: E402


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def read(path):
    return json.loads(path.read_text())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        generate.write_benchmark(tmp_path / name, seed=seed, images_per_split=2)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and a != c


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("refshapes")
    generate.write_benchmark(root, images_per_split=2)
    return root


def test_the_committed_pictures_and_proposals_are_what_is_drawn(drawn):
    for picture in (drawn / "images").rglob("*.jpg"):
        committed = np.asarray(Image.open(DATA / picture.relative_to(drawn))).astype(int)
        assert np.abs(committed - np.asarray(Image.open(picture))).mean() < 1  # another libjpeg may round differently
    for name in ("refshapes_dets_dict.json", "refshapes_rpn_dict.json"):
        committed = read(DATA / name)
        assert all(committed[image] == boxes for image, boxes in read(drawn / name).items())


def test_the_committed_masks_and_expressions_are_what_is_drawn(drawn):
    images = {image["id"] for image in read(drawn / "refshapes/instances.json")["images"]}
    assert read(drawn / "refshapes_masks.json") == [
        mask for mask in read(DATA / "refshapes_masks.json") if mask["image_id"] in images
    ]
    for kept in ("bbox", "segmentation", "category_id"):
        one, other = (
            [a[kept] for a in read(root / "refshapes/instances.json")["annotations"] if a["image_id"] in images]
            for root in (drawn, DATA)
        )
        assert one == other
    one, other = (
        [s["sent"] for r in pickle.loads((root / "refshapes/refs(unc).p").read_bytes()) if r["image_id"] in images
         for s in r["sentences"]]
        for root in (drawn, DATA)
    )  # fmt: skip
    assert one == other and len(one) > 20
    one, other = ((root / "refshapes/attributes.csv").read_text().splitlines() for root in (drawn, DATA))
    assert [line.split(",")[1:] for line in one if line.split(",")[0].isdigit()] == [
        other[annotation["id"]].split(",")[1:]
        for annotation in read(DATA / "refshapes/instances.json")["annotations"]
        if annotation["image_id"] in images
    ]


def test_the_committed_benchmark_has_its_size():
    refs = pickle.loads((DATA / "refshapes/refs(unc).p").read_bytes())
    for split in generate.SPLITS:
        part = [ref for ref in refs if ref["split"] == split]
        assert len({ref["image_id"] for ref in part}) == 160
        assert sum(len(ref["sentences"]) for ref in part) == 960
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= 10e6


def iou(boxes, box):
    """[n] intersection over union of `boxes` [n, 4] and one box, xywh."""
    boxes, box = np.asarray(boxes, float), np.asarray(box, float)
    ends = np.minimum(boxes[:, :2] + boxes[:, 2:], box[:2] + box[2:])
    both = np.clip(ends - np.maximum(boxes[:, :2], box[:2]), 0, None).prod(1)
    return both / (boxes[:, 2:].prod(1) + box[2:].prod() - both)


def proposal_statistics(name, split):
    """Chance, ceiling (%, over expressions) and boxes of bare ground an image."""
    boxes, instances = read(DATA / name), read(DATA / "refshapes/instances.json")["annotations"]
    target = {a["id"]: a["bbox"] for a in instances}
    refs = [r for r in pickle.loads((DATA / "refshapes/refs(unc).p").read_bytes()) if r["split"] == split]
    right = [iou(boxes[str(r["image_id"])], target[r["ann_id"]]) > 0.5 for r in refs for _ in r["sentences"]]
    images = {r["image_id"] for r in refs}
    objects = {i: [a["bbox"] for a in instances if a["image_id"] == i] for i in images}
    best = [np.max([iou(boxes[str(i)], box) for box in objects[i]], 0) for i in images]
    bare = np.mean([(overlap < 0.1).sum() for overlap in best])
    return 100 * np.mean([r.mean() for r in right]), 100 * np.mean([r.any() for r in right]), bare


@pytest.mark.parametrize("split", ["val", "test"])
def test_detections_are_like_mattnets(split):
    """The marks of published detections on RefCOCO: ReCLIP's table 2 for chance, MAttNet's recall for the ceiling."""
    chance, ceiling, bare = proposal_statistics("refshapes_dets_dict.json", split)
    assert 13 <= chance <= 19 and 86 <= ceiling <= 90 and bare < 1
    chance, ceiling, bare = proposal_statistics("refshapes_rpn_dict.json", split)
    assert chance < 13 and ceiling > 90 and bare > 1, "class-agnostic proposals: more boxes, more ground"


def test_boxes_stay_inside_the_picture():
    for seed in range(15):
        rng = np.random.default_rng([13, seed])
        scene = generate.draw_scene(rng)
        for boxes in map(np.array, (generate.propose(scene, rng), generate.detect(scene, rng))):
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
            assert (boxes[:, :2] + boxes[:, 2:] <= [320.1, 240.1]).all()


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
            if o is not anchors[0] and true[how] and generate.RELATIONS[how](dx, dy):
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
    rng, count = np.random.default_rng(3), 0
    for seed in range(25):
        scene = generate.draw_scene(np.random.default_rng([11, seed]))
        for target in scene.objects:
            text = generate.describe(scene, target, kind, rng)
            if text:
                count += 1
                assert [id(o) for o in reference_matches(text, scene)] == [id(target)], text
    assert count > 30


def test_masks_and_boxes_agree_and_no_pixel_has_two_objects():
    for seed in range(10):
        scene = generate.draw_scene(np.random.default_rng([12, seed]))
        assert 1 <= len(scene.objects) <= 9
        owners = np.zeros(scene.image.shape[:2], int)
        for thing in scene.objects:
            x, y, w, h = thing.box
            assert thing.mask[y : y + h, x : x + w].sum() == thing.mask.sum() > 0
            owners += thing.mask
        assert owners.max() == 1


@pytest.mark.parametrize("recipe", ["close", "web"])
def test_training_pairs_are_long_tailed_and_the_same_twice(recipe):
    pictures, captions = generate.training_pool(recipe, 400, size=32, chunk=200)
    assert pictures.shape == (400, 32, 32, 3) and pictures.dtype == np.uint8
    kinds = Counter(word for caption in captions for word in re.findall(r"\w+", caption) if word in generate.KINDS)
    assert kinds["star"] > 4 * kinds["bell"]
    again, _ = generate.training_pool(recipe, 400, size=32, chunk=200)
    assert (pictures == again).all()


def test_a_loose_frame_holds_its_object_and_much_else():
    rng = np.random.default_rng(0)
    for seed in range(20):
        for thing in generate.draw_scene(np.random.default_rng([14, seed])).objects:
            left, top, right, bottom = generate.loose_frame(thing, rng)
            x, y, w, h = thing.box
            assert 0 <= left <= x and x + w <= right <= 320 and 0 <= top <= y and y + h <= bottom <= 240
            assert max(w, h) <= 0.751 * (right - left)


def test_no_training_scene_is_a_scene_of_the_benchmark():
    """A seed of numpy's may be padded with zeros: [2024, 1] draws what [2024, 1, 0] draws."""
    assert all(2024 not in range(first, first + 80) for first in generate.FIRST_SEED.values())
