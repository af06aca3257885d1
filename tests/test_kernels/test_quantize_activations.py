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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 1.0, None, 4), "needs a group_size"), ((5, 1.0, 8, 4), "do not fit into 8 bits"), ((4, 1.0, 8, 0), "8 bits")],
)
def test_sub_scales_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
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
