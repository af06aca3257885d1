"""Dynamic quantization of activations."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization
from quad_kernels import quantize_activations as public_quantize_activations

BACKENDS = ["reference", "onednn", "native"]


@pytest.fixture(params=BACKENDS, autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAD_KERNELS", request.param)


def quantize_activations(
    x: torch.Tensor, bits: int, clip_ratio: float = 1.0, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    outlier, integers, scale = public_quantize_activations(x, InputQuantization(bits, clip_ratio, group_size))
    assert outlier is None
    return integers, scale


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip_ratio", [1.0, 0.92])
@pytest.mark.parametrize("group_size", [None, 8, 24])
def test_definition(bits: int, clip_ratio: float, group_size: int | None) -> None:
    x = activations(3, 5, 48)
    integers, scale = quantize_activations(x, bits, clip_ratio, group_size)
    groups = 1 if group_size is None else 48 // group_size
    assert integers.shape == x.shape
    assert integers.dtype == torch.int8
    assert scale.shape == (3, 5, groups)
    assert scale.dtype == torch.float32
    parts = x.double().reshape(3, 5, groups, -1)
    wanted_scale = clip_ratio * parts.abs().amax(-1) / ((2**bits - 1) / 2)
    torch.testing.assert_close(scale.double(), wanted_scale, rtol=1e-6, atol=0)
    exact = parts / wanted_scale.unsqueeze(-1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wanted = exact.round().clamp(low, high).flatten(-2)
    # Where the quotient lies beside a tie, float32 may round the other way; nowhere else.
    tie = ((exact - exact.floor() - 0.5).abs() < 1e-4).flatten(-2)
    assert torch.equal(integers[~tie].double(), wanted[~tie])
    assert bool(((integers.double() - wanted).abs() <= 1).all())
    assert int(integers.min()) >= low
    assert int(integers.max()) <= high


@pytest.mark.parametrize(("bits", "sub_scale_bits"), [(4, 4), (3, 4), (4, 3), (2, 6)])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.92])
def test_steps_of_groups_are_multiples_of_one_scale(bits: int, sub_scale_bits: int, clip_ratio: float) -> None:
    x = activations(3, 5, 48) * torch.logspace(-2, 1, 48)
    x[0, 0] = 0
    x[0, 1, :16] = 0
    quantization = InputQuantization(bits, clip_ratio, 8, sub_scale_bits)
    _, integers, scale = public_quantize_activations(x, quantization)
    assert scale.shape == (3, 5, 1)
    parts = x.double().reshape(3, 5, 6, 8)
    most = 2**sub_scale_bits - 1
    steps = clip_ratio * parts.abs().amax(-1) / ((2**bits - 1) / 2)
    wanted_scale = steps.amax(-1, keepdim=True) / most
    torch.testing.assert_close(scale.double(), wanted_scale, rtol=1e-6, atol=0)
    assert not integers[0, 0].any()
    factors = (steps / wanted_scale.clamp(min=1e-30)).round().clamp(1, most).unsqueeze(-1)
    exact = parts / (factors * wanted_scale.clamp(min=1e-30).unsqueeze(-1))
    wanted = exact.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * factors
    tie = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(integers.reshape(parts.shape)[~tie].double(), wanted[~tie])
    assert int(integers.abs().max()) <= 2 ** (bits - 1) * most


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("clip_ratio", [1.0, 0.92])
@pytest.mark.parametrize("group_size", [None, 8, 24])
def test_asymmetric_grids_have_their_zero_points_taken_off(
    bits: int, clip_ratio: float, group_size: int | None
) -> None:
    x = activations(3, 5, 48) + 0.7
    x[0, 0] = x[0, 0].abs()
    x[0, 1] = -x[0, 1].abs()
    _, integers, scale = public_quantize_activations(
        x, InputQuantization(bits, clip_ratio, group_size, symmetric=False)
    )
    groups, levels = 1 if group_size is None else 48 // group_size, 2**bits - 1
    assert scale.shape == (3, 5, groups)
    parts = x.double().reshape(3, 5, groups, -1)
    least, most = parts.amin(-1).clamp(max=0) * clip_ratio, parts.amax(-1).clamp(min=0) * clip_ratio
    wanted_scale = (most - least) / levels
    torch.testing.assert_close(scale.double(), wanted_scale, rtol=1e-6, atol=0)
    zero_point = (-least / wanted_scale).round().unsqueeze(-1)
    exact = parts / wanted_scale.unsqueeze(-1)
    wanted = (exact.round() + zero_point).clamp(0, levels) - zero_point
    tie = (exact - exact.floor() - 0.5).abs() < 1e-4
    assert torch.equal(integers.reshape(parts.shape)[~tie].double(), wanted[~tie])
    assert (int(integers[0, 0].min()) >= 0, int(integers[0, 0].max())) == (True, levels)
    assert (int(integers[0, 1].max()) <= 0, int(integers[0, 1].min())) == (True, -levels)


def test_an_asymmetric_grid_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = activations(6, 32) - 0.4
    arguments = QuantizationArgs(num_bits=4, symmetric=False, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    ends = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    stock_scale, stock_zero_point = calculate_qparams(*ends, arguments)
    _, integers, scale = public_quantize_activations(x, InputQuantization(4, symmetric=False))
    torch.testing.assert_close(scale, stock_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        integers * scale, fake_quantize(x, stock_scale, stock_zero_point, arguments), rtol=1e-5, atol=1e-6
    )


def test_zero_points_use_the_whole_grid_for_numbers_of_one_sign() -> None:
    x = activations(20, 64).abs()
    errors = []
    for symmetric in (True, False):
        _, integers, scale = public_quantize_activations(x, InputQuantization(4, symmetric=symmetric))
        errors.append(float((integers * scale - x).square().mean()))
    assert errors[1] < 0.3 * errors[0]  # half the step is a quarter of the squared error


def test_asymmetric_grids_of_rows_that_are_not_ordinary() -> None:
    x = torch.zeros(5, 8)
    x[1, 2] = 1e-45
    x[2, :2] = torch.tensor([3e38, -3e38])  # the range is more than float32 holds
    x[3, 4], x[4, 5] = float("nan"), float("-inf")
    _, integers, scale = public_quantize_activations(x, InputQuantization(4, symmetric=False))
    assert scale[:2].tolist() == [[0], [0]]
    assert integers[2].tolist()[2:] == [0] * 6
    torch.testing.assert_close(integers[2, :2] * scale[2], x[2, :2], rtol=0.1, atol=0)
    assert scale[3].isnan()
    assert scale[4].isinf()
    assert not integers[[0, 1, 3, 4]].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1.0, None, 4), "needs a group_size"),
        ((5, 1.0, 8, 4), "do not fit into 8 bits"),
        ((4, 1.0, 8, 0), "8 bits"),
        ((4, 1.0, 8, 4, False), "goes with symmetric integers"),
        ((8, 1.0, None, None, False), "inputs of 8 bits less their zero points do not fit into 8 bits; use 7"),
    ],
)
def test_grids_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputQuantization(*arguments)


@pytest.mark.parametrize("bits", [4, 8])
def test_scale_is_that_of_compressed_tensors(bits: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.utils import calculate_qparams

    x = activations(6, 32)
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    torch.testing.assert_close(
        quantize_activations(x, bits)[1], calculate_qparams(low, high, arguments)[0], rtol=1e-6, atol=0
    )


def test_rounding_error_is_half_a_step_inside_the_grid() -> None:
    x = activations(20, 64)
    integers, scale = quantize_activations(x, 8)
    inside = integers < 127  # the largest positive value lies half a step outside
    assert bool(((integers * scale - x).abs()[inside] <= (0.5001 * scale.expand_as(x))[inside]).all())


def test_zero_row_gives_zero_scale_and_integers() -> None:
    x = activations(3, 16)
    x[1] = 0
    integers, scale = quantize_activations(x, 4)
    assert scale[1].item() == 0
    assert not integers[1].any()
    assert bool((scale[[0, 2]] > 0).all())


def test_one_huge_value_takes_the_whole_grid() -> None:
    x = torch.ones(1, 16)
    x[0, 3] = -3e38
    integers, scale = quantize_activations(x, 4)
    assert bool(torch.isfinite(scale).all())
    assert integers[0, 3] in (-7, -8)  # a tie
    assert int((integers != 0).sum()) == 1


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-37, 1e-30])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tiny_values_give_finite_results(magnitude: float, bits: int) -> None:
    x = torch.tensor([[magnitude, -magnitude, 0.0, magnitude / 3]])
    integers, scale = quantize_activations(x, bits)
    assert bool(torch.isfinite(scale).all())
    assert bool(((scale == 0) | torch.isfinite(1 / scale)).all()), "a kernel multiplies by the inverse"
    assert integers[0, 2] == 0, "a zero must stay a zero"
    # Below the smallest normal float32 a token may count as zero; otherwise it is rounded like any other.
    assert bool(((integers * scale - x).abs() <= max(1.2e-38 * 128, magnitude * 0.7)).all())
    if magnitude >= 1e-37 and bits == 4:
        assert integers.tolist() in ([[7, -7, 0, 2]], [[7, -8, 0, 2]])  # -7.5 is a tie


def test_half_precision_input_is_computed_in_float32() -> None:
    x = activations(4, 32).bfloat16()
    integers, scale = quantize_activations(x, 4, 0.92)
    wanted_integers, wanted_scale = quantize_activations(x.float(), 4, 0.92)
    assert torch.equal(integers, wanted_integers)
    assert torch.equal(scale, wanted_scale)


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_size \(20\) must divide the width of the activations \(48\)"):
        quantize_activations(activations(2, 48), 4, group_size=20)
