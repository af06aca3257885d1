"""`quad export`: a QUAD checkpoint in a format that other software loads without this package."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.options import expanded
from quad_modifiers.tools.console import log_on_stderr, print_table


class Format(StrEnum):
    """The formats there are."""

    compressed_tensors = "compressed-tensors"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A QUAD checkpoint.", callback=expanded)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the export; new or empty.", callback=expanded),
    ],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.compressed_tensors,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Input coordinates that share a scale; by default those of the checkpoint, or as many as fit.",
        ),
    ] = None,
) -> None:
    """Write a checkpoint that transformers and vLLM load without this package.

    Not every checkpoint can be expressed there; where it cannot, the error says why. What the export costs in
    accuracy is in the documentation.
    """
    from quad_modifiers.checkpoint.export import export_compressed_tensors
    from quad_modifiers.records.inventory import read_inventory

    with log_on_stderr():
        export_compressed_tensors(checkpoint, output, group_size=group_size)
    before, after = read_inventory(checkpoint), read_inventory(output)
    rows = [("from", checkpoint, before), ("to", output, after)]
    print_table(
        ("", "checkpoint", "format", "size"), [(w, str(f), held.format, file_size(held.total)) for w, f, held in rows]
    )
