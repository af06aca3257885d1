"""A model seen through its architecture: groups in run order, repeated parts, readers that stay as they are."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from quad_modifiers.model.architecture import Architecture, Group, Member, dense_block
from quad_modifiers.model.decoder import Decoder


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(8, 12, bias=False), nn.Linear(6, 8, bias=False)


class Block(nn.Module):
    """Attention under other names with a fused qkv, and three experts with fused gate and up behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(8), nn.RMSNorm(8)
        self.mixer = nn.ModuleDict({"wqkv": nn.Linear(8, 16), "wo": nn.Linear(8, 8)})
        self.ffn = nn.ModuleDict({"router": nn.Linear(8, 3), "experts": nn.ModuleList(Expert() for _ in range(3))})


BLOCK = (
    Group("qkv", "mixer", (Member("wqkv", ("queries", "keys", "values")),), "stream", "norm_1"),
    Group("o", "mixer", (Member("wo", ("stream",)),), "values"),
    Group("router", "ffn", (Member("router", ("other",)),), "stream", "norm_2", quantized=False),
    Group("gate_up", "ffn.experts.*", (Member("w1", ("channels", "channels")),), "stream", "norm_2"),
    Group("down", "ffn.experts.*", (Member("w2", ("stream",), role="expert_down"),), "channels"),
)
EXPERTS = Architecture("experts", BLOCK, "tokens", "blocks", "norm", "head", runner="hooked")


@pytest.fixture
def model() -> nn.Module:
    model = nn.Module()
    model.tokens, model.norm, model.head = nn.Embedding(10, 8), nn.RMSNorm(8), nn.Linear(8, 10, bias=False)
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    model.config = types.SimpleNamespace(
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        rms_norm_eps=1e-6,
    )
    return model


def test_a_repeated_group_stands_once_for_each_part(model) -> None:
    decoder = Decoder(model, EXPERTS)
    assert [group.path for group in decoder.blocks[1].groups] == [
        "blocks.1.mixer",
        "blocks.1.mixer",
        "blocks.1.ffn",
        *(f"blocks.1.ffn.experts.{expert}" for expert in range(3)),
        *(f"blocks.1.ffn.experts.{expert}" for expert in range(3)),
    ]
    assert len(list(decoder.linears())) == 2 * (2 + 6)
    assert decoder.blocks[0].norms() == [model.blocks[0].norm_1, model.blocks[0].norm_2]
    decoder.check_linears()


def test_a_reader_that_is_not_quantized_is_no_linear_to_work_on(model) -> None:
    decoder = Decoder(model, EXPERTS)
    assert not any("router" in linear.name for linear in decoder.linears())
    assert "router" in [group.group.name for group in decoder.blocks[0].groups]
    assert EXPERTS.roles().keys() == {"wqkv", "wo", "w1", "expert_down"}
    assert {role for role, group in EXPERTS.roles().items() if group.writes_stream} == {"wo", "expert_down"}


def test_replacing_a_linear(model) -> None:
    decoder, new = Decoder(model, EXPERTS), nn.Identity()
    linear = next(linear for linear in decoder.linears() if linear.name == "blocks.1.ffn.experts.2.w2")
    linear.replace(new)
    assert model.blocks[1].ffn["experts"][2].w2 is new
    assert linear.module is new


def test_wrong_data_is_named(model) -> None:
    wrong = Group("qkv", "mixer", (Member("wqkv", ("queries", "keys")),), "stream", "norm_1")
    decoder = Decoder(model, Architecture("experts", (wrong, *BLOCK[1:]), "tokens", "blocks", "norm", "head"))
    with pytest.raises(ValueError, match=r"layer 0 mixer\.wqkv has 16 output channels.*queries \+ keys, which are 12"):
        decoder.check_linears()
    with pytest.raises(ValueError, match=r"layer 0 of the model has no part named 'self_attn'"):
        Decoder(model, Architecture("llama", dense_block(attention_norm="norm_1"), "tokens", "blocks", "norm", "head"))
    with pytest.raises(ValueError, match=r"the model has no part named 'model\.norm'"):
        Decoder(model, Architecture("llama", BLOCK, "tokens", "blocks"))
    with pytest.raises(ValueError, match="reads 'channels' and has norm 'norm_1'"):
        Group("down", "mlp", (), "channels", "norm_1")
    for produces, reads, norm, message in (
        (("stream",), "stream", "n", "what reads the stream cannot write it"),
        (("queries", "stream"), "stream", "n", "what reads the stream cannot write it"),
        (("values",), "channels", "", "what reads the channels must write the stream, and nothing else"),
        (("stream",), "queries", "", "reads 'queries'; it can read 'stream', 'values' or 'channels'"),
    ):
        with pytest.raises(ValueError, match=message):
            Group("wrong", "mlp", (Member("up", produces),), reads, norm)
    for produces, reads, norm in ((("channels",), "stream", "n"), (("stream",), "channels", "")):
        with pytest.raises(ValueError, match="group 'kept' is not quantized, so it must read the stream and produce"):
            Group("kept", "mlp", (Member("w", produces),), reads, norm, quantized=False)
    twice = (
        Group("a", "x", (Member("w", ("keys",)),), "stream", "n"),
        Group("b", "y", (Member("w", ("stream",)),), "values"),
    )
    with pytest.raises(ValueError, match="several linears of the role w;"):
        Architecture("twice", twice)


def test_names_of_a_dense_block_are_arguments(make_toy) -> None:
    block = dense_block(gate="w1", up="w3", mlp_output="w2", mlp="ffn")
    paths = [f"{group.parent}.{member.name}" for group in block[2:] for member in group.members]
    assert paths == ["ffn.w1", "ffn.w3", "ffn.w2"]
    decoder = Decoder(make_toy("qwen3"), Architecture("qwen3"))
    assert [linear.role for linear in decoder.blocks[0].linears()] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    with torch.no_grad():
        decoder.run(torch.tensor([[3, 4]]))
