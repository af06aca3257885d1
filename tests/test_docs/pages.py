"""The pages of the documentation and their code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OUTSIDE = (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
PAGES = sorted([*_OUTSIDE, *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)])
_BLOCK = re.compile(r"(?P<before>[^\n]*\n)?^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$", re.S | re.M)
_SKIP = "<!-- no-test -->"
_FILE = re.compile(r"<!-- file: (\S+) -->")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: of its first line of code.
        skipped: the page says that it cannot run.
        file: the file that the page says it is the content of.
    """

    page: Path
    language: str
    text: str
    line: int
    skipped: bool
    file: str | None


def blocks(page: Path, language: str) -> Iterator[Block]:
    """Yield the code blocks of a page in one language, without their indentation."""
    source = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(source):
        if match["language"] == language:
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
            line = source.count("\n", 0, match.start("text")) + 1
            before = match["before"] or ""
            file = _FILE.search(before)
            yield Block(page, language, text, line, _SKIP in before, file and file[1])


def recipes(page: Path) -> list[Block]:
    """Return the YAML blocks of a page that are recipes."""
    return [block for block in blocks(page, "yaml") if "_modifiers:" in block.text and not block.skipped]


def shown(page: Path) -> str:
    """Return a page as it is named in messages."""
    return str(page.relative_to(ROOT))
