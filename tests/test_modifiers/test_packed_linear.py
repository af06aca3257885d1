"""The packed weight of a loaded checkpoint in its two states: the checkpoint's words, and what the kernels read."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from quad_kernels import (
    FloatGrid,
    InputQuantization,
    InputSplit,
    IntegerGrid,
    QuantizedWeight,
    choose_backend,
    fake_quantize,
    float4,
)
from quad_kernels.packing import pack_int32
from torch import nn

from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear

WIDTH, OUT = 64, 24
KINDS = {
    "4 bits": IntegerGrid(4),
    "groups": IntegerGrid(4, 16),
    "zero points": IntegerGrid(4, 16, False),
    "8 bits": IntegerGrid(8),
    "two levels": IntegerGrid(4, 16, sub_scale_bits=4),
    "two levels of few inputs": IntegerGrid(4, 4, sub_scale_bits=4),
    "NVFP4": FloatGrid("nvfp4"),
    "MXFP4": FloatGrid("mxfp4"),
}


def make(kind: str) -> tuple[QuadLinear, torch.Tensor]:
    grid, bits = KINDS[kind], KINDS[kind].bits
    generator = torch.Generator().manual_seed(0)
    if isinstance(grid, FloatGrid):
        return in_container(packed_float4(grid, generator))
    half = 2 ** (bits - 1)
    integers = torch.randint(-half, half, (OUT, WIDTH), dtype=torch.int8, generator=generator)
    packed = PackedLinear(WIDTH, OUT, grid, torch.float32)
    packed.weight_packed.copy_(pack_int32(integers, bits))
    packed.weight_scale.copy_(torch.rand(packed.weight_scale.shape, generator=generator) + 0.1)
    if packed.weight_zero_point is not None:
        zeros = torch.randint(-half, half, (OUT, packed.weight_scale.shape[1]), dtype=torch.int8, generator=generator)
        packed.weight_zero_point.copy_(pack_int32(zeros.T.contiguous(), bits).T)
    if packed.weight_sub_scale is not None:
        factors = torch.randint(-7, 8, (grid.groups(WIDTH), OUT), dtype=torch.int8, generator=generator)
        packed.weight_sub_scale.copy_(pack_int32(factors, 4).T)
    return in_container((packed, integers))


def packed_float4(grid: FloatGrid, generator: torch.Generator) -> tuple[PackedLinear, torch.Tensor]:
    weight = torch.randn(OUT, WIDTH, generator=generator)
    scale = grid.fitted(weight, 1.0).scale(weight.unflatten(1, (-1, grid.group_size)).abs().amax(-1))
    integers = float4.round_e2m1(weight / scale.repeat_interleave(grid.group_size, 1)).to(torch.int8)
    rounded = QuantizedWeight(integers, scale, None, WIDTH, OUT, 5, number_format=grid.number_format)
    return PackedLinear.of(rounded, torch.float32), integers


def in_container(made: tuple[PackedLinear, torch.Tensor]) -> tuple[QuadLinear, torch.Tensor]:
    container = QuadLinear(made[0], "q_proj", InputSplit(WIDTH))
    container.input_quantization = InputQuantization(8)
    container.quantize_input = True
    return container, made[1]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantized_weight_keeps_its_integers(bits: int, symmetric: bool) -> None:
    half, generator = 2 ** (bits - 1), torch.Generator().manual_seed(0)
    integers = torch.randint(-half, half, (30, 56), dtype=torch.int8, generator=generator)
    zeros = None if symmetric else torch.randint(-half, half, (30, 7), dtype=torch.int8, generator=generator)
    weight = QuantizedWeight(integers, torch.ones(30, 7), zeros, 56, 30, bits)
    kept = PackedLinear.of(weight, torch.float32).quantized_weight()
    assert torch.equal(kept.integers, integers)
    assert (kept.zero_point is None) == symmetric
    if zeros is not None:
        assert torch.equal(kept.zero_point, zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_go_when_the_kernels_have_their_layout_and_come_back_to_be_saved(kind: str) -> None:
    container, integers = make(kind)
    packed = container.residual
    assert isinstance(packed, PackedLinear)
    words = packed.weight_packed.clone()
    container(draw(3, WIDTH))
    assert packed.weight_packed.numel() == 0
    assert torch.equal(packed.quantized_weight().integers, integers)
    saved = container.state_dict()
    assert torch.equal(saved["residual.weight_packed"], words)
    before = container(draw(3, WIDTH))
    fresh, _ = make(kind)
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(draw(3, WIDTH)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_agrees_with_the_dequantized_weight(kind: str) -> None:
    container, _ = make(kind)
    x = draw(5, WIDTH)
    wanted = nn.functional.linear(fake_quantize(x, InputQuantization(8)), container.residual.dequantized(torch.float32))
    torch.testing.assert_close(container(x), wanted, rtol=1e-5, atol=1e-4)
    container.quantize_input = False
    weight_only = nn.functional.linear(x, container.residual.dequantized(torch.float32))
    torch.testing.assert_close(container(x), weight_only, rtol=1e-5, atol=1e-4)


def test_copies_and_pickles_are_complete() -> None:
    container, _ = make("4 bits")
    wanted = container(draw(3, WIDTH))
    assert torch.equal(copy.deepcopy(container)(draw(3, WIDTH)), wanted)
    buffer = io.BytesIO()
    torch.save(container, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(draw(3, WIDTH)), wanted)
    assert torch.equal(container(draw(3, WIDTH)), wanted)


def test_moving_and_casting_after_a_forward_pass() -> None:
    container, _ = make("4 bits")
    wanted = container(draw(3, WIDTH))
    container.to("cpu", torch.bfloat16)
    y = container(draw(3, WIDTH).bfloat16())
    assert y.dtype == torch.bfloat16
    assert float((y.float() - wanted).norm() / wanted.norm()) < 0.02


def test_a_changed_scale_is_used() -> None:
    container, _ = make("4 bits")
    before = container(draw(3, WIDTH))
    container.residual.weight_scale = container.residual.weight_scale * 2
    torch.testing.assert_close(container(draw(3, WIDTH)), 2 * before)


def test_offloaded_weights_are_not_kept() -> None:
    """accelerate brings an offloaded module's tensors for one forward pass and takes them away again."""
    container, _ = make("4 bits")
    packed = container.residual
    packed._hf_hook = SimpleNamespace(offload_buffers=True, pre_forward=lambda _: None, post_forward=lambda *_: None)
    words = packed.weight_packed.clone()
    first = container(draw(3, WIDTH))
    assert torch.equal(packed.weight_packed, words)
    assert torch.equal(container(draw(3, WIDTH)), first)


def test_the_layout_suits_the_inputs() -> None:
    """oneDNN's layout, of products with one scale per token, would be undone in every call with groups of inputs."""
    found = []
    for quantization in (InputQuantization(4), InputQuantization(4, group_size=16), None):
        packed = PackedLinear(WIDTH, OUT, IntegerGrid(4), torch.float32, quantization)
        packed.weight_packed.zero_()
        packed.weight_scale.fill_(1.0)
        found.append(packed.prepared_weight())
    fastest = choose_backend("cpu").prepare_weight(found[0], InputQuantization(4)).layout
    assert [weight.layout for weight in found] == [fastest, "int8" if fastest == "onednn" else fastest, "int8"]
