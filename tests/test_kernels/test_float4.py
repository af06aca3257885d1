"""4-bit floating-point numbers: rounding, scales and storage, against compressed-tensors' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quad_kernels import FloatGrid, InputQuantization, NumberFormat, QuantizedWeight, fake_quantize, float4
from quad_kernels.float4 import GROUP_SIZES, MAGNITUDES, round_e2m1

FORMATS: list[NumberFormat] = ["nvfp4", "mxfp4"]


def scheme(number_format: str) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(number_format.upper(), targets=["Linear"])


def draw(*shape: int) -> torch.Tensor:
    """Numbers of groups that differ much."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[-1])


def test_rounding_takes_the_nearest_number_and_of_two_the_even_code() -> None:
    x = torch.arange(-14, 14.01, 1 / 16)
    points = torch.tensor([sign * value for value in MAGNITUDES for sign in (1, -1)]).float()
    codes = torch.tensor([code for code in range(len(MAGNITUDES)) for _ in range(2)])
    distance = (x[:, None] - points).abs()
    cost = distance + 1e-3 * (codes % 2)  # far below the distance of two numbers that are no tie
    assert torch.equal(round_e2m1(x.clone()), points[cost.argmin(1)] + 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_inputs_are_those_of_compressed_tensors(dtype: torch.dtype) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as stock_fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    arguments, x = scheme("mxfp4").input_activations, draw(7, 96).to(dtype)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Module())
    wanted = stock_fake_quantize(x, scale, zero_point, arguments)
    assert torch.equal(fake_quantize(x, InputQuantization(group_size=32, number_format="mxfp4")), wanted)


def test_nvfp4_inputs_are_those_of_compressed_tensors_with_a_power_of_two() -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as stock_fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments, x = scheme("nvfp4").input_activations, draw(7, 96)
    global_scale = torch.tensor([16.0])
    grouped = x.unflatten(-1, (-1, 16))
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments, global_scale)
    wanted = stock_fake_quantize(x, scale, zero_point, arguments, global_scale=global_scale)
    ours = fake_quantize(x, InputQuantization(group_size=16, number_format="nvfp4"))
    limited = (grouped.abs().amax(-1) / 6 * 16 < 2.0**-6).repeat_interleave(16, -1)  # e4m3 has fewer bits there
    assert limited.any()
    assert torch.equal(ours[~limited], wanted[~limited])


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_stored_weight_is_the_one_that_compressed_tensors_reads(number_format: NumberFormat) -> None:
    from compressed_tensors.compressors import BaseCompressor

    size, weight = GROUP_SIZES[number_format], draw(24, 96)
    weight[0, :size] = 0
    weight[1] *= 1e-6  # scales below the smallest normal e4m3
    grid = FloatGrid(number_format).fitted(weight, 1.0)
    scale = grid.scale(weight.unflatten(1, (-1, size)).abs().amax(-1))
    integers = round_e2m1(weight / scale.repeat_interleave(size, 1)).to(torch.int8)
    ours = QuantizedWeight(integers, scale, None, 96, 24, float4.INTEGER_BITS, number_format=number_format)
    stored = {"weight_packed": ours.to_words(), **float4.stored_scale(scale, number_format)}
    stock = BaseCompressor.get_value_from_registry(f"{number_format}-pack-quantized").decompress(
        stored, scheme(number_format)
    )
    assert torch.equal(stock["weight"].float(), ours.dequantized(torch.bfloat16).float())
    read = float4.scale_of_stored(stored["weight_scale"], stored.get("weight_global_scale"))
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.float(), scale)
    again = QuantizedWeight.of_float4(stored["weight_packed"], read, number_format)
    assert torch.equal(again.integers, integers)
    assert (ours.dequantized(torch.float32) - weight).square().mean() < 0.02 * weight.square().mean()


def test_a_global_scale_that_is_no_power_of_two_is_read_in_float32() -> None:
    stored = torch.tensor([[1.0, 1.125]]).to(torch.float8_e4m3fn)
    scale = float4.scale_of_stored(stored, torch.tensor([3.0]))
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.tensor([[1 / 6, 1.125 / 6]]), rtol=1e-7, atol=0)


def test_what_is_no_such_number_is_refused() -> None:
    with pytest.raises(ValueError, match="no doubled 4-bit floating-point numbers"):
        float4.pack_e2m1(torch.tensor([[5, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="in pairs, not in rows of 3"):
        float4.pack_e2m1(torch.zeros(1, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="does not fit a weight of 2 outputs and 32 inputs in groups of 16"):
        QuantizedWeight.of_float4(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), "nvfp4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8, "group_size": 16}, "numbers of nvfp4 have 4 bits, not 8"),
        ({"group_size": 32}, "groups of nvfp4 are of 16, not 32"),
        ({}, "groups of nvfp4 are of 16, not None"),
        ({"group_size": 16, "symmetric": False}, "neither sub_scale_bits nor zero points"),
        ({"group_size": 16, "sub_scale_bits": 4}, "neither sub_scale_bits nor zero points"),
        ({"number_format": "fp6"}, "must be int, nvfp4 or mxfp4"),
        (
            {"number_format": "mxfp4", "group_size": 32, "four_over_six": True},
            "four_over_six is for nvfp4, not for mxfp4",
        ),
    ],
)
def test_what_does_not_go_with_them_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputQuantization(**{"number_format": "nvfp4", **fields})
    with pytest.raises(ValueError, match="must be one of nvfp4, mxfp4 here"):
        FloatGrid("int")


def test_four_over_six_takes_the_better_of_two_scales_for_each_group() -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    x[0, :16] = torch.tensor([6.0, 5.0] + [1.5] * 14)  # with 6 as 4, 5 becomes 4.5 instead of 4, and 1.5 is a number
    x[1, :16] = torch.tensor([6.0, 4.0] + [0.5] * 14)  # all of them numbers as they are
    plain = InputQuantization(group_size=16, number_format="nvfp4")
    largest = x.unflatten(1, (-1, 16)).abs().amax(-1)

    def rounded(top: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = float4.input_scale(largest, "nvfp4", top).unsqueeze(-1)
        wanted = round_e2m1(x.unflatten(1, (-1, 16)) / scale) * scale
        return wanted, (wanted - x.unflatten(1, (-1, 16))).square().sum(-1, keepdim=True)

    (six, six_error), (four, four_error) = rounded(12), rounded(8)
    assert torch.equal(fake_quantize(x, plain), six.flatten(1))
    ours = fake_quantize(x, replace(plain, four_over_six=True)).unflatten(1, (-1, 16))
    clear = (four_error - six_error).abs() > 0.05 * six_error  # errors are counted in 32nds
    wanted = torch.where(four_error < six_error, four, six)
    assert torch.equal(torch.where(clear, ours, wanted), wanted)
    assert 0.2 < float((four_error < six_error).float().mean()) < 0.6
    error = (ours - x.unflatten(1, (-1, 16))).square().mean()
    assert float(error) < 0.87 * float(six_error.mean() / 16)
    assert ours[0, 0].tolist() == [6.0, 4.5] + [1.5] * 14
    assert torch.equal(ours[1, 0], x[1, :16])
