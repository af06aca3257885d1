"""`quad verify`: a checkpoint against its own checksums."""

from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.tools.cli.errors import FAILURE
from quad_modifiers.tools.cli.options import expanded
from quad_modifiers.tools.console import log_on_stderr


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A checkpoint on disk.", callback=expanded)],
    write: Annotated[
        bool,
        typer.Option("--write", help="Take the folder as it is: write checksums of what is there now."),
    ] = False,
) -> None:
    """Compare every tensor and file of a checkpoint with the checksums that were written with it.

    What has changed is listed, and the exit code is 1. A model card and an evaluation.json, which are written later,
    are not covered.
    """
    from quad_modifiers.records.checksums import CHECKSUMS_NAME, damages, need_checksums, uncovered, write_checksums

    with log_on_stderr():
        if write:
            made = write_checksums(folder)
            typer.echo(f"{folder / CHECKSUMS_NAME}: {_count(made.tensors, 'tensor')}, {_count(made.files, 'file')}")
            return
        wanted = need_checksums(folder)
        found = damages(folder, wanted)
    for damage in found:
        typer.echo(damage.text)
    if found:
        raise typer.Exit(FAILURE)
    typer.echo(f"{_count(wanted.tensors, 'tensor')} and {_count(wanted.files, 'file')} are what was written")
    left = uncovered(folder, wanted)
    if left:
        typer.echo(f"not covered: {', '.join(left)}")


def _count(things: dict[str, str], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
