"""The windows of token ids that calibrate a model, from any kind of text or token ids."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.data import DataLoader

from quad_modifiers.data.calibration_texts import default_text_name
from quad_modifiers.data.chat import ChatDocuments
from quad_modifiers.data.mixture import Weighted, mixture_of, shares_of
from quad_modifiers.data.sources import Purpose, Reading, Resolved, Splits, TokenRows, kind_of, resolve, source_name
from quad_modifiers.data.used import CalibrationData, SourceUsed
from quad_modifiers.data.windows import stream_windows, token_stream

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CalibrationSource: TypeAlias = (
    "str | Path | Dataset | DatasetDict | IterableDataset | Sequence[str] | Sequence[list[dict[str, Any]]] "
    "| Sequence[tuple[Any, float]] | torch.Tensor | DataLoader[dict[str, torch.Tensor]] | None"
)

_PURPOSE = Purpose(
    "calibration", usual_splits=("calibration", "train"), split_option="splits", config_option="dataset_config_name"
)
# Fewer windows than asked are used, with a warning, down to these; below them a Gram or Hessian means nothing.
_MINIMUM_WINDOWS = 4
_MINIMUM_TOKENS = 1024
# Larger data sets are sampled by document before anything is tokenized: this many characters at least, or this many
# per token asked for.
CHARACTER_LIMIT = 8_000_000
_CHARACTERS_PER_TOKEN = 32


def calibration_windows(
    dataset: CalibrationSource,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    num_samples: int,
    sequence_length: int,
    text_column: str = "text",
    splits: Splits | None = None,
    dataset_config_name: str | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Returns up to `num_samples` windows of token ids.

    Text is tokenized as one stream and cut into windows of exactly `sequence_length`, drawn at random with `seed`.
    Conversations are rendered by the tokenizer's chat template and then are text. Samples that are tokenized already
    stay samples: cut to `sequence_length`, padding removed, drawn at random where there are more than asked. A
    DataLoader's samples are taken as they come, uncut. Of a mixture every source gives its share of the windows. Of a
    data set of the hub, and of any that streams, only as much is read as is needed.

    Args:
        dataset: None for `calibration_texts()`, Wikipedia articles and modules of Python's standard library; a
            local .txt, .jsonl, .csv or .parquet file; a `datasets` name or folder; a Dataset, IterableDataset or
            DatasetDict with a column of text, conversations or `input_ids`; a list of strings or of conversations;
            token ids, [tokens] or [samples, tokens]; or a DataLoader of dicts with `input_ids`. A mixture is a list of
            pairs of any of these and a weight, of strings "NAME:WEIGHT", or of names of files.
        tokenizer: the model's tokenizer; None is enough for token ids.
        num_samples: windows wanted.
        sequence_length: tokens per window.
        text_column: the column that holds the text or the conversations, which are lists of messages with role and
            content, or from and value. Where there is no "text", "messages" and "conversations" are looked for.
        splits: the split of a `datasets` name or DatasetDict ("train[:5%]", or {"calibration": ...}).
        dataset_config_name: the configuration of a `datasets` name.
        seed: seed that chooses documents and windows.

    Returns:
        One int64 tensor [1, length] per window, on the CPU.

    Raises:
        TypeError: if `dataset` is of no kind listed, or holds something other than text or token ids.
        ValueError: if there is no data, fewer than four windows or 1024 tokens where more were asked, or no such column
            or split; for conversations without a chat template; for weights that are not above 0.
        FileNotFoundError: if there is no such local file.
        ImportError: if a package that the data set needs is not installed.
    """
    reading = Reading(_PURPOSE, text_column, splits, dataset_config_name, tokenizer, seed=seed)
    return calibration_data(dataset, reading, num_samples=num_samples, sequence_length=sequence_length).windows


def calibration_reading(tokenizer: "PreTrainedTokenizerBase | None", **how: Any) -> Reading:
    """Returns a `Reading` for calibration; `how` are its fields."""
    return Reading(_PURPOSE, tokenizer=tokenizer, **how)


def calibration_data(
    dataset: CalibrationSource, reading: Reading, *, num_samples: int, sequence_length: int
) -> CalibrationData:
    """Returns the windows of `calibration_windows`, which documents arguments and errors, and what they are made of."""
    if num_samples < 1 or sequence_length < 2:
        raise ValueError(
            f"num_samples must be at least 1 and sequence_length at least 2, not {num_samples} and {sequence_length}"
        )
    if dataset is None:
        logger.info(
            "No calibration data set was given: calibrating with %s. The other halves are held out for evaluation and "
            "never calibrate.",
            default_text_name(),
        )
    parts = mixture_of(dataset)
    counts = shares_of(parts, num_samples) if len(parts) > 1 else [num_samples]
    generator = torch.Generator().manual_seed(reading.seed)
    rows, used = [], []
    for part, count in zip(parts, counts, strict=True):
        found = resolve(part.source, replace(reading, tokens=count * sequence_length))
        taken, texts = _rows(found, reading.tokenizer, count, sequence_length, generator)
        if len(parts) > 1 and len(taken) < count:
            logger.warning(
                "%s has %d windows of the %d that are its share; all of them are used",
                source_name(part.source),
                len(taken),
                count,
            )
        used.append(_used(part, found, taken, texts))
        rows += taken
    if len(parts) > 1:
        rows = [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
    _check_amount(rows, num_samples, sequence_length)
    for each in used if dataset is not None else ():
        logger.info("%s: %s, %d samples, %d tokens", each.name, each.kind, each.windows, each.tokens)
    return CalibrationData([row.unsqueeze(0) for row in rows], tuple(used))


def _used(part: Weighted, found: Resolved, rows: list[torch.Tensor], texts: int | None) -> SourceUsed:
    tokens = sum(row.numel() for row in rows)
    return SourceUsed(source_name(part.source), kind_of(found), part.share, texts, len(rows), tokens)


def as_dataloader(batches: Iterable[torch.Tensor]) -> DataLoader[dict[str, torch.Tensor]]:
    """Returns a DataLoader that yields each of `batches` as llm-compressor expects it.

    Args:
        batches: token ids, [1, length] each; the lengths may differ.

    Returns:
        A loader of dicts with `input_ids` and an `attention_mask` of ones, both [1, length], one window a batch.
    """
    samples = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    # batch_size None: the windows are batches already, no collation.
    return DataLoader(samples, batch_size=None)  # a list is a map-style data set


def _rows(
    found: Resolved,
    tokenizer: "PreTrainedTokenizerBase | None",
    count: int,
    length: int,
    generator: torch.Generator,
) -> tuple[list[torch.Tensor], int | None]:
    """Returns up to `count` samples of `found`, tokenized where it is text, drawn where there are more.

    With them the number of texts that were read, None for token ids.
    """
    if isinstance(found, TokenRows):
        if found.ordered:
            return list(islice(found.rows, count)), None
        return _drawn([row[:length] for row in found.rows], count, generator), None
    texts = None
    if not isinstance(found, torch.Tensor):
        if tokenizer is None:
            raise ValueError("calibration text needs a tokenizer; give one, or give token ids instead of text")
        documents = sampled_documents(found, count * length, generator)
        if isinstance(found, ChatDocuments):
            found.report_refused()
        found, texts = token_stream(tokenizer, documents), len(documents)
    windows = list(stream_windows(found, length))
    if not windows:
        raise ValueError(
            f"the calibration data has {found.numel()} tokens, not enough for one window of {length}; give more "
            "text, or lower sequence_length"
        )
    return _drawn(windows, count, generator), texts


def sampled_documents(
    texts: Sequence[str], tokens: int, generator: torch.Generator, character_limit: int = CHARACTER_LIMIT
) -> list[str]:
    """Returns all documents, or as many drawn at random as give `tokens` tokens several times over.

    Only documents that are drawn are read; below `character_limit` characters nothing is left out.
    """
    limit = max(character_limit, _CHARACTERS_PER_TOKEN * tokens)
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


def _drawn(rows: list[torch.Tensor], count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Returns one of each of `count` equal stretches of `rows`, in random order; all rows where there are no more.

    That way every kind of text is drawn in proportion to its share, for every seed.
    """
    if len(rows) <= count:
        return rows
    borders = [len(rows) * index // count for index in range(count + 1)]
    random = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    stretches = zip(pairwise(borders), random, strict=True)
    drawn = [rows[start + int(share * (end - start))] for (start, end), share in stretches]
    return [drawn[index] for index in torch.randperm(count, generator=generator).tolist()]


def _check_amount(rows: list[torch.Tensor], num_samples: int, sequence_length: int) -> None:
    """Warns where there are fewer windows than asked, raises where too few to calibrate with."""
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
