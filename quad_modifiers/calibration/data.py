"""The windows of token ids that calibrate a model, from whatever the user has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.data import DataLoader

from quad_modifiers.calibration import sources
from quad_modifiers.text.wikipedia import wikipedia_articles
from quad_modifiers.text.windows import token_stream

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CalibrationSource: TypeAlias = (
    "str | Path | Dataset | DatasetDict | Sequence[str] | torch.Tensor | DataLoader[dict[str, torch.Tensor]] | None"
)

# Fewer windows than asked are used, with a warning, down to these; below them a Gram or Hessian means nothing.
_MINIMUM_WINDOWS = 4
_MINIMUM_TOKENS = 1024
# Larger data sets are sampled by document before anything is tokenized: this many characters at least, or this many
# per token asked for.
_CHARACTER_LIMIT = 8_000_000
_CHARACTERS_PER_TOKEN = 32


def calibration_windows(
    dataset: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_samples: int,
    sequence_length: int,
    text_column: str = "text",
    splits: sources.Splits | None = None,
    dataset_config_name: str | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return up to `num_samples` windows of token ids.

    Text is tokenized as one stream and cut into windows of exactly `sequence_length`, drawn at random with `seed`.
    Samples that are tokenized already stay samples: cut to `sequence_length`, padding removed, drawn at random where
    there are more than asked. A DataLoader's samples are taken as they come, uncut.

    Args:
        dataset: None for the first half of the Wikipedia articles in gensim's package; a local .txt, .jsonl, .csv or
            .parquet file; a `datasets` name or folder; a Dataset or DatasetDict with a text column or `input_ids`;
            a list of strings; token ids, [tokens] or [samples, tokens]; or a DataLoader of dicts with `input_ids`.
        tokenizer: the model's tokenizer; None is enough for token ids.
        num_samples: windows wanted.
        sequence_length: tokens per window.
        text_column: the column that holds the text.
        splits: the split of a `datasets` name or DatasetDict ("train[:5%]", or {"calibration": ...}).
        dataset_config_name: the configuration of a `datasets` name.
        seed: which documents and windows are drawn.

    Returns:
        One int64 tensor [1, length] per window, on the CPU.

    Raises:
        TypeError: `dataset` is of no kind listed, or holds something else than text or token ids.
        ValueError: no data; fewer than four windows or 1024 tokens where more were asked; a missing column or split.
        FileNotFoundError: no such local file.
        ImportError: a package that the data set needs is not installed.
    """
    if num_samples < 1 or sequence_length < 2:
        raise ValueError(
            f"num_samples must be at least 1 and sequence_length at least 2, not {num_samples} and {sequence_length}"
        )
    dataset = _resolve_names(dataset, text_column, splits, dataset_config_name)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dataset, DataLoader):
        rows = list(islice(sources.loader_rows(dataset), num_samples))
    elif (tokenized := _tokenized_rows(dataset, sequence_length)) is not None:
        rows = _drawn([row[:sequence_length] for row in tokenized], num_samples, generator)
    else:
        texts = _texts_of(dataset, text_column)
        if tokenizer is None:
            raise ValueError("calibration text needs a tokenizer; give one, or give token ids instead of text")
        sample = _sampled_documents(texts, num_samples * sequence_length, generator)
        rows = _drawn(_windows(token_stream(tokenizer, sample), sequence_length), num_samples, generator)
    _check_amount(rows, num_samples, sequence_length)
    return [row.unsqueeze(0) for row in rows]


def as_dataloader(batches: Iterable[torch.Tensor]) -> DataLoader[dict[str, torch.Tensor]]:
    """Return a DataLoader that yields each of `batches` as llm-compressor expects it.

    Args:
        batches: token ids, [1, length] each; the lengths may differ.

    Returns:
        A loader of dicts with `input_ids` and an `attention_mask` of ones, both [1, length], one window a batch.
    """
    samples = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    # batch_size None: the windows are batches already, no collation.
    return DataLoader(samples, batch_size=None)  # a list is a map-style data set


def _resolve_names(
    dataset: CalibrationSource, text_column: str, splits: sources.Splits | None, config_name: str | None
) -> Any:
    """Return `dataset` with None, file names and hub names replaced by what they stand for."""
    if dataset is None:
        logger.info(
            "No calibration data set was given: calibrating with the first half of the English Wikipedia articles in "
            "gensim's package. The second half is held out for evaluation and never calibrates."
        )
        return wikipedia_articles("calibration")
    if isinstance(dataset, str | Path):
        if sources.is_local_file(dataset):
            return sources.read_local(dataset, text_column)
        dataset = sources.load_named(dataset, config_name, splits)
    return sources.single_split(dataset, splits) if _is_datasets_object(dataset) else dataset


def _is_datasets_object(dataset: object) -> bool:
    """Return whether `dataset` is a Dataset, or a DatasetDict or plain dict of them, without importing `datasets`."""
    return isinstance(dataset, dict) or (hasattr(dataset, "column_names") and hasattr(dataset, "features"))


def _tokenized_rows(dataset: Any, sequence_length: int) -> list[torch.Tensor] | None:
    """Return the samples of data that is tokenized already (a stream is cut into windows), None where it is text."""
    if isinstance(dataset, torch.Tensor) and dataset.dim() == 1:
        stream = next(sources.unpadded(dataset, None, "the calibration tensor"), torch.empty(0, dtype=torch.int64))
        return _windows(stream, sequence_length)
    if isinstance(dataset, torch.Tensor):
        return list(sources.unpadded(dataset, None, "the calibration tensor"))
    if _is_datasets_object(dataset):
        return list(sources.dataset_rows(dataset)) if "input_ids" in (dataset.column_names or ()) else None
    if isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], torch.Tensor):
        return [row for sample in dataset for row in sources.unpadded(sample, None, "a calibration sample")]
    return None


def _texts_of(dataset: Any, text_column: str) -> Sequence[str]:
    """Return the documents of `dataset`, or raise naming what is accepted."""
    if _is_datasets_object(dataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return sources.dataset_texts(dataset, text_column)
    if isinstance(dataset, Sequence) and not isinstance(dataset, bytes):
        return dataset
    raise TypeError(
        f"a calibration data set cannot be a {type(dataset).__name__}; give None, a file or `datasets` name, a Dataset "
        "(not a streaming one), a list of strings, a tensor of token ids or a DataLoader of dicts with 'input_ids'"
    )


def _sampled_documents(texts: Sequence[str], tokens: int, generator: torch.Generator) -> list[str]:
    """Return all documents, or as many drawn at random as give `tokens` tokens several times over."""
    limit = max(_CHARACTER_LIMIT, _CHARACTERS_PER_TOKEN * tokens)
    order = torch.randperm(len(texts), generator=generator).tolist()
    drawn: dict[int, str] = {}
    characters = 0
    for index in order:
        drawn[index] = texts[index]
        if not isinstance(drawn[index], str):
            raise TypeError(f"every text must be a str, but text {index} is a {type(drawn[index]).__name__}")
        characters += len(drawn[index])
        if characters >= limit:
            break
    return [drawn[index] for index in sorted(drawn)]


def _windows(stream: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Return the complete windows of `stream`, at least one."""
    count = stream.numel() // length
    if count == 0:
        raise ValueError(
            f"the calibration data has {stream.numel()} tokens, not enough for one window of {length}; give more text, "
            "or lower sequence_length"
        )
    return list(stream[: count * length].view(count, length))


def _drawn(rows: list[torch.Tensor], count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return `count` of `rows` drawn at random without replacement, all of them where there are no more."""
    if len(rows) <= count:
        return rows
    return [rows[index] for index in torch.randperm(len(rows), generator=generator)[:count].tolist()]


def _check_amount(rows: list[torch.Tensor], num_samples: int, sequence_length: int) -> None:
    """Warn where there are fewer windows than asked, raise where too few to calibrate with."""
    if not rows:
        raise ValueError("the calibration data set is empty: not one token; give a data set with text in it")
    tokens = sum(row.numel() for row in rows)
    if len(rows) >= num_samples:
        return
    found = (
        f"the calibration data has {len(rows)} windows ({tokens} tokens) of the {num_samples} x {sequence_length} asked"
    )
    if len(rows) < _MINIMUM_WINDOWS or tokens < _MINIMUM_TOKENS:
        raise ValueError(
            f"{found}; at least {_MINIMUM_WINDOWS} windows and {_MINIMUM_TOKENS} tokens are needed. Give more text, or "
            "lower num_samples or sequence_length"
        )
    logger.warning("%s; all of them are used. More data may give a better result.", found)
