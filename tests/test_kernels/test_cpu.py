"""The CPU's own quantizer and Hadamard transform against the references."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, RMSNorm, choose_backend, quantize_activations
from quad_kernels.hadamard import hadamard_matrix, plan_hadamard

# The packages' attributes of these names are functions.
quantize_reference = import_module("quad_kernels.quantize_activations.reference").quantize_activations
cpu = import_module("quad_kernels.quantize_activations.cpu")
hadamard_cpu = import_module("quad_kernels.hadamard.cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLITS = {
    "whole": InputSplit(96),
    "stream": InputSplit(104, 8),
    "heads": InputSplit(96, 4, 24, keep_width=True),
    "dropped heads": InputSplit(96, 4, 24),
}
TINY = torch.finfo(torch.float32).tiny


def assert_same(x: torch.Tensor, quantization: InputQuantization, split: InputSplit, **options) -> None:
    own = quantize_activations(x, quantization, split, backend="cpu", **options)
    truth = quantize_reference(x, quantization, split, options.get("norm"), options.get("packed", False))
    for name, a, b in zip(("outlier", "integers", "scale"), own, truth, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.86])
def test_integers_outliers_and_scales_are_the_references(
    dtype: torch.dtype, split: InputSplit, bits: int, clip_ratio: float
) -> None:
    generator = torch.Generator().manual_seed(bits)
    for tokens in (0, 1, 3, 64):
        x = (torch.randn(tokens, split.width, generator=generator) * 3).to(dtype)
        assert_same(x, InputQuantization(bits, clip_ratio), split)


@pytest.mark.parametrize("bits", [4, 8])
def test_ties_fall_as_in_the_reference(bits: int) -> None:
    largest = torch.randn(256, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    steps = torch.linspace(-1, 1, 2 * (2**bits - 1) + 1)  # every integer and every tie between two
    x = largest[:, None] * steps
    assert_same(x, InputQuantization(bits, 1.0), InputSplit(x.shape[1]))


def test_zero_tokens_and_scales_that_are_no_normal_number() -> None:
    x = torch.ones(7, 32)
    x[0] = 0
    for row, scale in enumerate((TINY / 2, TINY * (1 - 2**-23), TINY, TINY * (1 + 2**-23), 1e30), start=1):
        x[row] = scale * 7.5
    x[6, 0] = 1e38
    assert_same(x, InputQuantization(4, 1.0), InputSplit(32))
    scale = quantize_activations(x, InputQuantization(4, 1.0), backend="cpu").scale.flatten()
    assert (scale[:3] == 0).all()
    assert (scale[3:] > 0).all()


def test_norm_groups_and_packing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 136, generator=generator).bfloat16()
    norm = RMSNorm(torch.rand(136, generator=generator).bfloat16(), 1e-5)
    assert_same(x, InputQuantization(4), InputSplit(136, 8), norm=norm)
    assert_same(x, InputQuantization(4, 0.9, group_size=32), InputSplit(136, 8))
    assert_same(x, InputQuantization(4), InputSplit(136, 8), packed=True)


def test_the_input_is_neither_changed_nor_returned() -> None:
    x = torch.randn(2, 96)
    for split in SPLITS.values():
        if split.width != 96:
            continue
        before = x.clone()
        outlier, _, _ = choose_backend("cpu").quantize_activations(x, InputQuantization(), split, None, False)
        assert torch.equal(x, before)
        assert outlier is None or outlier.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [1, 2, 12, 78, 96, 512, 896, 4864, 8192, 14336])
def test_transform_is_the_product_with_the_matrix(size: int) -> None:
    plan = plan_hadamard(size)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    small = hadamard_cpu._small_factors(plan.factors)
    assert torch.tensor(small).prod() == torch.tensor(plan.factors).prod()
    if size <= 4864:
        torch.testing.assert_close(
            hadamard_cpu.apply_hadamard(x, plan), (x.double() @ hadamard_matrix(size)).float(), rtol=1e-5, atol=1e-5
        )
    reference = import_module("quad_kernels.hadamard.reference").apply_hadamard(x, plan)
    torch.testing.assert_close(hadamard_cpu.apply_hadamard(x, plan), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "split",
    [InputSplit(896, 8, 64, keep_width=True, hadamard=True), InputSplit(136, 8, hadamard=True)],
    ids=["keep", "drop"],
)
def test_with_a_transform_few_integers_differ_and_by_one(dtype: torch.dtype, split: InputSplit) -> None:
    x = torch.randn(32, split.width, generator=torch.Generator().manual_seed(2)).to(dtype)
    outlier, integers, scale = quantize_activations(x, InputQuantization(4, 0.86), split, backend="cpu")
    truth = quantize_reference(x, InputQuantization(4, 0.86), split, None, False)
    assert torch.equal(outlier, truth[0])
    difference = (integers.int() - truth[1].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3
    torch.testing.assert_close(
        scale,
        truth[2],
        rtol=8 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps,
        atol=0,
    )


def test_the_arguments_of_the_tests_matter() -> None:
    x = torch.randn(4, 104)
    own = quantize_activations(x, InputQuantization(4), SPLITS["stream"], backend="cpu")
    other = quantize_reference(x, InputQuantization(4, 0.86), SPLITS["stream"], None, False)
    assert not torch.equal(own.integers, other[1])


@pytest.mark.parametrize("packed", [False, True])
def test_many_tokens_are_worked_off_in_parts(packed: bool) -> None:
    """Each token's result is that of the token alone."""
    split, quantization = InputSplit(96, 8, 48, keep_width=True, hadamard=True), InputQuantization(4, 0.86)
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(7)).bfloat16()
    whole = cpu.quantize_activations(x, quantization, split, RMSNorm(None, 1e-5), packed)
    for start, stop in ((0, 1), (127, 129), (250, 300)):
        part = cpu.quantize_activations(x[start:stop], quantization, split, RMSNorm(None, 1e-5), packed)
        for ours, wanted in zip(whole, part, strict=True):
            assert ours is not None
            assert torch.equal(ours[start:stop], wanted)
