"""Activation quantizer in Triton: bit for bit the reference's integers and scales."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, QuantizedActivations, RMSNorm, ops, quantize_activations

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
W4 = InputQuantization(4, 0.9)

# (split, quantization): every path of the kernel, widths that are no power of two, one and many blocks.
CASES = {
    "plain": (InputSplit(256), W4),
    "one column": (InputSplit(1), W4),
    "odd": (InputSplit(63), InputQuantization(3, 1.0)),
    "U-type": (InputSplit(576 + 72, 72), W4),
    "U-type odd": (InputSplit(203, 7), InputQuantization(8, 1.0)),
    "blocks": (InputSplit(96, 4, 24), W4),
    "blocks zeroed": (InputSplit(576, 8, 64, keep_width=True), InputQuantization(4, 1.0)),
    "one block zeroed": (InputSplit(300, 20, 0, keep_width=True), InputQuantization(2, 0.8)),
    "groups": (InputSplit(256 + 16, 16), InputQuantization(4, 0.9, 64)),
    "groups of 128": (InputSplit(384), InputQuantization(4, 1.0, 128)),
    "odd groups": (InputSplit(96, 4, 24), InputQuantization(8, 1.0, 20)),
    "groups of 1": (InputSplit(8), InputQuantization(4, 1.0, 1)),
    "zero points": (InputSplit(576 + 72, 72), InputQuantization(4, 0.9, symmetric=False)),
    "zero points of groups": (InputSplit(384), InputQuantization(4, 1.0, 128, symmetric=False)),
    "zero points, odd": (InputSplit(203, 7), InputQuantization(7, 1.0, symmetric=False)),
    "zero points, blocks": (InputSplit(576, 8, 64, keep_width=True), InputQuantization(3, 1.0, symmetric=False)),
    "sub-scales": (InputSplit(256 + 16, 16), InputQuantization(4, 0.9, 32, 4)),
    "sub-scales of odd groups": (InputSplit(96, 4, 24), InputQuantization(3, 1.0, 20, 4)),
    "sub-scales of wide groups": (InputSplit(576), InputQuantization(4, 1.0, 192, 4)),
    "NVFP4": (InputSplit(256 + 16, 16), InputQuantization(4, 0.9, 16, number_format="nvfp4")),
    "NVFP4, blocks": (InputSplit(96, 4, 24), InputQuantization(group_size=16, number_format="nvfp4")),
    "four over six": (
        InputSplit(576 + 72, 72),
        InputQuantization(4, 1.0, 16, number_format="nvfp4", four_over_six=True),
    ),
    "MXFP4": (InputSplit(576, 8, 64, keep_width=True), InputQuantization(group_size=32, number_format="mxfp4")),
    "sub-scales, one group": (InputSplit(64, 4, 16, keep_width=True), InputQuantization(4, 0.9, 64, 4)),
}


def activations(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * width)
    return (3 * torch.randn(tokens, width, generator=generator)).to(dtype)


def check_exact(
    device: torch.device,
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit | None = None,
    packed: bool = False,
) -> QuantizedActivations:
    got = quantize_activations(x.to(device), quantization, split, packed=packed)
    wanted = quantize_activations(x.cpu(), quantization, split, packed=packed, backend="reference")
    assert (got.outlier is None) == (wanted.outlier is None)
    for tensor, truth in zip(got, wanted, strict=True):
        if tensor is not None and truth is not None:
            assert tensor.dtype == truth.dtype
            torch.testing.assert_close(tensor.cpu(), truth, rtol=0, atol=0, equal_nan=True)
    return got


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_equals_the_reference(device: torch.device, tokens: int, case: str, dtype: torch.dtype) -> None:
    split, quantization = CASES[case]
    check_exact(device, activations(tokens, split.width, dtype), quantization, split)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [name for name, (_, quantization) in CASES.items() if quantization.integer_bits <= 4])
def test_packed_equals_the_reference(device: torch.device, case: str) -> None:
    split, quantization = CASES[case]
    check_exact(device, activations(5, split.width, torch.bfloat16), quantization, split, packed=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [63, 1000])
def test_many_tokens(device: torch.device, tokens: int) -> None:
    check_exact(device, activations(tokens, 40, torch.bfloat16), W4, InputSplit(40, 8))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [4864, 11008, 28672])
def test_wide_rows(device: torch.device, width: int) -> None:
    check_exact(device, activations(1, width, torch.bfloat16), W4, InputSplit(width, 64, 0, keep_width=True))


def test_rows_too_wide_for_registers_run_the_reference(device: torch.device) -> None:
    check_exact(device, activations(1, 40000, torch.bfloat16), W4)


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(device: torch.device, packed: bool) -> None:
    got = check_exact(device, torch.empty(0, 40), W4, InputSplit(40, 8), packed)
    assert got.scale.shape == (0, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_round_to_even_of_the_true_quotient(device: torch.device, dtype: torch.dtype, bits: int) -> None:
    """Multiples of half a step: at clip ratio 1 the largest value itself lies on a tie."""
    steps = torch.arange(-(2**bits) + 1, 2**bits).float() / 2
    factors = torch.tensor([1.0, 1 / 3, 0.1, 1.7e-3, 1 + 2**-7]).unsqueeze(1)
    check_exact(device, (steps * factors).to(dtype), InputQuantization(bits, 1.0))


def test_division_is_correctly_rounded(device: torch.device) -> None:
    """Random mantissas beside ties, at magnitudes from subnormal to almost infinite."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-126, 126, 3).unsqueeze(1)
    largest = torch.ldexp(1 + torch.rand(len(exponents), 1, generator=generator), exponents)
    ties = torch.randint(-8, 8, (len(exponents), 256), generator=generator) + 0.5
    jitter = torch.randint(-2, 3, ties.shape, generator=generator) * 2.0**-23
    x = torch.cat([largest, largest / 7.5 * ties * (1 + jitter)], dim=1).clamp(-largest, largest)
    check_exact(device, x, InputQuantization(4, 1.0))


def test_zero_tiny_and_huge_tokens(device: torch.device) -> None:
    x = activations(7, 72, torch.float32)
    x[0] = 0
    x[1] *= 1e-45
    x[2] *= 1e-39
    x[3] *= 1e-37
    x[4, 5] = 3e38
    x[5] = 1e38
    got = check_exact(device, x, W4, InputSplit(72, 8))
    assert got.scale[0].item() == 0
    assert int(got.integers[:2].abs().max()) == 0
    assert int(got.integers[4].abs().max()) >= 7  # coordinate 5 is an outlier and does not spoil the grid


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_huge_value(device: torch.device, dtype: torch.dtype) -> None:
    x = activations(3, 72, dtype)
    x[1, 20] = -6e4
    got = check_exact(device, x, InputQuantization(4, 1.0))
    assert got.integers[1].cpu().nonzero().tolist() == [[20]]
    assert got.integers[1, 20].item() == -8


@pytest.mark.filterwarnings("ignore:.*value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_shows_in_the_scale(device: torch.device, value: float, dtype: torch.dtype) -> None:
    """Integers 0 and a scale that is not finite: every output of the layer is NaN, for that token alone."""
    x = activations(3, 200, dtype)
    x[1, 150] = value
    got = quantize_activations(x.to(device), W4, InputSplit(200, 8))
    assert got.scale.isfinite().squeeze(1).tolist() == [True, False, True]
    assert int(got.integers[1].abs().max()) == 0
    rest = torch.tensor([0, 2])
    wanted = quantize_activations(x[rest], W4, InputSplit(200, 8), backend="reference")
    assert torch.equal(got.integers.cpu()[rest], wanted.integers)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:-3],
        lambda x: x[::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(4, -1),
        lambda x: x.unflatten(0, (2, 3)).transpose(0, 1),
    ],
    ids=["columns", "rows", "transposed", "expanded", "batch"],
)
def test_inputs_that_are_not_contiguous(device: torch.device, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(activations(6, 90, torch.bfloat16).to(device))
    check_exact(device, x, W4, InputSplit(x.shape[-1], 6))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weight", [None, "x", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["U-type", "U-type odd", "blocks zeroed", "groups"])
def test_norm(device: torch.device, case: str, dtype: torch.dtype, weight: str | None) -> None:
    """Another order of summation: a value beside a tie may be rounded the other way, and so may its integer."""
    split, quantization = CASES[case]
    x = activations(5, split.width, dtype)
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(split.width, generator=generator).to(dtype if weight == "x" else torch.float32)
    got = quantize_activations(
        x.to(device), quantization, split, norm=RMSNorm(None if weight is None else scale.to(device), 1e-5)
    )
    norm = RMSNorm(None if weight is None else scale, 1e-5)
    wanted = quantize_activations(x, quantization, split, norm=norm, backend="reference")
    unit = torch.finfo(dtype).eps
    assert got.outlier is not None
    assert wanted.outlier is not None
    torch.testing.assert_close(got.outlier.cpu(), wanted.outlier, rtol=2 * unit, atol=0)
    torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=2 * unit, atol=0)
    difference = (got.integers.cpu().int() - wanted.integers.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.count_nonzero()) <= 0.01 * difference.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operator_contract(device: torch.device, dtype: torch.dtype) -> None:
    """Schema, fake shapes and strides, tracing."""
    x = activations(3, 48, dtype).to(device)
    tail = (8, 0, False, False, None, -1.0)
    for arguments in (
        (x, 4, 0.9, 0, 0, True, *tail, False, "triton"),
        (x, 4, 0.9, 0, 0, False, *tail, False, "triton"),
        (x, 4, 0.9, 0, 0, True, *tail, True, "triton"),
        (x, 4, 0.9, 20, 0, True, *tail, False, "triton"),
        (x, 4, 0.9, 20, 4, True, *tail, False, "triton"),
        (x, 4, 0.9, 0, 0, True, 4, 24, True, False, None, 1e-6, False, "triton"),
    ):
        assert set(torch.library.opcheck(ops.quantize_activations, arguments).values()) == {"SUCCESS"}, arguments


@pytest.mark.gpu
@pytest.mark.parametrize("case", [InputSplit(4160, 64), InputSplit(14336, 64, 0, True)], ids=["U", "D"])
def test_large(device: torch.device, case: InputSplit) -> None:
    check_exact(device, activations(1000, case.width, torch.bfloat16), W4, case)
