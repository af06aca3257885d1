"""The packages speak one dialect: "Returns ...", "ValueError: if ...", annotations as Python evaluates them."""

import ast
import re

from .import_map import ROOT

PACKAGES = ("quad_modifiers", "quad_peft")
OTHER_DIALECT = re.compile(r"\A(Return|Yield|Raise) |^\s+\w+(Error|Exception): If ", re.M)
# Files in which the other dialect is still spoken. A line that is not needed any more must go.
DOCSTRINGS: set[str] = set()
LAZY_ANNOTATIONS = DOCSTRINGS


def sources() -> dict[str, str]:
    """The source of every file of the packages, by its path."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def docstrings(source: str) -> list[str]:
    """The docstrings of the functions, methods and classes in a source."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [ast.get_docstring(node) or "" for node in nodes]


def test_docstrings_say_what_a_function_does() -> None:
    found = {path for path, text in sources().items() if any(map(OTHER_DIALECT.search, docstrings(text)))}
    assert sorted(found - DOCSTRINGS) == [], 'write "Returns ...", "Yields ...", "ValueError: if ..."'
    assert sorted(DOCSTRINGS - found) == [], "exceptions that are not needed any more"


def test_annotations_are_not_lazy() -> None:
    found = {path for path, text in sources().items() if "from __future__ import annotations" in text}
    assert sorted(found - LAZY_ANNOTATIONS) == [], "quote the names that only type checkers import"
    assert sorted(LAZY_ANNOTATIONS - found) == [], "exceptions that are not needed any more"
