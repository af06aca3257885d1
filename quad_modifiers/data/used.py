"""What a calibration or an inspection was made of, for records and readers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quad_modifiers.data.sources import Kind


@dataclass(frozen=True)
class SourceUsed:
    """One source of the samples.

    Attributes:
        name: name of the source; of a file its last part.
        kind: "text", "chat" (rendered by the tokenizer's chat template) or "token ids".
        share: its share of the samples that were asked for.
        texts: number of texts or conversations that were read; None for token ids.
        windows: number of windows that were taken.
        tokens: number of tokens in them.
    """

    name: str
    kind: Kind
    share: float
    texts: int | None
    windows: int
    tokens: int


@dataclass(frozen=True)
class CalibrationData:
    """Windows of token ids and their sources.

    Attributes:
        windows: `[1, length]` each, int64, on the CPU.
        sources: where they come from.
    """

    windows: list[torch.Tensor]
    sources: tuple[SourceUsed, ...]


def describe_sources(sources: Sequence[SourceUsed]) -> str:
    """Returns sources as a phrase: the name alone of one with text, else also kinds and shares."""
    if len(sources) == 1 and sources[0].kind != "chat":
        return sources[0].name
    several = len(sources) > 1
    return "; ".join(f"{each.name} ({each.kind}{f', {100 * each.share:.0f} %' if several else ''})" for each in sources)
