"""Turns what a user calls a data set into documents, a stream of tokens, or rows of token ids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.data import DataLoader

from quad_modifiers.data.calibration_texts import calibration_texts
from quad_modifiers.data.local_files import LOCAL_SUFFIXES, check_column, local_texts
from quad_modifiers.data.token_rows import dataset_rows, loader_rows, unpadded
from quad_modifiers.data.unused_options import check_choices_used, check_column_used

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Splits: TypeAlias = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class TokenRows:
    """Samples that are tokenized already.

    Attributes:
        rows: [tokens] each, int64, on the CPU, without padding; can be iterated once.
        ordered: True for the rows of a DataLoader, which has chosen them and their order, and may never end.
    """

    rows: Iterable[torch.Tensor]
    ordered: bool = False


Resolved: TypeAlias = Sequence[str] | torch.Tensor | TokenRows
"""Documents, which may be read from disk as they are indexed; one stream of token ids, [tokens], int64, on the CPU; or
samples."""


@dataclass(frozen=True)
class Purpose:
    """The purpose of the data: its name and options in errors, and the split that is taken by default.

    Attributes:
        name: name of the split, such as "calibration".
        usual_splits: splits to look for where none is named; the first found is taken.
        split_option: the caller's name for the choice of a split.
        config_option: the caller's name for the configuration of a named data set.
    """

    name: str
    usual_splits: tuple[str, ...]
    split_option: str
    config_option: str


def resolve(
    source: Any, purpose: Purpose, *, text_column: str, splits: Splits | None, config_name: str | None
) -> Resolved:
    """Returns the text or token ids that `source` names.

    `source` is any data set of `calibration_windows`, or a list of token ids [tokens]. `splits` may also be a list of
    one, or a mapping whose key is the first of the purpose's usual splits. The errors are those of
    `calibration_windows`.
    """
    check_column_used(source, text_column)
    choices = {purpose.split_option: splits, purpose.config_option: config_name}
    check_choices_used(source, choices, isinstance(source, (str, Path)) and is_local_file(source))
    if source is None:
        return calibration_texts()
    if isinstance(source, str | Path):
        if is_local_file(source):
            return local_texts(source, text_column)
        source = _load_named(source, config_name, splits, purpose)
    if isinstance(source, DataLoader):
        return TokenRows(loader_rows(source), ordered=True)
    if isinstance(source, torch.Tensor):
        rows = unpadded(source, None, f"the {purpose.name} tensor")
        return TokenRows(rows) if source.dim() != 1 else next(rows, torch.empty(0, dtype=torch.int64))
    if isinstance(source, dict):  # a DatasetDict is one
        source = _single_split(source, splits, purpose)
    if hasattr(source, "column_names") and hasattr(source, "features"):  # a Dataset, without importing the package
        return _of_dataset(source, text_column, purpose)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return _of_sequence(source, purpose)
    raise _not_accepted(source, purpose)


def is_local_file(name: str | Path) -> bool:
    """Returns whether `name` means a text file here, rather than a data set of the hub or a folder of one."""
    path = Path(name).expanduser()
    return path.is_file() or (path.suffix.lower() in LOCAL_SUFFIXES and not path.is_dir())


def _load_named(name: str | Path, config_name: str | None, splits: Splits | None, purpose: Purpose) -> "Dataset":
    """Returns the named data set, from the hub, its local cache or a local folder."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"loading the data set {str(name)!r} needs the package datasets; install it with "
            "`pip install quad-modifiers[compress]`"
        ) from error
    split = _chosen_split(splits, purpose)
    try:
        loaded = load_dataset(str(name), config_name, split=split)
    except Exception as error:
        # Whatever the loader raises (network, authentication, unknown name), the user needs the same three remedies.
        raise ValueError(
            f"{str(name)!r} is neither a local file nor a data set that can be loaded ({type(error).__name__}: "
            f"{error}); correct the name, the {purpose.config_option} or the {purpose.split_option}, or give a local "
            ".txt or .jsonl file"
        ) from error
    return _single_split(loaded, None, purpose)


def _chosen_split(splits: Splits | None, purpose: Purpose) -> str | None:
    """Returns the one split that `splits` names: a string, a list of one, or the purpose's entry of a mapping."""
    if splits is None or isinstance(splits, str):
        return splits
    if isinstance(splits, Mapping):
        if purpose.usual_splits[0] in splits:
            return splits[purpose.usual_splits[0]]
        splits = list(splits.values())
    if len(splits) != 1:
        raise ValueError(
            f"{purpose.split_option} must name one {purpose.name} split, not {list(splits)}; for example "
            f"{purpose.split_option}='train[:5%]'"
        )
    return splits[0]


def _single_split(dataset: "Dataset | DatasetDict", splits: Splits | None, purpose: Purpose) -> "Dataset":
    """Returns the split that `splits` names; without it, the first of the usual ones, or the only one."""
    if not isinstance(dataset, Mapping):
        return dataset
    wanted = _chosen_split(splits, purpose)
    only = list(dataset) if len(dataset) == 1 else []
    candidates = [wanted] if wanted is not None else [*purpose.usual_splits, *only]
    for name in candidates:
        if name in dataset:
            return dataset[name]
    raise ValueError(
        f"the data set has the splits {sorted(dataset)}, none of them {candidates}; name one with "
        f"{purpose.split_option}"
    )


def _of_dataset(dataset: "Dataset", text_column: str, purpose: Purpose) -> Sequence[str] | TokenRows:
    if "input_ids" in (dataset.column_names or ()):
        return TokenRows(dataset_rows(dataset))
    if not hasattr(dataset, "__len__"):
        raise _not_accepted(dataset, purpose)
    check_column(text_column, dataset.column_names, "the data set")
    column: Sequence[str] = dataset[text_column]
    if len(column) and not isinstance(column[0], str):
        raise ValueError(
            f"the column {text_column!r} must hold strings, but its first row is a {type(column[0]).__name__}"
        )
    return column


def _of_sequence(source: Sequence[Any], purpose: Purpose) -> Sequence[str] | TokenRows:
    if source and isinstance(source[0], torch.Tensor):
        where = f"a {purpose.name} sample"
        return TokenRows(row for sample in source for row in unpadded(sample, None, where))
    if source and not isinstance(source[0], str):
        found = type(source[0]).__name__
        raise TypeError(f"every text must be a str, but text 0 is a {found}; give strings, or tensors of token ids")
    return source


def _not_accepted(source: object, purpose: Purpose) -> TypeError:
    return TypeError(
        f"a {purpose.name} data set cannot be of type {type(source).__name__}; give None, a file or `datasets` name, a "
        "Dataset (not a streaming one), a list of strings, a tensor of token ids or a DataLoader of dicts with "
        "'input_ids'"
    )
