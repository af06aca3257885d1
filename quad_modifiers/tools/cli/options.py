"""Options that several commands have: those of a text and its windows, and of a checkpoint that is written."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from quad_modifiers.output_folder import user_path

TEXT_FORMS = (
    "a text or jsonl file, or a name in `datasets`. By default Wikipedia articles that gensim ships and modules of "
    "Python's standard library, of the halves that calibrate."
)


def expanded(value: Path | None) -> Path | None:
    """Returns a path with `~` as the home folder: a shell leaves it as it is in `--output=~/out`."""
    return None if value is None else user_path(value)


def all_expanded(values: list[Path]) -> list[Path]:
    """Returns paths with `~` as the home folder."""
    return [user_path(value) for value in values]


TextColumn: TypeAlias = Annotated[str, typer.Option(help="Column of the text in the data set.")]
Split: TypeAlias = Annotated[str | None, typer.Option(help="Split of a data set from `datasets`.")]
DatasetConfig: TypeAlias = Annotated[str | None, typer.Option(help="Configuration of a data set from `datasets`.")]
SeqLength: TypeAlias = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
CheckpointOutput: TypeAlias = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="OUT", help="Folder for the checkpoint; new or empty.", callback=expanded),
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Of the choice of windows.")]
