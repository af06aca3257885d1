"""Weights and inputs that are zero, alike or tiny are compressed like any others, and stay numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")
from quad_modifiers import oneshot

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 8, basis: BASIS}
    DynamicActQuant: {u_type_bits: 8, d_type_bits: 8}
    EmbeddingHeadQuant: {}
    OutlierSplitGPTQ: {bits: 8, sweeps: 1, error_correction: 0.4, scale_candidates: [1.0, 0.9]}
"""
IDS = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))


def zeros(*names: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name in names:
            model.get_parameter(name).zero_()

    return change


def alike(model: nn.Module) -> None:
    embedding = model.get_parameter("model.embed_tokens.weight")
    embedding.copy_(embedding[5].expand_as(embedding))


def tiny(model: nn.Module) -> None:
    model.get_parameter("model.layers.1.self_attn.v_proj.weight").mul_(1e-6)
    model.get_parameter("model.embed_tokens.weight").mul_(1e-3)


CHANGES = {
    "channels": zeros("model.layers.1.mlp.up_proj.weight"),
    "values": zeros("model.layers.1.self_attn.v_proj.weight"),
    "norm": zeros("model.layers.0.input_layernorm.weight"),
    "whole block": zeros("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "alike": alike,
    "tiny": tiny,
}


def compress(model: Any, recipe: str, **arguments: Any) -> Any:
    return oneshot(model, recipe, dataset=IDS, num_calibration_samples=8, max_seq_length=48, **arguments)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS[:2]).logits.float()


@pytest.mark.parametrize(("dtype", "basis"), [(torch.float32, "extended"), (torch.float16, "square")], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_compressed_like_any_other(change, dtype, basis, make_toy, tmp_path: Path) -> None:
    model = make_toy(dtype=dtype)
    with torch.no_grad():
        change(model)
    wanted = logits(model)
    compressed = compress(model, RECIPE.replace("BASIS", basis), output_dir=tmp_path / "out")
    found = logits(compressed)
    error = float((found - wanted).norm() / wanted.norm())
    print(f"relative error {error:.4f}")
    assert error < 0.05
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), found)


def test_a_model_of_zeros(make_toy) -> None:
    model = make_toy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not logits(compress(model, RECIPE.replace("BASIS", "square"))).any()


def test_a_projection_that_the_dtype_cannot_hold_names_the_tensor(make_toy) -> None:
    model = make_toy(dtype=torch.float16)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(6e4)
        model.get_parameter("model.layers.1.post_attention_layernorm.weight").fill_(100)
        model.get_parameter("model.layers.1.mlp.gate_proj.weight").zero_()
    recipe = "quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 0}\n"
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.* does not fit torch\.float16 after the projection"):
        compress(model, recipe)
