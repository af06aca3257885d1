"""docs/reference/troubleshooting.md quotes messages that the source still has."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from .pages import ROOT

PAGE = ROOT / "docs" / "reference" / "troubleshooting.md"
SOURCES = ("quad_modifiers", "kernels/quad_kernels", "quad_peft")
VARIES = "…"


def quoted() -> list[str]:
    """The messages in the first column of the page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.M)


@cache
def messages() -> tuple[str, ...]:
    """Every string of the source, with `VARIES` in place of what an f-string inserts."""
    files = [file for source in SOURCES for file in sorted((ROOT / source).rglob("*.py"))]
    return tuple(text for file in files for text in strings(file.read_text(encoding="utf-8")))


def strings(source: str) -> list[str]:
    """The string constants of a module, adjacent ones joined as Python joins them."""
    found, inside = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node) if part is not node}
            parts = [part.value if isinstance(part, ast.Constant) else VARIES for part in node.values]
            found.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            found.append(node.value)
    return found


def occurs(message: str) -> bool:
    return any(holds(text, message.split(VARIES)) for text in messages())


def holds(text: str, fragments: list[str]) -> bool:
    """Whether `text` has the fragments in this order."""
    position = 0
    for fragment in fragments:
        position = text.find(fragment, position)
        if position < 0:
            return False
        position += len(fragment)
    return True


@pytest.mark.parametrize("message", quoted())
def test_quoted_message_is_in_the_source(message: str) -> None:
    assert re.search(r"[a-z]{3}", message), "too little to be looked up"
    assert occurs(message)


def test_page_quotes_messages_and_the_look_up_can_fail() -> None:
    assert len(quoted()) > 50
    assert not occurs("… is a …, not a plain Linear of this kind")
    assert occurs("… is a …, not a plain Linear: the model is already quantized")


def test_messages_of_other_software_hold_this_projects_hint() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```text\n(.*?)\n```", text, re.S):
        assert "pip install quad-modifiers, then import quad_modifiers" in block
    assert occurs("pip install quad-modifiers, then import quad_modifiers")
