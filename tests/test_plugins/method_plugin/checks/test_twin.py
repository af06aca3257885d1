"""A model family with fused linears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import BRANCH, QUANTIZE, Compress, logits_of, tokenizer_of_bytes
from quad_method_plugin.twin import TwinForCausalLM
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.loader import QuadQuantizationConfig

SPLITS = "rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 8"
PROJECTIONS = [
    f"SVDOutlierProjection: {{basis: {basis}, {splits}}}"
    for basis in ("extended", "square")
    for splits in ("rank: 8", SPLITS, f"{SPLITS}, online_rotation: []")
]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_projection_keeps_the_logits(projection: str, compress: Compress) -> None:
    made = compress(projection, model_type="twin")
    torch.testing.assert_close(made.logits, made.original, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


@pytest.mark.parametrize("basis", ["extended", "square"])
def test_a_full_recipe_reloads(basis: str, compress: Compress, tmp_path: Path) -> None:
    projection = f"SVDOutlierProjection: {{basis: {basis}, {SPLITS}}}"
    made = compress(projection, BRANCH, *QUANTIZE, "EmbeddingHeadQuant: {}", model_type="twin")
    assert made.error < 0.6
    assert set(made.quad["linears"]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert torch.equal(logits_of(model), made.logits)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), made.logits)


def test_it_becomes_a_stock_model(compress: Compress) -> None:
    made = compress(PROJECTIONS[1], BRANCH, "OutlierSplitGPTQ: {}", model_type="twin", name="twin")
    config = QuadQuantizationConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(made.folder, quantization_config=config)
    assert type(plain) is TwinForCausalLM
    torch.testing.assert_close(logits_of(plain), made.logits, rtol=1e-4, atol=1e-4)


def test_it_is_inspected_by_the_names_of_its_own_groups(compress: Compress, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from quad_modifiers.tools.inspection import inspect_model

    made = compress(PROJECTIONS[0], BRANCH, *QUANTIZE, model_type="twin")
    text = tmp_path / "text.txt"
    text.write_text("Seven wizards mixed a jug of liquid. " * 300)
    tokenizer_of_bytes().save_pretrained(made.folder)
    found = inspect_model(made.folder, tmp_path / "report", dataset=str(text), samples=2, eval_windows=1, seq_length=64)
    assert found.subject.groups == {"in": False, "out": True, "mlp_in": False, "mlp_out": True}
    assert {row.group for row in found.inputs} == found.subject.groups.keys()
    assert {surface.group for surface in found.surfaces} == {"in", "mlp_out"}


def test_its_outlier_weights_train(compress: Compress) -> None:
    made = compress(PROJECTIONS[1], *QUANTIZE, "OutlierLoRA: {batch_size: 2, validation: 0.3}", model_type="twin")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)
