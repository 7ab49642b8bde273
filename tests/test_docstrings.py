"""Public docstrings say what a user needs: shapes, errors, units, sources and, in the core, a line that runs.

What a machine can tell, it tells here, from the syntax tree: nothing is imported. The examples themselves run as doctests.
`python tests/test_docstrings.py [FOLDER]` lists what is lacking.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bsap_utils import ROOT

CORE = {"normalization", "scoring", "visual_prompts", "evaluation", "proposals", "datasets", "aux_prompts", "analysis"}
ARRAY, FRAME = re.compile(r"\b(?:Tensor|ndarray)\b"), re.compile(r"\bDataFrame\b")
# no example of one short line has arguments of these kinds
BY_HAND = re.compile(r"\b(?:ReferDataset|ReferLogits|ClipScorer|Path|Any|Callable)\b")
SHAPE = re.compile(r"\[[^\]]*[A-Z0-9][^\]]*\]")
FORMULA, SOURCE = re.compile(r"[Σ√]|\bexp\(|logsumexp"), re.compile(r"\b(?:19|20)\d\d\b|arXiv")
UNITS = {  # parameters that measure something: what a docstring must have about them
    r"boxes|referred|sigma|min_area|height|width": r"pixel|xywh|\[N, H, W\]",
    r"threshold|iou|nms_iou": "IoU",
    "level": "interval|%",
    r"timeout|seconds": "second",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What a function does itself: neither in a function inside of it, nor where it catches what goes wrong."""
    for field, value in ast.iter_fields(node):
        caught = isinstance(node, ast.Try) and field == "body" and node.handlers
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not caught and not isinstance(child, (ast.FunctionDef, ast.Lambda)):
                yield child
                yield from own(child)


def raised(node: ast.AST, helpers: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> set[str]:
    """The errors that a function raises, itself or in private functions of its module."""
    found: set[str] = set()
    for one in own(node):
        if isinstance(one, ast.Raise) and isinstance(one.exc, ast.Call):
            found.add(ast.unparse(one.exc.func).split(".")[-1])
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id in helpers.keys() - seen:
            found |= raised(helpers[one.func.id], helpers, seen | {one.func.id})
    return {name for name in found if not name.startswith("_")} - {"Exit"}  # typer's, an exit code


def lacks(module: str, source: str) -> dict[str, list[str]]:
    """Return what each public function, class and method of a module's source lacks; "" stands for the module."""
    tree = ast.parse(source)
    whole = ast.get_docstring(tree) or ""
    found = {"": [] if whole else ["a docstring"]}
    helpers = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("_")}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found[node.name] = of_one(module, node, "", whole, helpers)
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    about = ast.get_docstring(node) or ""
                    found[f"{node.name}.{inner.name}"] = of_one(module, inner, about, whole, helpers)
    return found


def of_one(module: str, node: ast.AST, about: str, whole: str, helpers: dict[str, ast.AST]) -> list[str]:
    text = ast.get_docstring(node) or ""
    if not text:
        return ["a docstring"]
    near = f"{text}\n{about}"
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        names = [argument.arg for init in made for argument in init.args.args[1:]]
        return [f"a word on `{name}`" for name in names if not re.search(rf"\b{name}\b", text)]
    arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation]
    takes = {a.arg: ast.unparse(a.annotation) for a in arguments}
    gives = ast.unparse(node.returns) if node.returns else ""
    arrays = [name for name, kind in takes.items() if ARRAY.search(kind)]
    shaped = arrays and all(re.search(rf"`{name}` \[", whole) for name in arrays)  # once for all of the module
    found = []
    if (arrays or ARRAY.search(gives)) and not shaped and not SHAPE.search(text.split(">>>")[0]):
        found.append("a shape such as [R, M]")
    if FRAME.search(gives) and not re.search(r"\b(?:[Cc]olumns?|rows?|frame)\b", text):
        found.append("what its rows and columns are")
    found += [f"when it raises {one}" for one in sorted(raised(node, helpers)) if one not in near + whole]
    for names, words in UNITS.items():
        measured = [a for a in takes if re.fullmatch(names, a)]
        if measured and not re.search(words, near + whole):
            found.append(f"the unit of {', '.join(measured)}")
    numbers = re.search(r"\bpercent\(|\b100 \* ", ast.unparse(node)) and (FRAME.search(gives) or ARRAY.search(gives))
    if numbers and not re.search("percent", near, re.IGNORECASE):
        found.append("that its numbers are percent")
    if module in CORE and FORMULA.search(text) and not SOURCE.search(near + whole):
        found.append("the source of its formula")
    one_line = not shaped and not BY_HAND.search(" ".join(takes.values()))
    if module in CORE and one_line and ">>>" not in near:
        found.append("an example")
    return found


def listed(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.py")):
        for name, what in lacks(path.stem, path.read_text("utf-8")).items():
            yield from ((f"{path.stem}.{name}".strip("."), one) for one in what)


@pytest.mark.parametrize("path", sorted((ROOT / "bsap_utils").glob("*.py")), ids=lambda path: path.stem)
def test_public_docstrings_are_complete(path):
    found = {name: what for name, what in lacks(path.stem, path.read_text("utf-8")).items() if what}
    assert not found


GOOD = '''"""Scores."""
def mean_iou(boxes: np.ndarray, level: float) -> np.ndarray:
    """Return Σ IoU / N of `boxes` [N, 4] (xywh, pixels), as Jaccard (1901): [N], percent, its interval at `level`.

    Raises ValueError for no boxes.

    >>> mean_iou([[0, 0, 1, 1]], 0.95)
    """
    _check(boxes)
    try:
        raise KeyError("caught")
    except KeyError:
        return 100 * boxes.mean()
def _check(boxes):
    if not len(boxes):
        raise ValueError("none")
def table(n: int) -> pd.DataFrame:
    """One row a method."""
class Scorer:
    """Scores with `model`: [R]."""
    def __init__(self, model: str) -> None:
        self.model = model
    def score(self, data: Path) -> Tensor:
        """Return scores [R]."""
'''


def test_a_complete_module_lacks_nothing_but_the_examples_of_the_core():
    assert not any(lacks("refshapes", GOOD).values())
    assert {name for name, what in lacks("evaluation", GOOD).items() if what} == {"table"}


@pytest.mark.parametrize(
    ("change", "name", "lacking"),
    [
        (('"""Scores."""', ""), "", "a docstring"),
        (('"""One row a method."""', "return 1"), "table", "a docstring"),
        (("One row a method", "A table"), "table", "what its rows and columns are"),
        (("[N, 4] (xywh, pixels), as Jaccard (1901): [N]", "xywh, pixels, (1901)"), "mean_iou", "a shape such as [R, M]"),
        (("(xywh, pixels)", ""), "mean_iou", "the unit of boxes"),
        (("its interval at", "and"), "mean_iou", "the unit of level"),
        ((", percent", ""), "mean_iou", "that its numbers are percent"),
        (("Raises ValueError for no boxes.", ""), "mean_iou", "when it raises ValueError"),
        (("except KeyError:\n        return", "finally:\n        return"), "mean_iou", "when it raises KeyError"),
        (("as Jaccard (1901)", "of boxes"), "mean_iou", "the source of its formula"),
        ((">>> mean_iou", "mean_iou"), "mean_iou", "an example"),
        (("with `model`", "something"), "Scorer", "a word on `model`"),
        (("Return scores [R].", ""), "Scorer.score", "a docstring"),
    ],
)  # fmt: skip
def test_what_is_taken_away_is_missed(change, name, lacking):
    assert change[0] in GOOD
    changed = GOOD.replace(*change)
    assert lacking in lacks("evaluation", changed)[name]


if __name__ == "__main__":
    print(
        "\n".join(" lacks ".join(pair) for pair in listed(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "bsap_utils"))
    )
