"""`quad` where the packages of its command line are not installed."""

import sys
from collections.abc import Sequence

PACKAGES = ("typer", "rich", "click")


def main(arguments: Sequence[str] | None = None) -> int:
    """Says what to install; returns the exit code of a failure."""
    print(
        "error: the command `quad` needs typer and rich; install them with `pip install 'quad-modifiers[cli]'`",
        file=sys.stderr,
    )
    return 1
