"""Turns what a user calls a data set into documents, a stream of tokens, or rows of token ids."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader

from quad_modifiers.data.calibration_texts import calibration_texts, default_text_name
from quad_modifiers.data.chat import ChatDocuments, is_conversation
from quad_modifiers.data.local_files import LOCAL_SUFFIXES, choose_column, local_values
from quad_modifiers.data.streaming import (
    can_stream,
    first_and_all,
    is_stream,
    open_stream,
    read_column,
    read_token_rows,
)
from quad_modifiers.data.token_rows import dataset_rows, loader_rows, unpadded
from quad_modifiers.data.unused_options import check_choices_used, check_column_used

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

Splits: TypeAlias = str | Sequence[str] | Mapping[str, str]
Kind: TypeAlias = Literal["text", "chat", "token ids"]


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
"""Documents, which may be read from disk or rendered as they are indexed; one stream of token ids, [tokens], int64, on
the CPU; or samples."""


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


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        purpose: what the data is for.
        text_column: column of the text; conversations in a column of their own are found without it.
        splits: the split of a `datasets` name or DatasetDict; may also be a list of one, or a mapping whose key is the
            first of the purpose's usual splits.
        config_name: the configuration of a `datasets` name.
        tokenizer: tokenizer whose chat template renders conversations.
        tokens: number of tokens that are needed; no more of a stream is read than gives them several times over. None
            for all.
        seed: seed that shuffles a stream.
    """

    purpose: Purpose
    text_column: str = "text"
    splits: Splits | None = None
    config_name: str | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    tokens: int | None = None
    seed: int = 0


def kind_of(found: Resolved) -> Kind:
    """Returns what a source held."""
    if isinstance(found, (torch.Tensor, TokenRows)):
        return "token ids"
    return "chat" if isinstance(found, ChatDocuments) else "text"


def source_name(source: Any) -> str:
    """Returns the name of a source for readers; of a path its last part alone."""
    if source is None:
        return default_text_name()
    if isinstance(source, (str, Path)):
        return Path(source).name if is_local_file(source) or os.path.exists(source) else str(source)
    return f"a {type(source).__name__}"


def resolve(source: Any, reading: Reading) -> Resolved:
    """Returns the text or token ids that `source` names.

    `source` is any data set of `calibration_windows` that is no mixture. Its errors are those of that function.
    """
    purpose = reading.purpose
    check_column_used(source, reading.text_column)
    choices = {purpose.split_option: reading.splits, purpose.config_option: reading.config_name}
    check_choices_used(source, choices, isinstance(source, (str, Path)) and is_local_file(source))
    if source is None:
        return calibration_texts()
    if isinstance(source, str | Path):
        if is_local_file(source):
            return _documents(local_values(source, reading.text_column), str(source), reading)
        source = _load_named(source, reading)
    if isinstance(source, DataLoader):
        return TokenRows(loader_rows(source), ordered=True)
    if isinstance(source, torch.Tensor):
        rows = unpadded(source, None, f"the {purpose.name} tensor")
        return TokenRows(rows) if source.dim() != 1 else next(rows, torch.empty(0, dtype=torch.int64))
    if isinstance(source, dict):  # a DatasetDict is one
        source = _single_split(source, reading.splits, purpose)
    if is_stream(source):
        return _of_stream(source, reading)
    if hasattr(source, "column_names") and hasattr(source, "features"):  # a Dataset, without importing the package
        return _of_dataset(source, reading)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return _of_sequence(source, reading)
    raise _not_accepted(source, purpose)


def is_local_file(name: str | Path) -> bool:
    """Returns whether `name` means a text file here, rather than a data set of the hub or a folder of one."""
    path = Path(name).expanduser()
    return path.is_file() or (path.suffix.lower() in LOCAL_SUFFIXES and not path.is_dir())


def _load_named(name: str | Path, reading: Reading) -> Any:
    """Returns the named data set, from the hub (as a stream, if `tokens` bounds it), cache or folder."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"loading the data set {str(name)!r} needs the package datasets; install it with "
            "`pip install quad-modifiers[compress]`"
        ) from error
    purpose, config_name = reading.purpose, reading.config_name
    split = _chosen_split(reading.splits, purpose)
    if reading.tokens is not None and can_stream(name, split):
        stream = open_stream(load_dataset, str(name), config_name, split, reading.seed)
        if stream is not None:
            return _single_split(stream, None, purpose)
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


def _of_dataset(dataset: "Dataset", reading: Reading) -> Sequence[str] | TokenRows:
    if "input_ids" in (dataset.column_names or ()):
        return TokenRows(dataset_rows(dataset))
    column = choose_column(reading.text_column, dataset.column_names, "the data set")
    return _documents(dataset[column], f"the column {column!r}", reading)


def _of_stream(dataset: Any, reading: Reading) -> Sequence[str] | TokenRows:
    """Returns the beginning of a data set that can only be iterated."""
    if reading.tokens is None:
        raise ValueError(
            f"a streaming data set may have no end: say how many {reading.purpose.name} samples to take, or give a "
            "data set that is no stream"
        )
    first, rows = first_and_all(dataset)
    if "input_ids" in first:
        return TokenRows(read_token_rows(rows, reading.tokens))
    column = choose_column(reading.text_column, list(first), "the data set")
    return _documents(read_column(rows, column, reading.tokens), f"the column {column!r}", reading)


def _documents(values: Sequence[Any], where: str, reading: Reading) -> Sequence[str]:
    """Returns the values of a column, which are texts or conversations."""
    first = next((value for value in values if value is not None), None)
    if first is None or isinstance(first, str):
        return values
    if is_conversation(first):
        return ChatDocuments(values, reading.tokenizer, where)
    raise ValueError(
        f"{where} must hold strings, or conversations (lists of messages with role and content, or from and value), "
        f"but its first row is a {type(first).__name__}"
    )


def _of_sequence(source: Sequence[Any], reading: Reading) -> Sequence[str] | TokenRows:
    purpose = reading.purpose
    if source and isinstance(source[0], torch.Tensor):
        where = f"a {purpose.name} sample"
        return TokenRows(row for sample in source for row in unpadded(sample, None, where))
    if source and is_conversation(source[0]):
        return ChatDocuments(source, reading.tokenizer, f"the {purpose.name} list")
    if source and not isinstance(source[0], str):
        found = type(source[0]).__name__
        raise TypeError(f"every text must be a str, but text 0 is a {found}; give strings, or tensors of token ids")
    return source


def _not_accepted(source: object, purpose: Purpose) -> TypeError:
    return TypeError(
        f"a {purpose.name} data set cannot be of type {type(source).__name__}; give None, a file or `datasets` name, a "
        "Dataset, a list of strings or of conversations, a tensor of token ids or a DataLoader of dicts with "
        "'input_ids'"
    )
