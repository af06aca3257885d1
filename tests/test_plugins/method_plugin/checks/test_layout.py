"""A weight layout and the backend that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import BRANCH, PROJECT, QUANTIZE, Compress, Compressed, logits_of
from quad_kernels import QuantizedWeight, backends, choose_backend, integer_linear
from transformers import AutoModelForCausalLM

from quad_modifiers.nn.quad_linear import QuadLinear


def weight_of(out: int, bits: int = 4) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(out)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, 40), generator=generator, dtype=torch.int8)
    return QuantizedWeight(integers, torch.rand(out, 1, generator=generator), None, 40, out, bits)


def test_it_is_chosen_by_priority_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"row_pairs", "onednn", "reference"} <= backends().keys()
    assert choose_backend("cpu").name == "row_pairs"
    monkeypatch.setenv("QUAD_KERNELS", "reference")
    assert choose_backend("cpu").name == "reference"
    monkeypatch.setenv("QUAD_KERNELS", "row_pairs")
    assert choose_backend("cpu").name == "row_pairs"


def test_integers_come_back_from_every_layout() -> None:
    weight = weight_of(6)
    stored = weight.to_layout("row_pairs")
    assert stored.integers.shape == (3, 40)
    assert torch.equal(stored.unpacked(), weight.integers)
    assert torch.equal(stored.to_layout("nibbles").to_layout("row_pairs").integers, stored.integers)
    assert weight_of(5).to_layout("row_pairs").layout == "int8"
    assert weight_of(6, bits=8).to_layout("row_pairs").layout == "int8"


def test_products_are_those_of_the_reference() -> None:
    x, scale = torch.randint(-8, 8, (3, 40), dtype=torch.int8), torch.rand(3, 1)
    for weight in (weight_of(6), weight_of(5), weight_of(6, bits=8)):
        y = integer_linear(x, scale, weight.to_layout("row_pairs"), backend="row_pairs")
        assert torch.equal(y, integer_linear(x, scale, weight, backend="reference"))


@pytest.mark.parametrize(
    "settings", ["{}", "{symmetric: false}", "{group_size: 8}", "{bits: 8}"], ids=lambda value: value
)
def test_a_model_computes_with_it_and_saves_to_the_same_bytes(
    settings: str, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Compressed = compress(PROJECT, BRANCH, QUANTIZE[0], f"OutlierSplitGPTQ: {settings}")
    monkeypatch.setenv("QUAD_KERNELS", "reference")
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(made.folder))
    monkeypatch.delenv("QUAD_KERNELS")
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    layers = [module for module in model.modules() if isinstance(module, QuadLinear)]
    assert {layer.quantized_weight().layout for layer in layers} == {"int8" if "bits" in settings else "row_pairs"}
    assert torch.equal(logits_of(model), wanted)
    assert "kernels=row_pairs" in repr(layers[0])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (made.folder / "model.safetensors").read_bytes()
    assert torch.equal(logits_of(model), wanted)
