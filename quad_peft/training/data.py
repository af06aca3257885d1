"""Token samples to train and to validate on, from text of any kind."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from quad_modifiers.data.chat import ChatDocuments
from quad_modifiers.data.mixture import Weighted, mixture_of, shares_of
from quad_modifiers.data.readable import readable
from quad_modifiers.data.sources import Purpose, Reading, Resolved, TokenRows, kind_of, resolve, source_name
from quad_modifiers.data.used import SourceUsed, describe_sources
from quad_modifiers.data.windows import stream_windows, token_stream
from quad_peft.training.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PURPOSE = Purpose(
    "training", usual_splits=("train", "calibration"), split_option="split", config_option="dataset_config"
)
_MINIMUM = 2  # samples: one to train and one to validate on


@dataclass(frozen=True)
class TrainingData:
    """Samples of token ids.

    Attributes:
        samples: `[tokens]` each, int64, on the CPU.
        validation: number of samples, the last ones, that are never trained on.
        source: name of the text, for readers.
    """

    samples: list[torch.Tensor]
    validation: int
    source: str

    @property
    def training_samples(self) -> "Samples":
        """Those to train on."""
        return Samples(self.samples, range(len(self.samples) - self.validation))

    @property
    def validation_samples(self) -> "Samples":
        """Those to validate on."""
        return Samples(self.samples, range(len(self.samples) - self.validation, len(self.samples)))

    @property
    def fingerprint(self) -> str:
        """A hash of all token ids, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little") + sample.numpy().tobytes())
        return digest.hexdigest()[:16]


class Samples(Dataset[dict[str, Any]]):
    """Some of the samples; each knows its place among all, by which a teacher finds what it said about it."""

    def __init__(self, samples: Sequence[torch.Tensor], places: range) -> None:
        self._samples, self._places = samples, places

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The token ids, `[tokens]`, and the place among all samples."""
        place = self._places[index]
        return {"input_ids": self._samples[place], "place": place}


@dataclass(frozen=True)
class Collator:
    """Makes a batch; samples of different lengths are padded on the right.

    Attributes:
        pad_token: id in the padding; the attention mask and the labels leave it out.
    """

    pad_token: int = 0

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids` and `labels`, `[batch, tokens]`, `place`, `[batch]`; with padding, `attention_mask`."""
        rows = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_token),
            "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED),
            "place": torch.tensor([sample["place"] for sample in samples]),
        }
        if len({len(row) for row in rows}) > 1:
            batch["attention_mask"] = (batch["labels"] != IGNORED).long()
        return batch


def training_data(
    source: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    length: int,
    samples: int | None = None,
    packed: bool = True,
    validation: float = 0.05,
    text_column: str = "text",
    split: str | None = None,
    dataset_config: str | None = None,
    seed: int = 0,
) -> TrainingData:
    """Cuts text into samples.

    `source` is any data set of `quad_modifiers.data.calibration_windows`, mixtures included, None for the same articles
    and modules, or a list of `[tokens]`; token ids `[tokens]` are cut into windows. With `packed`, so is one stream of
    all documents, into windows of exactly `length`; otherwise every document is a sample, cut at `length`. Every token
    is trained on, in conversations those of all speakers. At most `samples` are drawn at random, or the first of a
    DataLoader. Validated on is the share `validation`, the last ones of the text, at least one. Of a mixture every
    source gives its share, to training and to validation; without `samples`, as many as the shortest allows.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation ({validation}) is a share of the samples, above 0 and below 1")
    if length < 2:
        raise ValueError(f"length ({length}) must be at least 2 tokens: one is given, the others are predicted")
    if samples is not None and samples < _MINIMUM:
        raise ValueError(f"samples ({samples}) must be at least {_MINIMUM}: one to train and one to validate on")
    reading = Reading(_PURPOSE, text_column, split, dataset_config, tokenizer, seed=seed)
    parts = mixture_of(source)
    if samples is not None and samples < _MINIMUM * len(parts):
        raise ValueError(f"samples ({samples}) must be at least {_MINIMUM} for each of the {len(parts)} sources")
    counts = shares_of(parts, samples) if samples is not None and len(parts) > 1 else [samples] * len(parts)
    found = [_read(part, reading, length, count, packed) for part, count in zip(parts, counts, strict=True)]
    if len(parts) > 1 and samples is None:
        total = int(min(len(each.rows) / each.part.share for each in found))
        counts = list(shares_of(parts, max(total, len(parts))))
    training, held = [], []
    for each, count in zip(found, counts, strict=True):
        last = max(1, round(validation * min(len(each.rows), count or len(each.rows))))
        drawn = _drawn(each.rows, count, last, seed)
        training.append(drawn[:-last])
        held.append(drawn[-last:])
    used = [each.used([*rows, *last]) for each, rows, last in zip(found, training, held, strict=True)]
    kept = _interleaved(training)
    validated = [row for rows in held for row in rows]
    return TrainingData([*kept, *validated], len(validated), describe_sources(used))


@dataclass(frozen=True)
class _Read:
    """The samples of one source, before any are drawn."""

    part: Weighted
    found: Resolved
    rows: list[torch.Tensor]

    def used(self, rows: list[torch.Tensor]) -> SourceUsed:
        tokens = sum(len(row) for row in rows)
        return SourceUsed(source_name(self.part.source), kind_of(self.found), self.part.share, None, len(rows), tokens)


def _read(part: Weighted, reading: Reading, length: int, count: int | None, packed: bool) -> _Read:
    tokens = None if count is None else count * length
    found = resolve(part.source, replace(reading, tokens=tokens))
    rows = [row[:length] for row in _rows(found, reading.tokenizer, length, count, packed) if len(row) > 1]
    if isinstance(found, ChatDocuments):
        found.report_refused()
    if len(rows) < _MINIMUM:
        tokens = sum(len(row) for row in rows)
        raise ValueError(
            f"{source_name(part.source)} gives {len(rows)} samples of up to {length} tokens ({tokens} tokens), but at "
            f"least {_MINIMUM} are needed, one to train and one to validate on; give more text, or a smaller length"
        )
    return _Read(part, found, rows)


def _interleaved(sources: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Returns the samples of all sources, each spread evenly over the whole."""
    placed = [((index + 0.5) / len(rows), row) for rows in sources for index, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda each: each[0])]


def _drawn(rows: list[torch.Tensor], samples: int | None, held: int, seed: int) -> list[torch.Tensor]:
    """All rows, or `samples` of them: the last `held` and a random draw of those before, in the order of the text."""
    if samples is None or samples >= len(rows):
        return rows
    generator = torch.Generator().manual_seed(seed)
    before = len(rows) - held
    chosen = torch.randperm(before, generator=generator)[: samples - held].sort().values.tolist()
    return [rows[index] for index in chosen] + rows[before:]


def _rows(
    found: Resolved,
    tokenizer: "PreTrainedTokenizerBase | None",
    length: int,
    samples: int | None,
    packed: bool,
) -> Iterable[torch.Tensor]:
    """The samples of `found`, tokenized where it is text; no more than `samples` only where their order was chosen."""
    if isinstance(found, TokenRows):
        return islice(found.rows, samples) if found.ordered else found.rows
    if isinstance(found, torch.Tensor):
        return stream_windows(found, length)
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, and there is none beside the checkpoint; save one there")
    if packed:
        return stream_windows(token_stream(tokenizer, found), length)
    kept = [text for text in readable(found) if text.strip()]
    if not kept:
        return []
    chat = isinstance(found, ChatDocuments)  # the template has the special tokens already
    encoding = tokenizer(
        kept, truncation=True, max_length=length, return_attention_mask=False, add_special_tokens=not chat
    )
    return [torch.tensor(ids, dtype=torch.int64) for ids in encoding["input_ids"]]
