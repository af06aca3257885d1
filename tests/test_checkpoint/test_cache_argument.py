"""Releases of transformers call a cache `past_key_values` or `cache`; the native decoder and its blocks take both."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from quad_modifiers.nn.cache_argument import cache_argument, output_field
from quad_modifiers.nn.native_block import NativeBlock

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def test_the_name_is_that_of_the_signature() -> None:
    assert cache_argument(lambda x, past_key_values=None: x) == "past_key_values"
    assert cache_argument(lambda x, cache=None: x) == "cache"
    assert output_field(type("Output", (), {"__dataclass_fields__": {"cache": None}})) == "cache"
    assert output_field(type("Output", (), {"__dataclass_fields__": {"past_key_values": None}})) == "past_key_values"


@pytest.mark.parametrize("tokens", [1, 2], ids=["one token", "several"])
@torch.no_grad()
def test_a_decoder_and_its_blocks_take_both_names(tokens: int, quad_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(quad_checkpoint).model
    if not isinstance(model.layers[0], NativeBlock):
        pytest.skip("no native kernels here")
    past = model(PROMPT[:, :-tokens], use_cache=True)[1]
    outputs = []
    for name in ("past_key_values", "cache"):
        own = copy.deepcopy(past)
        outputs.append(model.forward(PROMPT[:, -tokens:], use_cache=True, **{name: own})[0])
        assert own.get_seq_length() == PROMPT.shape[1], f"{name} was not lengthened"
    assert torch.equal(*outputs)
    x = model.embed_tokens(PROMPT[:, -tokens:])
    angles = model.rotary_emb(x, torch.arange(PROMPT.shape[1] - tokens, PROMPT.shape[1])[None])
    states = []
    for name in ("past_key_values", "cache"):
        own = copy.deepcopy(past)
        states.append(model.layers[0](x, position_embeddings=angles, use_cache=True, **{name: own}))
        assert own.get_seq_length() == PROMPT.shape[1], f"the block forgot {name}"
    assert torch.equal(*states)
