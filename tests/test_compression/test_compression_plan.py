"""`quad compress --dry-run`: what a compression will make and take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quad_modifiers
from quad_modifiers.compression_plan import plan_compression
from quad_modifiers.recipe import RecipeError

pytest.importorskip("llmcompressor")

RECIPE = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 16}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4, error_correction: 0.4, sweeps: 2, ignore: [up_proj, lm_head]}
"""
WINDOWS = {"num_calibration_samples": 6, "max_seq_length": 48}


def test_it_says_what_the_run_makes(toy_checkpoint, tmp_path: Path) -> None:
    """Every linear of the real result, by its layer; an ignored one stays as it is."""
    plan = plan_compression(toy_checkpoint("llama"), RECIPE, output_dir=tmp_path / "out", **WINDOWS)
    assert list(tmp_path.iterdir()) == []
    model = quad_modifiers.oneshot(toy_checkpoint("llama"), RECIPE, output_dir=tmp_path / "out", **WINDOWS)
    layers = model.config.num_hidden_layers
    original = AutoModelForCausalLM.from_pretrained(toy_checkpoint("llama"))
    shapes = {
        name.rpartition(".")[2]: tuple(module.weight.shape)
        for name, module in original.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    named = dict(model.model.layers[0].named_modules())
    for each in plan.linears:
        linear = next(module for name, module in named.items() if name.endswith(each.role))
        assert each.count == layers
        assert each.outlier == linear.split.rank
        assert (each.outputs, each.width) == shapes[each.role]
        assert (each.weight == "4 bits") == linear.is_quantized
        assert each.inputs == f"{linear.input_quantization.bits} bits, per token"
    weights = {each.role: each.weight for each in plan.linears}
    assert weights["up_proj"] == "float32"
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.7 * plan.checkpoint_bytes < written < 1.3 * plan.checkpoint_bytes  # scales are all there is in a toy
    assert plan.original_bytes == original.get_memory_footprint(return_buffers=False)


def test_products_are_counted(toy_checkpoint) -> None:
    """Against a count by hand for a recipe that rounds, with a projection that needs one pass."""
    recipe = RECIPE.replace("bits: 4, error", "method: rtn, error")
    plan = plan_compression(toy_checkpoint("llama"), recipe, **WINDOWS)
    config = json.loads((Path(toy_checkpoint("llama")) / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    linears = hidden * size * (heads + 2 * kv) + hidden * size * heads + 3 * hidden * inner
    by_token = linears + 2 * 48 * heads * size + hidden**2
    assert plan.products == 6 * 48 * layers * by_token


def test_without_ranks_nothing_is_measured_for_the_projection(toy_checkpoint) -> None:
    plan = plan_compression(
        toy_checkpoint("llama"), "quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 0}\n", **WINDOWS
    )
    assert plan.products == 0
    assert {(each.outlier, each.outlier_weight) for each in plan.linears} == {(0, "")}


def test_outliers_in_8_bits_and_scales_per_head(toy_checkpoint) -> None:
    recipe = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 1/8, basis: square, o_proj_rank_per_head: 1/8}
    DynamicActQuant: {outlier_bits: 8, o_proj_scale: head}
    OutlierSplitGPTQ: {outlier_bits: 8, ignore: [k_proj, lm_head]}
"""
    found = {each.role: each for each in plan_compression(toy_checkpoint("llama"), recipe, **WINDOWS).linears}
    assert found["o_proj"].inputs == "4 bits, per token and head"
    assert (found["q_proj"].inputs, found["q_proj"].outlier_weight) == ("4 bits, per token", "8 bits")
    assert (found["k_proj"].weight, found["k_proj"].outlier_weight) == ("float32", "float32")
    assert found["q_proj"].outlier == 8
    assert (found["down_proj"].outlier, found["down_proj"].outlier_weight) == (0, "")


def test_more_windows_take_more(toy_checkpoint) -> None:
    few, many = (
        plan_compression(toy_checkpoint("llama"), RECIPE, num_calibration_samples=count, max_seq_length=48)
        for count in (6, 600)
    )
    assert many.products > 10 * few.products
    assert many.memory_bytes > few.memory_bytes
    assert many.journal_bytes > few.journal_bytes
    assert many.checkpoint_bytes == few.checkpoint_bytes


def test_what_a_run_would_refuse_is_refused(toy_checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        plan_compression(toy_checkpoint("llama"), RECIPE, output_dir=tmp_path / "full")
    with pytest.raises(RecipeError, match="bits"):
        plan_compression(toy_checkpoint("llama"), RECIPE.replace("bits: 4, error", "bits: 3, error"))
    with pytest.raises(FileNotFoundError):
        plan_compression(str(tmp_path / "missing"), RECIPE)


def test_a_stock_quantizer(toy_checkpoint) -> None:
    recipe = "quad_stage:\n  quad_modifiers:\n    GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"
    plan = plan_compression(toy_checkpoint("llama"), recipe, **WINDOWS)
    assert {each.weight for each in plan.linears} == {"4 bits in groups of 128"}
    assert {each.inputs for each in plan.linears} == {"float32"}
