"""Progress bars, the closing table, and which log lines are shown."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from quad_modifiers.torchrun import is_first_rank

Item = TypeVar("Item")
SUMMARY = "quad_summary"  # marks the log record that closes a run; a caller with a table of its own can drop it


def layer_progress(items: Sequence[Item], description: str, unit: str = "layer") -> Iterator[Item]:
    """Iterates with a progress bar that shows the time left; an item is a layer, or what `unit` says."""
    return iter(tqdm(items, desc=description, unit=unit, leave=False, disable=not is_first_rank()))


@contextmanager
def only_errors(logger: str) -> Iterator[None]:
    """Hides what a logger says below the level of an error."""
    quieted = logging.getLogger(logger)
    level = quieted.level
    quieted.setLevel(logging.ERROR)
    try:
        yield
    finally:
        quieted.setLevel(level)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows as aligned text; the first column is left-aligned, the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def file_size(size: int) -> str:
    """Returns a number of bytes as text, from B to GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
