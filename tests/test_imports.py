"""The modules of the package import each other in no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from openpi_opt.paths import package_dir


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(package_dir().parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def at_import(body: list[ast.stmt]) -> Iterator[str]:
    """What a module imports when it is imported itself: not in functions, not for types alone."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
        ):
            yield from at_import(node.body)


def graph(root: Path) -> dict[str, set[str]]:
    files = {module_of(path): path for path in root.rglob("*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: {*at_import(tree.body)} & {*files} - {name} for name, tree in trees.items()}


def test_no_circle():
    found = graph(package_dir())
    assert len(found) > 200
    list(graphlib.TopologicalSorter(found).static_order())


def test_a_circle_would_be_found():
    found = graph(package_dir())
    found["openpi_opt.errors"].add("openpi_opt.knobs")
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(found).static_order())
