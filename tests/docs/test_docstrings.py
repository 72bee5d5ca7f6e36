"""Docstrings describe what is there: no attribute that a class does not have. (Parameters: ruff's DOC102 and D417.)"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("maekit", "cli", "exporters") for path in sorted((ROOT / folder).rglob("*.py"))]

pytestmark = pytest.mark.source


def described(docstring: str, heading: str) -> Iterator[str]:
    """Yield the names of a section of a docstring in Google's style."""
    lines = docstring.expandtabs().splitlines()
    if (start := next((n for n, line in enumerate(lines) if line.strip() == heading), None)) is None:
        return
    indent = len(lines[start]) - len(lines[start].lstrip())
    for line in lines[start + 1 :]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            return
        if depth == indent + 4 and ":" in line:
            yield line.strip().partition(":")[0]


def there(node: ast.ClassDef) -> set[str]:
    """Return all names that a class gives to itself or its instances."""
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names.add(inner.attr)
    return names


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_attributes_that_are_described_exist() -> None:
    wrong = [
        f"{where}: {name}"
        for where, node in classes()
        for name in described(ast.get_docstring(node, clean=False) or "", "Attributes:")
        if name not in there(node)
    ]
    assert not wrong


def test_the_check_sees_a_stale_attribute() -> None:
    (node,) = ast.parse(
        'class A:\n    """B.\n\n    Attributes:\n        c: d.\n        e: f.\n    """\n    c: int\n'
    ).body
    assert isinstance(node, ast.ClassDef)
    assert [
        n for n in described(ast.get_docstring(node, clean=False) or "", "Attributes:") if n not in there(node)
    ] == ["e"]
