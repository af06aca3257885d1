"""A data set of the Hub read as a stream: no more of it than a calibration needs."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from quad_modifiers.data.chat import messages_of
from quad_modifiers.data.token_rows import dataset_rows

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_SHUFFLE_BUFFER = 1000  # rows
# So much is read per token that is asked for: enough to choose from.
_CHARACTERS_PER_TOKEN = 32
_TOKENS_PER_TOKEN = 8


def can_stream(name: str | Path, split: str | None) -> bool:
    """Returns whether a named data set is one of the Hub, and the split the whole of one: a stream has no slices."""
    text = str(name)
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).exists() and not (split and set("[+]") & set(split))


def open_stream(load: Any, name: str, config_name: str | None, split: str | None, seed: int) -> Any:
    """Returns a data set as a stream of shuffled rows, or a mapping of splits; None if it cannot be streamed.

    `load` is `datasets.load_dataset`. Without a connection the caller's ordinary way finds what is in the cache.
    """
    try:
        opened = load(name, config_name, split=split, streaming=True)
    except Exception as error:  # whatever the loader raises: the ordinary way says what is wrong
        logger.debug("%s cannot be streamed: %s", name, error)
        return None
    if isinstance(opened, Mapping):
        return {key: each.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) for key, each in opened.items()}
    return opened.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)


def is_stream(dataset: Any) -> bool:
    """Returns whether a data set is one of `datasets` that can only be iterated."""
    return hasattr(dataset, "features") and hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


def first_and_all(dataset: Any) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Returns the first row of a stream, empty if there is none, and all rows with it."""
    rows = iter(dataset)
    first = next(rows, None)
    return ({}, iter(())) if first is None else (first, chain([first], rows))


def read_column(rows: Iterable[Mapping[str, Any]], column: str, tokens: int) -> list[Any]:
    """Returns the values of a column, of as many rows as have characters enough for `tokens` tokens."""
    values, characters = [], 0
    for row in rows:
        value = row.get(column)
        if value is not None:
            values.append(value)
            characters += _length(value)
        if characters >= _CHARACTERS_PER_TOKEN * tokens:
            break
    return values


def read_token_rows(rows: Iterable[dict[str, Any]], tokens: int) -> Iterator[torch.Tensor]:
    """Yields rows of token ids, `[tokens]` each, several times as many tokens as are asked for."""
    read = 0
    for row in dataset_rows(rows):
        yield row
        read += row.numel()
        if read >= _TOKENS_PER_TOKEN * tokens:
            return


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    try:
        return sum(len(message["content"] or "") for message in messages_of(value))
    except ValueError:
        return 0
