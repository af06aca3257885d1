"""How the commands print: results on stdout through rich, progress and warnings on stderr."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from quad_modifiers.reporting import SUMMARY
from quad_modifiers.torchrun import is_first_rank

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 160  # rich assumes 80 columns where there is no terminal and would break paths


def console() -> "Console":
    """Returns a console on the current stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Prints a table; without column titles if `header` is empty."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title, style="table.title"),
        box=box.SIMPLE,
        show_header=bool(header),
        title_justify="left",
        pad_edge=False,
    )
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets are not markup
    console().print(table)


def print_json(content: object) -> None:
    """Prints a result for programs: JSON, indented, alone on stdout."""
    print(json.dumps(content, indent=1, allow_nan=False))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints this project's warnings as one line each and drops those of libraries, which no user can act on."""
    from quad_modifiers.plugins.manager import PluginWarning

    if issubclass(category, PluginWarning) or "quad_modifiers" in filename:
        print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


@contextmanager
def log_on_stderr(summaries: bool = True) -> Iterator[None]:
    """Shows the INFO lines of this project on stderr; `summaries=False` leaves out those that close a run.

    What libraries print goes to stderr too: stdout is for the result. llm-compressor logs to stdout, and to what is
    stdout when it is imported, so that has to happen inside; of its log only warnings are shown.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
    packages = [logging.getLogger(name) for name in ("quad_modifiers", "quad_peft")]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: summaries or not hasattr(record, SUMMARY))
    levels = [package.level for package in packages]
    for package in packages:
        package.addHandler(handler)
        package.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for package, level in zip(packages, levels, strict=True):
            package.removeHandler(handler)
            package.setLevel(level)
