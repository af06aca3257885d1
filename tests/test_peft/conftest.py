"""A toy QUAD checkpoint, loaded anew for each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("peft")

IDS = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: {rank}, seed: {seed}, o_proj_rank_per_head: {per_head}, down_proj_rank: {down}}}
    DynamicActQuant: {{u_type_bits: 4, d_type_bits: 8}}
    OutlierSplitGPTQ: {{bits: 4}}
"""


@pytest.fixture(scope="session")
def quad_folder(
    tmp_path_factory: pytest.TempPathFactory, make_toy: Callable[..., PreTrainedModel]
) -> Callable[..., Path]:
    """Return `quad_folder(rank=8, seed=0, per_head=2, down=4, model_type="llama")`: a shared, read-only checkpoint."""
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    made: dict[Any, Path] = {}

    def folder(rank: int = 8, seed: int = 0, per_head: int = 2, down: int = 4, model_type: str = "llama") -> Path:
        key = (rank, seed, per_head, down, model_type)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quad") / "out"
            oneshot(
                make_toy(model_type),
                RECIPE.format(rank=rank, seed=seed, per_head=per_head, down=down),
                dataset=IDS,
                num_calibration_samples=8,
                max_seq_length=48,
                output_dir=made[key],
            )
        return made[key]

    return folder


@pytest.fixture
def load(quad_folder: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    """Return `load(**quad_folder_arguments)`: the checkpoint in a new model, float32."""

    def loaded(dtype: torch.dtype = torch.float32, **arguments: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(quad_folder(**arguments), dtype=dtype)

    return loaded


@pytest.fixture(scope="session")
def compress() -> Callable[..., PreTrainedModel]:
    """Return `compress(model, *modifiers, **oneshot_arguments)`, which changes and returns the model."""
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    def run(model: PreTrainedModel, *modifiers: Any, **arguments: Any) -> PreTrainedModel:
        given = {"dataset": IDS, "num_calibration_samples": 8, "max_seq_length": 48, **arguments}
        return oneshot(model, list(modifiers), **given)

    return run
