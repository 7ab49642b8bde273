"""Words of place, after any method's scores: ReCLIP's relations (Subramanian et al. 2022, §3.3 and appendix C).

A grammar over a closed list of words, or spaCy's parse, splits an expression into a head phrase, superlatives (left, top,
biggest, second from right …) and relations (left of, next to …) to other phrases. A phrase's softmax is a distribution p
over an image's candidates. The head's times Σ_j r(i, j) p_other(j), with a relation's probability r over two boxes, and
times the probability that k − 1 boxes of its kind come before i (ReCLIP has Σ_j p(j) r(i, j) there, and no k-th and
middle) multiplies the softmax of the whole expression. In front is below, behind above, as there.
"""

import re
from collections import namedtuple
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch import Tensor

from .datasets import XYWH
from .regions import Pairs

_SIDE = r"(?:(?:to|on|at) )?(?:the )?(?:immediate |far )?{}(?: hand)?(?: side)? (?:of|from)"
_RELATIONS = {name: re.compile(rf"\b(?:{words})\b") for name, words in {
    "left": _SIDE.format("left"), "right": _SIDE.format("right"), "inside": r"inside(?: of)?|within",
    "top": r"above|on top of|atop|(?:right )?behind|in back of", "big": r"(?:bigger|larger|taller) than",
    "bottom": r"below|under|underneath|beneath|(?:right )?in front of", "small": r"(?:smaller|shorter) than",
    "near": r"(?:right )?(?:next|closest|nearest|close|adjacent) to|nearest|beside|near|by",
}.items()}  # fmt: skip
_DIRECTIONS = {word: name for name, words in {
    "left": "left leftmost", "right": "right rightmost", "top": "top topmost upper highest back background rear",
    "bottom": "bottom lower lowest front foreground", "small": "small smaller smallest shortest furthest farthest",
    "big": "big bigger biggest large larger largest tallest closest nearest closer", "middle": "middle center centre central",
}.items() for word in words.split()}  # fmt: skip
_RANKS = {"1st": 1, "first": 1, "2nd": 2, "second": 2, "3rd": 3, "third": 3, "4th": 4, "fourth": 4}
_WORD = f"({'|'.join(_DIRECTIONS)})"
_RANKED = re.compile(rf"\b({'|'.join(_RANKS)})\b((?: \w+){{0,2}}?) from (?:the )?(?:far )?{_WORD}\b")
_PLACED = re.compile(r"\b(?<!'s )(?<!his )(?<!her )(?<!whose )(?:(?:on|at|in|to) )?(?:the )?(?:far |very |most |f[ua]rthest )?"
    rf"{_WORD}(?: most)?\b(?! (?:hand|arm|leg|foot|ear|eye|wing)\b)(?:(?: hand)? (?:sides?|corner|edge|half|end|row))?\b"
)  # fmt: skip
_PICTURE = re.compile(r"\b(?:(?:of|in|on|to|from) (?:the |this )?|(?<=est ))(?:pic|picture|photo|image|screen|frame|shot|"
                      r"camera|you|us|me|viewer|two|three|four|group|bunch)\b(?! of)")  # fmt: skip
_GARMENT = re.compile(r"\b((?:in|wearing|with)(?: (?!the )\w+){0,3}|tank|crop) top\b")
_SMALL = "(?:the|an?|ones?|of|in|on|at|to|and|is|that|who|row)"
_EDGE = re.compile(rf"^(?:{_SMALL}\b ?)+|(?: ?\b{_SMALL})+$")
Phrase = namedtuple("Phrase", "text superlatives relations")  # "" is any box; [(direction, rank)]; [(name, Phrase)]


def parse(text: str, parser: Any = None) -> Phrase:
    """Take an expression apart; with spaCy's `global_local.english_parser()`, along its parse."""
    text = _PICTURE.sub("", " ".join(re.findall(r"[\w']+", _GARMENT.sub(r"\1 shirt", text.lower()))))
    found = ((match, name) for name, pattern in _RELATIONS.items() for match in pattern.finditer(text))
    for match, name in sorted(found, key=lambda one: one[0].span()):
        head, other = text[: match.start()], text[match.end() :]
        if parser:  # what hangs on the relation's last word is the other phrase, all else is the head's
            words = list(parser(text))
            later = [token for token in words if token.idx >= match.end()]
            below = [token for token in words[-len(later) - 1].subtree if token in later]
            head = " ".join([head, *(token.text for token in later if token not in below)])
            other = " ".join(token.text for token in below)
        tree = parse(other, parser)
        if tree.text or tree.superlatives:
            whole = parse(head, parser)
            return whole._replace(relations=[(name, tree), *whole.relations])
    superlatives = [(_DIRECTIONS[word], _RANKS[rank]) for rank, _, word in _RANKED.findall(text)]
    text = _RANKED.sub(r"\2", text)
    places = dict.fromkeys(_DIRECTIONS[word] for word in _PLACED.findall(text))
    text = _EDGE.sub("", " ".join(_PLACED.sub(" ", text).split()))
    return Phrase(text, superlatives + [(place, int(place != "middle")) for place in places], [])


def _texts(tree: Phrase) -> list[str]:
    return [tree.text] * bool(tree.text) + [text for _, other in tree.relations for text in _texts(other)]


def phrase_pairs(trees: list[Phrase], pairs: Pairs) -> tuple[list[str], Pairs]:
    """Return the phrases of expressions with words of place, and their pairs with candidates, to be scored as any other."""
    parts = torch.arange(len(pairs)).split(pairs.expression.bincount().tolist())
    phrases = [(text, own) for own, tree in zip(parts, trees, strict=True) if any(tree[1:]) for text in _texts(tree)]
    number = torch.tensor([number for number, (_, rows) in enumerate(phrases) for _ in rows], dtype=torch.long)
    rows = torch.cat([number[:0], *(rows for _, rows in phrases)])
    return [text for text, _ in phrases], Pairs(number, pairs.candidate[rows], pairs.image[rows], pairs.iou[rows])


def relate(scores: Tensor, of_phrases: Tensor, trees: list[Phrase], pairs: Pairs, candidates: pd.DataFrame) -> Tensor:
    """Return scores [P] with words of place, from the same method's of `phrase_pairs`; without such words to the bit."""
    boxes, rest = candidates[XYWH].to_numpy(float)[pairs.candidate], iter(of_phrases.tolist())
    parts, result = torch.arange(len(pairs)).split(pairs.expression.bincount().tolist()), scores.double().clone()
    for own, tree in zip(parts, trees, strict=True):
        if any(tree[1:]):
            p = torch.from_numpy(_distribution(tree, boxes[own], rest))
            result[own] = result[own].log_softmax(0) + (p + 1e-12).log()
    return result


def _distribution(tree: Phrase, boxes: np.ndarray, rest: Iterator[float]) -> np.ndarray:
    """The probability of each box [N, 4] to be what a phrase means; `rest` yields scores in the order of `_texts`."""
    p = softmax(list(islice(rest, len(boxes)))) if tree.text else np.full(len(boxes), 1 / len(boxes))
    for name, other in tree.relations:
        p = p * (_relation(name, boxes) @ _distribution(other, boxes, rest))
    for direction, rank in tree.superlatives:
        p = p * _ranked(_position(direction, boxes), rank, p / max(p.max(), 1e-12))
    return p / max(p.sum(), 1e-12)


def _position(direction: str, boxes: np.ndarray) -> np.ndarray:
    (x, y), area = (boxes[:, :2] + boxes[:, 2:] / 2).T, boxes[:, 2] * boxes[:, 3]
    return {"left": x, "right": -x, "top": y, "bottom": -y, "small": area, "big": -area, "middle": x}[direction]


def _relation(name: str, boxes: np.ndarray) -> np.ndarray:
    """The probability that box i stands in the relation to box j, [N, N]; never to itself."""
    low, size = boxes[:, :2], boxes[:, 2:]
    shared = np.minimum((low + size)[:, None], low + size) - np.maximum(low[:, None], low)  # negative: a gap
    gap, area = np.linalg.norm(shared.clip(max=0), axis=2), size.prod(1)[:, None]
    r = {"inside": shared.clip(0).prod(2) / area, "near": np.exp(-gap / np.sqrt(area))}.get(name)
    return np.less.outer(*[_position(name, boxes)] * 2) if r is None else r * (1 - np.eye(len(boxes)))


def _ranked(position: np.ndarray, rank: int, member: np.ndarray) -> np.ndarray:
    """The probability of each box to be the k-th of its kind, where `member` [N] is that of being of the kind."""
    if not rank:  # the middle: as much of the kind before as behind
        before = (np.greater.outer(position, position) @ member + member / 2) / member.sum()
        return 4 * before * (1 - before)
    result, count = np.empty(len(member)), np.eye(1, rank)[0]  # how probably 0 … k − 1 so far are of the kind
    for i in np.argsort(position, kind="stable"):
        result[i] = count[-1]
        count = count * (1 - member[i]) + np.r_[0, count[:-1]] * member[i]
    return result
