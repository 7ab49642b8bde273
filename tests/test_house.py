"""The package as a house: every public name is explained, no room borrows another's private things, no import circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from bsap_utils import ROOT

MODULES = {path.stem: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "bsap_utils").glob("*.py"))}


def imports(tree):
    """(module of ours, name) of each import from the package; lazy ones inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("bsap_utils")):
            module = (node.module or "").removeprefix("bsap_utils").strip(".")
            for one in node.names:
                yield (module, one.name) if module else (one.name, "")


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    bodies = [MODULES[module], *(n for n in MODULES[module].body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    lacking = [
        node.name
        for body in bodies
        for node in body.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and not ast.get_docstring(node)
    ]
    assert ast.get_docstring(MODULES[module]) and not lacking


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module(module):
    borrowed = [name for _, name in imports(MODULES[module]) if name.startswith("_") and not name.startswith("__")]
    rooms = {
        one.asname or one.name for n in ast.walk(MODULES[module]) if isinstance(n, ast.ImportFrom) for one in n.names
    }
    rooms &= MODULES.keys()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            borrowed += [node.attr] * (node.attr.startswith("_") and not node.attr.startswith("__"))
    assert not borrowed


def test_no_import_circle():
    graph = {name: {module for module, _ in imports(tree) if module in MODULES} for name, tree in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("datasets") < order.index("regions") < order.index("scoring")
