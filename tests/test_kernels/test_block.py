"""A decoder block in few launches: Triton against the reference, part by part and as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, QuantizedWeight, RMSNorm, block
from quad_kernels.native.block import BlockLinear

pytest.importorskip("triton")

WIDTH, HEADS, KV_HEADS, HEAD_DIM, CHANNELS, RANK = 72, 2, 1, 32, 128, 8


def linear(outputs: int, split: InputSplit, generator: torch.Generator) -> BlockLinear:
    inputs = split.residual_width
    integers = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = (torch.rand(outputs, 1, generator=generator) + 0.5) * 0.02
    weight = QuantizedWeight(integers, scale, None, inputs, outputs, 4)
    outlier_weight = torch.randn(outputs, split.rank, generator=generator) * 0.05
    return BlockLinear(weight, split, InputQuantization(4, 0.9), outlier_weight, None)


def moved(given: BlockLinear, device: torch.device) -> BlockLinear:
    weight = given.weight.to_layout("nibbles")
    weight = replace(weight, integers=weight.integers.to(device), scale=weight.scale.to(device))
    assert given.outlier_weight is not None
    return given._replace(weight=weight, outlier_weight=given.outlier_weight.to(device))


@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (2, 2)])
def test_a_block(device: torch.device, batch: int, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    stream = InputSplit(WIDTH, RANK)
    values = InputSplit(HEADS * HEAD_DIM, 2, HEAD_DIM, keep_width=True, hadamard=True)
    channels = InputSplit(CHANNELS, RANK, keep_width=True, hadamard=True)
    qkv = [linear(n * HEAD_DIM, stream, generator) for n in (HEADS, KV_HEADS, KV_HEADS)]
    output, down = linear(WIDTH, values, generator), linear(WIDTH, channels, generator)
    gate_up = [linear(CHANNELS, stream, generator) for _ in range(2)]
    assert block.takes([qkv, [output], gate_up, [down]], torch.float32)
    x = torch.randn(batch, positions, WIDTH, generator=generator)
    attention = torch.randn(batch, positions, HEADS * HEAD_DIM, generator=generator)
    angle = torch.arange(positions)[:, None] * torch.rand(HEAD_DIM // 2, generator=generator).repeat(2)
    cosine, sine = angle.cos()[None], angle.sin()[None]
    norm = RMSNorm(torch.rand(WIDTH, generator=generator) + 0.5, 1e-6)
    heads = [torch.rand(HEAD_DIM, generator=generator) + 0.5 for _ in range(2)]

    there = RMSNorm(norm.weight.to(device), norm.eps) if norm.weight is not None else norm
    got = block.block_in(
        x.to(device), there, [moved(each, device) for each in qkv], cosine.to(device), sine.to(device),
        [head.to(device) for head in heads],
    )  # fmt: skip
    got.append(
        block.block_out(
            attention.to(device),
            x.to(device),
            there,
            moved(output, device),
            [moved(each, device) for each in gate_up],
            moved(down, device),
        )
    )
    monkeypatch.setenv("QUAD_KERNELS", "reference")
    wanted = block.block_in(x, norm, qkv, cosine, sine, heads)
    wanted.append(block.block_out(attention, x, norm, output, gate_up, down))
    for own, expected in zip(got, wanted, strict=True):
        assert own.shape == expected.shape
        # An input beside a rounding boundary may fall on its other side: the norm adds up in another order.
        assert float((own.cpu() - expected).norm() / expected.norm()) < 1e-2


def test_linears_that_share_an_input_must_be_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    one = linear(32, InputSplit(WIDTH, RANK), generator)
    other = one._replace(quantization=InputQuantization(8))
    assert block.takes([[one, one], [other]], torch.bfloat16)
    assert not block.takes([[one, other]], torch.bfloat16)
    assert not block.takes([[one]], torch.float64)
