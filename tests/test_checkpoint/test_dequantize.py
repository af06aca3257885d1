"""A dequantized model is a stock model that computes what the QUAD model computes from unquantized inputs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.loader import QuadQuantizationConfig
from quad_modifiers.nn.quad_linear import QuadLinear

from .strangers import logits_without_us

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: {rank}, basis: {basis}, o_proj_rank_per_head: 2, down_proj_rank: 4}}
    DynamicActQuant: {{u_type_bits: 4, d_type_bits: 8}}
    {ends}
    OutlierSplitGPTQ: {{{weights}}}
"""
ENDS = "EmbeddingHeadQuant: {}"


def without_input_quantization(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, QuadLinear):
            module.quantize_input = False
            module.input_quantization = None
    return model


@pytest.mark.parametrize(
    ("model_type", "size", "basis", "rank", "weights", "ends", "stock_width"),
    [
        pytest.param("llama", "even", "square", 8, "bits: 4", "", 64, id="square"),
        pytest.param("llama", "even", "extended", 8, "bits: 4", "", 72, id="extended, heads divide"),
        pytest.param("llama", "even", "extended", 7, "bits: 4", "", 72, id="extended, padded"),
        pytest.param("qwen2", "odd", "extended", 11, "bits: 8", "", 95, id="qwen2 takes any width"),
        pytest.param("qwen3", "odder", "extended", 10, "symmetric: false", ENDS, 73, id="qwen3, zero points, ends"),
        pytest.param(
            "mistral", "odd", "square", 12, "method: rtn, ignore: [lm_head, down_proj]", ENDS, 84, id="partly"
        ),
    ],
)
def test_same_function(model_type, size, basis, rank, weights, ends, stock_width, compress_toy, logits_of) -> None:
    recipe = RECIPE.format(rank=rank, basis=basis, weights=weights, ends=ends)
    made = compress_toy(recipe, model_type, size=size, attention_bias=True, tie_word_embeddings=rank % 2 == 0)
    wanted = logits_of(without_input_quantization(made.folder))
    assert not torch.equal(wanted, made.logits)

    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.dequantize() is model
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    assert type(model).__module__.startswith("transformers.")
    assert type(model.config).__module__.startswith("transformers.")
    assert model.config.hidden_size == stock_width
    assert not hasattr(model.config, "quantization_config")
    assert not model.config.tie_word_embeddings
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")} == {"Linear"}


def test_from_pretrained_with_dequantize(compressed, logits_of) -> None:
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            compressed.folder, quantization_config=QuadQuantizationConfig(dequantize=True), dtype=torch.bfloat16
        )
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not getattr(model, "is_quantized", False)
    wanted = logits_of(without_input_quantization(compressed.folder))
    error = float((logits_of(model).float() - wanted).norm() / wanted.norm())
    print(f"relative difference {error:.1e}, bound 3e-2")
    assert error < 3e-2


def test_saved_again_it_needs_nothing_of_ours(compress_toy, logits_of, tmp_path) -> None:
    from .conftest import PROBE

    made = compress_toy(RECIPE.format(rank=7, basis="extended", weights="bits: 4", ends=ENDS), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(made.folder).dequantize()
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert isinstance(config["initializer_range"], float)
    name, found = logits_without_us(tmp_path / "plain", PROBE, tmp_path)
    assert name == "LlamaForCausalLM"
    torch.testing.assert_close(found, logits_of(model), rtol=1e-3, atol=1e-3)


def test_generation_and_training_of_a_dequantized_model(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder).dequantize()
    prompt = torch.tensor([[5, 6, 7]])
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert tokens.shape == (1, 8)
    model(prompt, labels=prompt).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_offloaded_weights_are_refused(compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    linear = model.model.layers[1].mlp.up_proj
    linear.outlier.weight = torch.nn.Parameter(linear.outlier.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.outlier\.weight is offloaded"):
        model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, QuadLinear)
