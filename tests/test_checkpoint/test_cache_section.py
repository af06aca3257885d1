"""A checkpoint whose keys and values are rounded: loaded, saved again, made plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.cache_section import KVCacheSection
from quad_modifiers.checkpoint.format import read_format
from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.kv_cache import KVCacheHook
from tests.continuation import PROMPT, at_once, by_tokens

QUAD = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {u_type_bits: 8, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 8}
    KVCacheQuant: {clip_ratio: 0.95}
"""
REST: dict[str, Any] = {"sink_tokens": 1, "centred": False}


def test_a_checkpoint_keeps_it(compress_toy, logits_of, tmp_path) -> None:
    made = compress_toy(QUAD)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.config.quantization_config.content["quad"]["sections"]["kv_cache"] == {
        "bits": 4,
        "clip_ratio": 0.95,
        "hadamard": True,
        "sink_tokens": 1,
        "centred": True,
    }
    assert torch.equal(logits_of(model), made.logits)
    unrounded = compress_toy(QUAD.replace("    KVCacheQuant: {clip_ratio: 0.95}\n", ""))
    assert not torch.equal(made.logits, unrounded.logits)
    with torch.no_grad():
        assert model(PROMPT, use_cache=True).past_key_values.layers[0].keys.dtype == torch.uint8
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), made.logits)
    assert model.config.quantization_config.content["quad"]["format_version"] == 3
    plain = model.dequantize()
    assert not any(isinstance(h, KVCacheHook) for m in plain.modules() for h in m._forward_pre_hooks.values())
    with torch.no_grad():
        assert plain(PROMPT, use_cache=True).past_key_values.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [2, 4], ids=["folded values", "bases of both"])
def test_a_checkpoint_keeps_coordinates_in_eight_bits(rank, dtype, compress_toy, logits_of, tmp_path) -> None:
    recipe = QUAD.replace("{clip_ratio: 0.95}", f"{{high_rank: {rank}, high_bits: 8}}")
    made = compress_toy(recipe, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    quad = model.config.quantization_config.content["quad"]
    assert quad["format_version"] == 6
    high = {"bits": 8, "key_rank": rank, "value_rank": rank, "value_basis": rank == 4}
    assert quad["sections"]["kv_cache"]["high"] == high
    assert torch.equal(logits_of(model), made.logits)
    with torch.no_grad():
        layer = model(PROMPT, use_cache=True).past_key_values.layers[0]
    assert layer.keys.shape[-1] == layer.values.shape[-1] == (16 + rank) // 2 + 4 * dtype.itemsize
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), made.logits)
    plain = model.dequantize()
    assert not any(name.endswith("_basis") for name in plain.state_dict())
    # A reader of an older version is one that knows none above 5.
    older = {name: value for name, value in quad.items() if name != "overrides"} | {"format_version": 5}
    with pytest.raises(ValueError, match=r"version 5 has no field 'sections\.kv_cache\.high'"):
        read_format(older)


@pytest.mark.parametrize("high", ["", ", high_rank: 2, high_bits: 8, high_states: [keys]"], ids=["4 bits", "some in 8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_keeps_balanced_keys(dtype, high, compress_toy, logits_of, tmp_path) -> None:
    made = compress_toy(QUAD.replace("{clip_ratio: 0.95}", f"{{key_basis: balanced{high}}}"), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    quad = model.config.quantization_config.content["quad"]
    assert (quad["format_version"], quad["sections"]["kv_cache"]["key_inverse"]) == (7, True)
    assert torch.equal(logits_of(model), made.logits)
    block = model.model.layers[0]
    product = block.key_basis.float() @ block.key_inverse.float()
    torch.testing.assert_close(
        product, torch.eye(16).expand_as(product), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
    )
    assert float((block.key_basis.mT - block.key_inverse).abs().max()) > 0.1
    with torch.no_grad():
        layer = model(PROMPT, use_cache=True).past_key_values.layers[0]
    assert layer.keys.shape[-1] == (9 + 4 * dtype.itemsize if high else 8 + 2 * dtype.itemsize)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), made.logits)
    older = copy.deepcopy(quad) | {"format_version": 6}
    for linear in older["linears"].values():
        del linear["input"]["symmetric"]
    with pytest.raises(ValueError, match=r"version 6 has no field 'sections\.kv_cache\.key_inverse'"):
        read_format(older)


def test_a_token_at_a_time_on_native_kernels(compress_toy) -> None:
    model = AutoModelForCausalLM.from_pretrained(compress_toy(QUAD).folder)
    found, wanted = by_tokens(model), at_once(model)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"bits": 3, "clip_ratio": 0.9, "hadamard": True, **REST}, "bits"),
        ({"bits": 4, "clip_ratio": 0, "hadamard": True, **REST}, "clip_ratio"),
        ({"bits": 4, "clip_ratio": 0.9, **REST}, "hadamard: Field required"),
        ({"bits": 4, "clip_ratio": 0.9, "hadamard": True, **REST, "sinks": 4}, "sinks"),
        ({"bits": 4, "clip_ratio": 0.9, "hadamard": True, **REST, "key_inverse": False}, "key_inverse"),
    ],
)
def test_a_damaged_section_is_refused(section, message) -> None:
    with pytest.raises(ValueError, match=f"section 'kv_cache' is damaged, or of a later version.*{message}"):
        KVCacheSection.install(None, section)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"bits": 4}, "high.bits"),
        ({"key_rank": 0, "value_rank": 0, "value_basis": False}, "neither keys nor values"),
        ({"value_rank": 0}, "values have a basis, and no coordinates"),
        ({"key_rank": -2}, "high.key_rank"),
        ({"key_rank": 3}, "high_rank comes to 3 of the 16"),
        ({"value_rank": 16}, "high_rank comes to 16 of the 16"),
        ({"spare": 1}, "high.spare"),
    ],
)
def test_damaged_coordinates_in_eight_bits_are_refused(damage, message, make_toy) -> None:
    decoder = Decoder(make_toy(), next(each for each in BUILTIN_ARCHITECTURES if each.model_type == "llama"))
    section: dict[str, Any] = {"bits": 4, "clip_ratio": 0.9, "hadamard": True, **REST}
    high = {"bits": 8, "key_rank": 2, "value_rank": 2, "value_basis": True}
    KVCacheSection.install(decoder, {**section, "high": high})
    with pytest.raises(ValueError, match=f"section 'kv_cache' is damaged, or of a later version.*{message}"):
        KVCacheSection.install(decoder, {**section, "high": {**high, **damage}})
