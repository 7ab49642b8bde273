"""Words of place: what the grammar makes of real phrases, probabilities against enumeration, and the sample's places."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsap_utils.evaluation import expression_kind, rec_table
from bsap_utils.global_local import english_parser
from bsap_utils.normalization import METHODS
from bsap_utils.regions import Pairs, ground_truth, pair_up
from bsap_utils.spatial import Phrase, parse, phrase_pairs, relate


def show(tree):
    ranks = "".join(f" [{direction}{'' if rank == 1 else rank}]" for direction, rank in tree.superlatives)
    return tree.text + ranks + "".join(f" {name}({show(other)})" for name, other in tree.relations)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Man in the red shirt.", "man in the red shirt"),  # no word of place, and so no relation
        ("left guy", "guy [left]"),
        ("the guy on the far left", "guy [left]"),
        ("lower right corner blue bag", "blue bag [bottom] [right]"),
        ("left side of the picture", " [left]"),
        ("second green bottle from left", "green bottle [left2]"),
        ("2nd guy from right", "guy [right2]"),
        ("silver remote third from the right", "silver remote [right3]"),
        ("middle giraffe of the three", "giraffe [middle0]"),
        ("biggest pizza", "pizza [big]"),
        ("tallest giraffe", "giraffe [big]"),
        ("left most guy", "guy [left]"),
        ("cow closest to us", "cow [big]"),
        ("front row second from left", " [left2] [bottom]"),
        ("animal in front", "animal [bottom]"),
        ("man to the left of the dog", "man left(dog)"),
        ("blue suitcase under cat", "blue suitcase bottom(cat)"),
        ("woman right next to the left bench", "woman near(bench [left])"),
        ("guy behind the man on right", "guy top(man [right])"),
        ("cup above the plate below the lamp", "cup top(plate bottom(lamp))"),
        ("cup beside the plate below the lamp", "cup near(plate bottom(lamp))"),
        ("cup smaller than the plate", "cup small(plate)"),
        ("train on top", "train [top]"),
        ("ball inside the box", "ball inside(box)"),
        ("sheep bigger than the dog", "sheep big(dog)"),
        ("girl in blue top", "girl in blue shirt"),  # worn, not a place
        ("his left arm", "his left arm"),
        ("man on top bunk", "man bunk [top]"),
        ("under", "under"),  # to nothing
        ("", ""),
    ],
)
def test_what_the_grammar_reads(text, expected):
    assert show(parse(text)) == expected


PARSED = [  # words, parts of speech, heads, dependencies
    ("man left of the dog in a red shirt", "NOUN ADJ ADP DET NOUN ADP DET ADJ NOUN", [0, 0, 1, 4, 2, 0, 8, 8, 5],
     "ROOT amod prep det pobj prep det amod pobj"),
    ("cup above the plate below the lamp", "NOUN ADP DET NOUN ADP DET NOUN", [0, 0, 3, 1, 0, 6, 4],
     "ROOT prep det pobj prep det pobj"),
    ("man in a red shirt", "NOUN ADP DET ADJ NOUN", [0, 0, 4, 4, 1], "ROOT prep det amod pobj"),
    ("cup below the lamp", "NOUN ADP DET NOUN", [0, 0, 3, 1], "ROOT prep det pobj"),
    ("the dog", "DET NOUN", [1, 1], "det ROOT"), ("the plate", "DET NOUN", [1, 1], "det ROOT"),
    ("the lamp", "DET NOUN", [1, 1], "det ROOT"), ("cup", "NOUN", [0], "ROOT"),
]  # fmt: skip


def test_with_a_parser_what_follows_the_other_phrase_may_belong_to_the_head(english_model):
    english_model(PARSED)
    parser, _ = english_parser()
    texts = [words for words, *_ in PARSED[:2]]
    assert [show(parse(text)) for text in texts] == ["man left(dog in a red shirt)", "cup top(plate bottom(lamp))"]
    assert [show(parse(text, parser)) for text in texts] == [
        "man in a red shirt left(dog)", "cup top(plate) bottom(lamp)"
    ]  # fmt: skip


WORDS = ["left", "right", "of", "the", "second", "from", "on", "top", "big", "by", "man", "in", "next", "to"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_text_is_read(text):
    assert isinstance(parse(text), Phrase)


def scene(texts, boxes, likely):
    """Scores [texts, boxes] in one image; `likely` says which boxes look like a phrase."""

    def score(phrases, table):
        rows = zip(table.expression.tolist(), table.candidate.tolist(), strict=True)
        return torch.tensor([9.0 * (candidate in likely(phrases[e])) for e, candidate in rows])

    number = torch.arange(len(texts)).repeat_interleave(len(boxes))
    pairs = Pairs(number, torch.arange(len(number)) % len(boxes), 0 * number, 0.0 * number)
    trees = [parse(text) for text in texts]
    phrases, table = phrase_pairs(trees, pairs)
    candidates = pd.DataFrame(boxes, columns=["x", "y", "w", "h"])
    related = relate(score(texts, pairs), score(phrases, table), trees, pairs, candidates)
    return related.reshape(len(texts), -1), trees


ROW = [(10 * i, 0, 5, 5) for i in range(5)] + [(20, 40, 30, 30)]  # five small boxes in a row, a large one below


def test_places_among_boxes_that_look_alike():
    texts = ["left dog", "dog on the right", "second dog from left", "third dog from the right", "biggest", "bottom"]
    texts += [
        "cat",
        "thing below the cat",
        "middle dog",
        "dog left of the cat",
        "dog right of the cat",
        "dog next to the cat",
    ]

    def looks(text):
        return [0, 1, 3, 4] if "dog" in text else [2] if "cat" in text else []

    scores, _ = scene(texts, ROW, looks)
    assert scores.argmax(1)[:8].tolist() == [0, 4, 1, 1, 5, 5, 2, 5]
    best_two = scores[8:].topk(2).indices.sort().values.tolist()  # two dogs are as good
    assert best_two == [[1, 3], [0, 1], [3, 4], [1, 3]]


def test_places_are_those_of_centres_and_sizes_those_of_areas():
    boxes = [(30, 30, 10, 10), (0, 0, 60, 60), (26, 26, 2, 2)]  # centres 35, 30, 27
    scores, _ = scene(["left", "top", "right", "bottom"], boxes, lambda text: [])
    assert scores.argmax(1).tolist() == [2, 2, 0, 0]
    wide, square, tall = (0, 0, 10, 5), (0, 0, 8, 8), (0, 0, 4, 9)
    assert scene(["biggest", "smallest"], [wide, square, tall], lambda text: [])[0].argmax(1).tolist() == [1, 2]


def test_relations_and_the_middle_are_the_probabilities_worked_out_by_hand():
    boxes = [
        (20, 20, 20, 20),
        (5, 20, 10, 10),
        (43, 44, 4, 4),
        (25, 25, 10, 10),
        (18, 30, 4, 8),
    ]  # the first is the box
    (near, inside), _ = scene(["near the box", "inside the box"], boxes, lambda text: [0] if text == "box" else [])
    assert (near[1] - near[2]).item() == pytest.approx(
        -5 / 10 + 5 / 4, abs=0.01
    )  # gaps of 5 and of 3 by 4, sides 10 and 4
    assert max(near[0], inside[0]) < min(near[1], inside[3]) - 5  # nothing is near to itself
    assert (inside[3] - inside[4]).item() == pytest.approx(np.log(1 / 0.5), abs=0.01)  # whole and half
    middle = scene(["middle dog"], ROW[:3], lambda text: [0, 1, 2])[0][0]  # 1/6, 1/2 and 5/6 of the dogs come before
    np.testing.assert_allclose(middle - middle[1], np.log([5 / 9, 1, 5 / 9]))


def test_expressions_without_words_of_place_keep_their_scores_to_the_bit():
    scores, trees = scene(["cat", "left cat", "dog in red"], ROW, lambda text: [2] if "cat" in text else [0])
    plain = torch.tensor([[9.0 * (c == 2) for c in range(6)], [9.0 * (c == 0) for c in range(6)]], dtype=torch.float64)
    assert torch.equal(scores[[0, 2]], plain)
    assert phrase_pairs([trees[0]], Pairs(*[torch.zeros(2, dtype=torch.long)] * 4))[0] == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 4))
def test_kth_is_the_probability_over_all_worlds(seed, rank):
    """Every subset of boxes may be the kind; a box is the k-th where it is in the subset with k − 1 of it before."""
    generator = np.random.default_rng(seed)
    boxes = np.c_[generator.permutation(5) * 10.0, np.zeros(5), np.full((5, 2), 5.0)]
    logits = torch.tensor(generator.normal(0, 2, 5))
    words = {1: "left dog", 2: "second dog from left", 3: "third dog from left", 4: "4th dog from left"}
    pairs = Pairs(torch.zeros(5, dtype=torch.long), torch.arange(5), torch.zeros(5, dtype=torch.long), torch.zeros(5))
    candidates = pd.DataFrame(boxes, columns=["x", "y", "w", "h"])
    got = relate(torch.zeros(5), logits, [parse(words[rank])], pairs, candidates).exp().numpy()
    member = np.exp(logits.numpy() - logits.max().item())
    worlds = np.zeros(5)
    for subset in itertools.product([0, 1], repeat=5):
        chance = np.prod([m if one else 1 - m for m, one in zip(member, subset, strict=True)])
        inside = sorted(np.flatnonzero(subset), key=lambda i: boxes[i, 0])
        if len(inside) >= rank:
            worlds[inside[rank - 1]] += chance
    if worlds.sum() > 1e-6:
        np.testing.assert_allclose(got / got.sum(), worlds / worlds.sum(), atol=1e-6)


def test_the_samples_places_are_found(sample_val, scorer):
    """On ground truth, words of place gain tens of points for CLIP and BSAP, and the rest keeps its accuracy."""
    val = sample_val.select(limit=40)
    candidates = ground_truth(val)
    pairs = pair_up(val, candidates)
    image = scorer.encode_regions(val, candidates, ("crop",))
    trees = [parse(text) for text in val.expressions["text"]]
    phrases, table = phrase_pairs(trees, pairs)
    encode = lambda texts: scorer.encode_texts(texts, "a photo of {}")  # noqa: E731
    s, sp = (
        scorer.pair_logits(image, encode(val.expressions["text"]), pairs),
        scorer.pair_logits(image, encode(phrases), table),
    )
    a, scores = scorer.logits(image, encode(val.categories)), {}
    for name in ("clip", "bsap"):
        scores[name] = METHODS[name](s, a, pairs)
        scores[f"{name}, placed"] = relate(scores[name], METHODS[name](sp, a, table), trees, pairs, candidates)
    kinds = expression_kind(val.expressions["text"]).rename("slice")
    found = rec_table(pairs, scores, by=kinds).pivot(index="slice", columns="method", values="accuracy")
    for name in ("clip", "bsap"):
        assert found.at["place", f"{name}, placed"] > found.at["place", name] + 10
        assert found.at["relation", f"{name}, placed"] > found.at["relation", name] + 5
        assert found.at["attributes", f"{name}, placed"] > found.at["attributes", name] - 3


def test_most_real_expressions_with_words_of_place_are_taken_apart(real_expressions):
    texts = [one["sents"] for one in json.loads((real_expressions / "refcoco_val.json").read_text())]
    trees = [parse(text) for text in texts]
    placed = [bool(tree.superlatives or tree.relations) for tree in trees]
    assert len(texts) == 10834 and 0.6 < np.mean(placed) < 0.7
    assert sum(not tree.text and not placed_one for tree, placed_one in zip(trees, placed, strict=True)) < 20
    ranks = [rank for tree in trees for _, rank in tree.superlatives]
    assert sum(rank > 1 for rank in ranks) > 250 and sum(bool(tree.relations) for tree in trees) > 500
