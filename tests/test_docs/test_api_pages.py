"""The API reference shows modules that exist, and every package that declares what is public."""

from __future__ import annotations

import re
from importlib.util import find_spec

from .pages import ROOT

API = ROOT / "docs" / "reference" / "api"
COMMAND_LINE = "quad_modifiers.tools.cli"  # docs/reference/cli.md


def shown_modules() -> list[str]:
    """Modules of all pages, in order."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(API.glob("*.rst"))]
    return [name for page in pages for name in re.findall(r"^\.\. automodule:: (\S+)$", page, re.M)]


def test_modules_exist_and_stand_once() -> None:
    names = shown_modules()
    assert [name for name in names if find_spec(name) is None] == []
    assert len(set(names)) == len(names) > 20


def test_packages_that_declare_what_is_public_are_shown() -> None:
    declaring = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in ("quad_modifiers", "quad_peft")
        for file in (ROOT / package).rglob("__init__.py")
        if re.search(r"^__all__ = ", file.read_text(encoding="utf-8"), re.M)
    }
    assert "quad_modifiers.plugins" in declaring
    assert declaring - {COMMAND_LINE} - set(shown_modules()) == set()


def test_every_page_is_linked() -> None:
    overview = (API.parent / "api.md").read_text(encoding="utf-8")
    assert [page.name for page in API.glob("*.rst") if f"(api/{page.name})" not in overview] == []
