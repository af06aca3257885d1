"""Compressed toys on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

PROBE = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(99))


class Compressed(NamedTuple):
    """A compressed model and its checkpoint."""

    model: PreTrainedModel
    folder: Path
    logits: torch.Tensor


@torch.no_grad()
def _logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(PROBE).logits


@pytest.fixture(scope="session")
def logits_of() -> Callable[[PreTrainedModel], torch.Tensor]:
    """Return `logits_of(model)` for a fixed input."""
    return _logits_of


@pytest.fixture(scope="session")
def compress_toy(make_quad_toy: Callable[..., tuple[PreTrainedModel, Path]]) -> Callable[..., Compressed]:
    """Return `compress_toy(...)`, which adds the logits of a fixed input to what `make_quad_toy` returns."""

    def run(*arguments: Any, **named: Any) -> Compressed:
        model, folder = make_quad_toy(*arguments, **named)
        return Compressed(model, folder, _logits_of(model))

    return run


@pytest.fixture(scope="session")
def compressed(compress_toy: Callable[..., Compressed]) -> Compressed:
    """A llama toy with every feature of the format; never write to its folder."""
    return compress_toy(attention_bias=True)
