"""Options that several commands have: those of a text and of the windows it is cut into."""

from typing import Annotated, TypeAlias

import typer

TEXT_FORMS = (
    "a text or jsonl file, or a name in `datasets`. By default Wikipedia articles that gensim ships and modules of "
    "Python's standard library, of the halves that calibrate."
)

TextColumn: TypeAlias = Annotated[str, typer.Option(help="Column of the text in the data set.")]
Split: TypeAlias = Annotated[str | None, typer.Option(help="Split of a data set from `datasets`.")]
DatasetConfig: TypeAlias = Annotated[str | None, typer.Option(help="Configuration of a data set from `datasets`.")]
SeqLength: TypeAlias = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Of the choice of windows.")]
