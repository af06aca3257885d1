"""Options that several commands have: of a text and its windows, of models that are loaded, of what is written."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from quad_modifiers.output_folder import user_path

if TYPE_CHECKING:
    from quad_modifiers.checkpoint.whole_model import LoadingOptions

TEXT_FORMS = (
    "a text or jsonl file, or a name in `datasets`, of text or of conversations (messages). Several with weights: give "
    "the option again, A:0.7 and B:0.3. By default Wikipedia articles that gensim ships and modules of Python's "
    "standard library, of the halves that calibrate."
)
Sources: TypeAlias = list[str] | None
SOURCE_FORM = "NAME[:WEIGHT]"


def expanded(value: Path | None) -> Path | None:
    """Returns a path with `~` as the home folder: a shell leaves it as it is in `--output=~/out`."""
    return None if value is None else user_path(value)


def all_expanded(values: list[Path]) -> list[Path]:
    """Returns paths with `~` as the home folder."""
    return [user_path(value) for value in values]


TextColumn: TypeAlias = Annotated[str, typer.Option(help="Column of the text or the conversations in the data set.")]
Split: TypeAlias = Annotated[str | None, typer.Option(help="Split of a data set from `datasets`.")]
DatasetConfig: TypeAlias = Annotated[str | None, typer.Option(help="Configuration of a data set from `datasets`.")]
SeqLength: TypeAlias = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
CheckpointOutput: TypeAlias = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="OUT", help="Folder for the checkpoint; new or empty.", callback=expanded),
]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Of the choice of windows.")]


class Dtype(StrEnum):
    """The dtypes that weights are loaded in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class OffloadTo(StrEnum):
    """Where a compression keeps what it does not work on."""

    auto = "auto"
    disk = "disk"
    memory = "memory"


_HUB = "Branch, tag or commit of the Hub id given as"
Revision: TypeAlias = Annotated[str | None, typer.Option(metavar="REF", help=f"{_HUB} MODEL or OUT.")]
BaselineRevision: TypeAlias = Annotated[str | None, typer.Option(metavar="REF", help=f"{_HUB} --baseline.")]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a model or its tokenizer brings along.")
]
LoadingDtype: TypeAlias = Annotated[
    Dtype, typer.Option("--dtype", help="Load weights in this dtype; in that of the files by default.")
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|...", help="Where to compute; the GPU if there is one by default.")
]
CacheDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for models from the Hub, in place of the usual cache.", callback=expanded),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def loading(
    revision: str | None, trust_remote_code: bool, dtype: Dtype, device: str | None, cache_dir: Path | None
) -> "LoadingOptions":
    """Returns the options of loading as the Python functions take them.

    Raises:
        ValueError: if the device is none of this machine's.
    """
    from quad_modifiers.checkpoint.whole_model import LoadingOptions

    return LoadingOptions(revision, trust_remote_code, dtype.value, device, cache_dir)


def recipe_names(incomplete: str) -> list[str]:
    """Returns the recipes whose name begins so; for the shell's completion."""
    from quad_modifiers.recipe.resolve import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]
