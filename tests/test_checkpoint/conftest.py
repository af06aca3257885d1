"""Compressed toys on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

IDS = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
PROBE = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(99))

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""


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
def compress_toy(
    tmp_path_factory: pytest.TempPathFactory, make_toy: Callable[..., PreTrainedModel]
) -> Callable[..., Compressed]:
    """Return `compress_toy(recipe=RECIPE, model_type="llama", **make_toy_arguments)`."""
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    def run(recipe: Any = RECIPE, model_type: str = "llama", **arguments: Any) -> Compressed:
        folder = tmp_path_factory.mktemp("compressed") / "out"
        model = oneshot(
            make_toy(model_type, **arguments),
            recipe,
            dataset=IDS,
            num_calibration_samples=8,
            max_seq_length=48,
            output_dir=folder,
        )
        return Compressed(model, folder, _logits_of(model))

    return run


@pytest.fixture(scope="session")
def compressed(compress_toy: Callable[..., Compressed]) -> Compressed:
    """A llama toy with every feature of the format; never write to its folder."""
    return compress_toy(attention_bias=True)
