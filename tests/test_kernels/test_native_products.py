"""The integer products of the native CPU kernels: layouts, and exact sums with every instruction set."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from quad_kernels import InputQuantization, QuantizedWeight, choose_backend, integer_linear
from quad_kernels.native import lines

from .native_weights import MISSING, exact, in_lines, random_float4, random_sub_scaled, random_weight

TOKENS = (1, 2, 3, 5, 8, 9, 13, 33, 64)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")


def test_lines_have_the_documented_order() -> None:
    weight = random_weight(20, 100, 4)
    stored = lines.LAYOUTS["lines4"].pack(weight.integers)
    assert stored.shape == (2, 16, 64)
    byte = int(stored[1, 3, 4 * 2 + 1])  # channel 16 + 2, inputs 24 + 1 and 24 + 5
    assert byte & 15 == int(weight.integers[18, 25]) + 8
    assert byte >> 4 == int(weight.integers[18, 29]) + 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("out", "width"), [(16, 64), (1, 8), (33, 200), (48, 1024), (17, 1), (70, 4100)])
def test_layouts_hold_the_integers_at_half_a_byte_or_one(bits: int, out: int, width: int) -> None:
    weight = random_weight(out, width, bits)
    stored = in_lines(weight)
    assert torch.equal(stored.unpacked(), weight.integers)
    padded = (out + 15) // 16 * 16 * ((width + 63) // 64 * 64)
    assert stored.integers.numel() == (padded // 2 if bits <= 4 else padded)
    assert torch.equal(stored.to_layout("nibbles").unpacked(), weight.integers)


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(("out", "width"), [(48, 512), (33, 200), (1, 7), (16, 2600), (50, 64)])
def test_sums_are_exact(instruction_set: str, weight_bits: int, x_bits: int, out: int, width: int) -> None:
    half = 2 ** (x_bits - 1)
    generator = torch.Generator().manual_seed(width)
    for zero_points in (False, True):
        weight = random_weight(out, width, weight_bits, zero_points=zero_points, unit=True)
        for tokens in TOKENS:
            x = torch.randint(-half, half, (tokens, width), generator=generator, dtype=torch.int8)
            y = integer_linear(x, torch.ones(tokens, 1), in_lines(weight), backend="native")
            assert torch.equal(y, exact(x, weight).float()), tokens


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("x_bits", [2, 3, 4, 5, 6, 8])
def test_sums_of_the_largest_integers_are_exact(instruction_set: str, weight_bits: int, x_bits: int) -> None:
    width = 1536
    for w in (-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1):
        for value in (-(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1):
            integers = torch.full((20, width), w, dtype=torch.int8)
            weight = in_lines(QuantizedWeight(integers, torch.ones(20, 1), None, width, 20, weight_bits))
            for tokens in (1, 4, 40):
                x = torch.full((tokens, width), value, dtype=torch.int8)
                y = integer_linear(x, torch.ones(tokens, 1), weight, backend="native")
                assert (y == w * value * width).all()


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("weight_groups", [1, 2, 8])
@pytest.mark.parametrize("x_groups", [1, 4, 16])
@pytest.mark.parametrize("zero_points", [False, True])
def test_groups_are_those_of_the_reference(
    instruction_set: str, weight_bits: int, weight_groups: int, x_groups: int, zero_points: bool
) -> None:
    width, out = 512, 40
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(out, width, weight_bits, weight_groups, zero_points)
    for tokens in (1, 3, 37):
        x = torch.randint(-8, 8, (tokens, width), generator=generator, dtype=torch.int8)
        scale = torch.rand(tokens, x_groups, generator=generator) + 0.5
        y = integer_linear(x, scale, in_lines(weight), backend="native")
        wide = QuantizedWeight(
            weight.integers, weight.scale.double(), weight.zero_point, width, out, weight.bits
        ).dequantized(torch.float64)
        truth = (x.double() * scale.double().repeat_interleave(width // x_groups, 1)) @ wide.T
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(
    ("out", "width", "group_size"),
    [
        (48, 512, 32),
        (33, 192, 64),
        (1, 8, 8),
        (16, 2592, 96),
        (50, 576, 192),
        (20, 160, 16),
        (17, 120, 24),
        (70, 1088, 32),
    ],
)
def test_sums_of_two_levels_are_exact(instruction_set: str, x_bits: int, out: int, width: int, group_size: int) -> None:
    half = 2 ** (x_bits - 1)
    generator = torch.Generator().manual_seed(width)
    weight = random_sub_scaled(out, width, group_size, unit=True)
    stored = in_lines(weight)
    assert stored.layout == "lines4"
    for tokens in TOKENS:
        x = torch.randint(-half, half, (tokens, width), generator=generator, dtype=torch.int8)
        y = integer_linear(x, torch.ones(tokens, 1), stored, backend="native")
        assert torch.equal(y, exact(x, weight).float()), tokens


def test_sums_of_the_largest_products_are_exact(instruction_set: str) -> None:
    width = 512
    for w in (-8, 7):
        for first, second in itertools.product((-128, 127), repeat=2):
            integers = torch.full((20, width), w, dtype=torch.int8)
            integers[:, 2::4] = integers[:, 3::4] = -1 - w  # of each four inputs two are summed apart
            sub_scale = torch.full((width // 32, 20), 15, dtype=torch.int8)
            weight = QuantizedWeight(integers, torch.ones(20, 1), None, width, 20, 4, sub_scale=sub_scale)
            for tokens in (1, 4, 40):
                x = torch.full((tokens, width), first, dtype=torch.int8)
                x[:, 2::4] = x[:, 3::4] = second
                y = integer_linear(x, torch.ones(tokens, 1), in_lines(weight), backend="native")
                assert torch.equal(y, exact(x, weight).float())


@pytest.mark.parametrize("x_bits", [4, 5, 8])
@pytest.mark.parametrize(("out", "width"), [(48, 512), (33, 192), (1, 32), (16, 2592), (50, 64)])
def test_sums_of_floating_point_numbers_are_exact(instruction_set: str, x_bits: int, out: int, width: int) -> None:
    half = 2 ** (x_bits - 1)
    generator = torch.Generator().manual_seed(width)
    weight = random_float4(out, width, "mxfp4", unit=True)
    stored = in_lines(weight)
    assert stored.layout == "lines_e2m1"
    assert stored.integers.numel() == (out + 15) // 16 * 16 * ((width + 63) // 64 * 64) // 2
    assert torch.equal(stored.unpacked(), weight.integers)
    assert torch.equal(stored.to_layout("lines8").unpacked(), weight.integers)
    for tokens in TOKENS:
        x = torch.randint(-half, half, (tokens, width), generator=generator, dtype=torch.int8)
        y = integer_linear(x, torch.ones(tokens, 1), stored, backend="native")
        assert torch.equal(y, exact(x, weight).float()), tokens


@pytest.mark.parametrize("x_bits", [4, 5, 8])
def test_sums_of_the_largest_floating_point_numbers_are_exact(instruction_set: str, x_bits: int) -> None:
    width = 1536
    for w in (-12, 12):
        weight = random_float4(20, width, "nvfp4", unit=True)
        weight = in_lines(replace(weight, integers=torch.full((20, width), w, dtype=torch.int8)))
        for value in (-(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1):
            for tokens in (1, 4, 40):
                x = torch.full((tokens, width), value, dtype=torch.int8)
                y = integer_linear(x, torch.ones(tokens, 1), weight, backend="native")
                assert (y == w * value * width).all()


@pytest.mark.parametrize("group_size", [20, 4])
def test_groups_that_are_no_whole_lines_become_products(group_size: int) -> None:
    weight = random_sub_scaled(12, 80, group_size)
    x = torch.randint(-8, 8, (5, 80), dtype=torch.int8)
    native = choose_backend("cpu", "native").prepare_weight(weight, InputQuantization(4))
    assert (native.layout, native.bits, native.folded_bits) == ("lines8", 8, 4)
    y = integer_linear(x, torch.ones(5, 1), native, backend="native")
    torch.testing.assert_close(y, integer_linear(x, torch.ones(5, 1), weight, backend="reference"))
    assert torch.equal(native.to_words(), weight.to_words())


def test_layouts_that_the_kernels_do_not_read_fall_back() -> None:
    weight = random_weight(12, 24, 4, groups=8)  # groups of 3
    x = torch.randint(-8, 8, (5, 24), dtype=torch.int8)
    native = choose_backend("cpu", "native").prepare_weight(weight, InputQuantization(4))
    assert native.layout == "int8"
    y = integer_linear(x, torch.ones(5, 1), native, backend="native")
    torch.testing.assert_close(y, integer_linear(x, torch.ones(5, 1), weight, backend="reference"))
