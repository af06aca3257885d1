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
    dense = "dense"


class DenseDtype(StrEnum):
    """What a dense checkpoint can be written in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A QUAD checkpoint.", callback=expanded)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the export; new or empty.", callback=expanded),
    ],
    format: Annotated[
        Format, typer.Option(help="What to write: packed integers, or plain floating-point weights (dense).")
    ] = Format.compressed_tensors,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="compressed-tensors: input coordinates that share a scale; by default those of the checkpoint, or as "
            "many as fit.",
        ),
    ] = None,
    online_hadamard: Annotated[
        bool,
        typer.Option(
            "--online-hadamard",
            help="compressed-tensors: write online Hadamards as transform_config, for vLLM on one CUDA device only.",
        ),
    ] = False,
    dtype: Annotated[
        DenseDtype | None, typer.Option(help="dense: of the weights; by default that of the checkpoint.")
    ] = None,
) -> None:
    """Write a checkpoint that transformers and vLLM load without this package.

    Not every checkpoint can be expressed in compressed-tensors; where it cannot, the error says why. A dense one
    computes with unquantized inputs and saves no memory. What the export loses is logged and kept in export.json; what
    it costs in accuracy is in the documentation.
    """
    from quad_modifiers.checkpoint.dense import export_dense
    from quad_modifiers.checkpoint.export import export_compressed_tensors
    from quad_modifiers.records.inventory import read_inventory

    dense = format is Format.dense
    if dense and (group_size is not None or online_hadamard):
        raise ValueError("--group-size and --online-hadamard belong to --format compressed-tensors; leave them out")
    if not dense and dtype is not None:
        raise ValueError("--dtype belongs to --format dense; compressed-tensors keeps the dtype of the checkpoint")
    with log_on_stderr():
        if dense:
            export_dense(checkpoint, output, dtype=None if dtype is None else dtype.value)
        else:
            export_compressed_tensors(checkpoint, output, group_size=group_size, online_hadamard=online_hadamard)
    before, after = read_inventory(checkpoint), read_inventory(output)
    rows = [("from", checkpoint, before), ("to", output, after)]
    print_table(
        ("", "checkpoint", "format", "size"), [(w, str(f), held.format, file_size(held.total)) for w, f, held in rows]
    )
