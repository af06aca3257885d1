"""The CPU's own quantizer and Hadamard transform against the references, and its layouts of weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    QuantizedWeight,
    RMSNorm,
    choose_backend,
    integer_linear,
    prepare_weight,
    quantize_activations,
)
from quad_kernels.hadamard import hadamard_matrix, plan_hadamard, reference, small_factors
from quad_kernels.integer_linear.onednn import onednn_takes
from quad_kernels.quantize_activations import few_passes
from quad_kernels.quantize_activations.reference import quantize_activations as quantize_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLITS = {
    "whole": InputSplit(96),
    "stream": InputSplit(104, 8),
    "heads": InputSplit(96, 4, 24, keep_width=True),
    "dropped heads": InputSplit(96, 4, 24),
}
TINY = torch.finfo(torch.float32).tiny


def assert_same(x: torch.Tensor, quantization: InputQuantization, split: InputSplit, **options) -> None:
    own = quantize_activations(x, quantization, split, backend="onednn", **options)
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
    scale = quantize_activations(x, InputQuantization(4, 1.0), backend="onednn").scale.flatten()
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
    for split in SPLITS.values():
        x = torch.randn(2, split.width)
        before = x.clone()
        outlier, _, _ = choose_backend("cpu", "onednn").quantize_activations(x, InputQuantization(), split, None, False)
        assert torch.equal(x, before)
        assert outlier is None or outlier.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [1, 2, 12, 78, 96, 512, 896, 4864, 8192, 14336])
def test_transform_is_the_product_with_the_matrix(size: int) -> None:
    plan = plan_hadamard(size)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    small = small_factors.split_factors(plan.factors)
    assert torch.tensor(small).prod() == torch.tensor(plan.factors).prod()
    if size <= 4864:
        torch.testing.assert_close(
            small_factors.apply_hadamard(x, plan), (x.double() @ hadamard_matrix(size)).float(), rtol=1e-5, atol=1e-5
        )
    wanted = reference.apply_hadamard(x, plan)
    torch.testing.assert_close(small_factors.apply_hadamard(x, plan), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "split",
    [InputSplit(896, 8, 64, keep_width=True, hadamard=True), InputSplit(136, 8, hadamard=True)],
    ids=["keep", "drop"],
)
def test_with_a_transform_few_integers_differ_and_by_one(dtype: torch.dtype, split: InputSplit) -> None:
    x = torch.randn(32, split.width, generator=torch.Generator().manual_seed(2)).to(dtype)
    outlier, integers, scale = quantize_activations(x, InputQuantization(4, 0.86), split, backend="onednn")
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
    own = quantize_activations(x, InputQuantization(4), SPLITS["stream"], backend="onednn")
    other = quantize_reference(x, InputQuantization(4, 0.86), SPLITS["stream"], None, False)
    assert not torch.equal(own.integers, other[1])


@pytest.mark.parametrize("packed", [False, True])
def test_many_tokens_are_computed_in_parts(packed: bool) -> None:
    """Each token's result is that of the token alone."""
    split, quantization = InputSplit(96, 8, 48, keep_width=True, hadamard=True), InputQuantization(4, 0.86)
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(7)).bfloat16()
    whole = few_passes.quantize_activations(x, quantization, split, RMSNorm(None, 1e-5), packed)
    for start, stop in ((0, 1), (127, 129), (250, 300)):
        part = few_passes.quantize_activations(x[start:stop], quantization, split, RMSNorm(None, 1e-5), packed)
        for ours, wanted in zip(whole, part, strict=True):
            assert ours is not None
            assert torch.equal(ours[start:stop], wanted)


WIDTH = 64


def make_weight() -> QuantizedWeight:
    generator = torch.Generator().manual_seed(8)
    integers = torch.randint(-8, 8, (24, WIDTH), dtype=torch.int8, generator=generator)
    return QuantizedWeight(integers, torch.rand(24, 1, generator=generator) + 0.1, None, WIDTH, 24, 4)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layouts of the weights that are converted, one for each time."""
    seen: list[str] = []
    unpacked = QuantizedWeight.unpacked

    def spy(weight: QuantizedWeight) -> torch.Tensor:
        seen.append(weight.layout)
        return unpacked(weight)

    monkeypatch.setattr(QuantizedWeight, "unpacked", spy)
    return seen


@pytest.mark.parametrize(
    ("quantization", "per_token"),
    [
        (InputQuantization(4), True),
        (InputQuantization(4, group_size=WIDTH), True),
        (InputQuantization(4, group_size=16), False),
        (None, False),
    ],
    ids=str,
)
def test_weights_are_stored_for_the_product_that_their_inputs_allow(
    quantization: InputQuantization | None, per_token: bool, conversions: list[str]
) -> None:
    plain = make_weight()
    weight = prepare_weight(
        plain.to_words(), plain.scale, bits=4, in_features=WIDTH, quantization=quantization, backend="onednn"
    )
    assert weight.layout == ("onednn" if per_token and onednn_takes(plain) else "int8")
    conversions.clear()
    if quantization is not None:
        _, integers, scale = quantize_activations(torch.randn(300, WIDTH), quantization, backend="onednn")
        integer_linear(integers, scale, weight, backend="onednn")
    assert conversions == [], "the layer converts its weight in every call"


@pytest.mark.parametrize(("layout", "groups"), [("nibbles", 1), ("nibbles", 4), ("onednn", 4)])
def test_a_weight_in_another_layout_is_converted_once_for_all_tokens(
    layout: str, groups: int, conversions: list[str]
) -> None:
    if layout == "onednn" and not onednn_takes(make_weight()):
        pytest.skip("this processor or build has no exact oneDNN product")
    weight = make_weight().to_layout(layout)
    conversions.clear()
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(-8, 8, (300, WIDTH), dtype=torch.int8, generator=generator)
    x_scale = torch.rand(300, groups, generator=generator)
    y = integer_linear(x, x_scale, weight, backend="onednn")
    assert conversions == [layout]
    torch.testing.assert_close(y, integer_linear(x, x_scale, make_weight(), backend="reference"), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", ["int8", "onednn"])
def test_no_tokens(layout: str) -> None:
    weight = make_weight().to_layout(layout)
    x, x_scale = torch.zeros(2, 0, WIDTH, dtype=torch.int8), torch.zeros(2, 0, 1)
    y = integer_linear(x, x_scale, weight, bias=torch.ones(24), out_dtype=torch.bfloat16, backend="onednn")
    assert (y.shape, y.dtype) == ((2, 0, 24), torch.bfloat16)


_WITHOUT_VNNI = """
import torch
from quad_kernels import InputQuantization, QuantizedWeight, integer_linear
from quad_kernels.backends import choose_backend
from quad_kernels.integer_linear import onednn

backend = choose_backend("cpu", "onednn")
for bits in (4, 8):
    for x_bits in (4, 8):
        half, x_half = 2 ** (bits - 1), 2 ** (x_bits - 1)
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(-half, half, (40, 256), dtype=torch.int8, generator=generator)
        integers[0], integers[1] = -half, half - 1
        weight = QuantizedWeight(integers, torch.ones(40, 1), None, 256, 40, bits)
        stored = backend.prepare_weight(weight, InputQuantization(x_bits))
        print(onednn._exact_bits(), bits, x_bits, stored.layout)
        for tokens in (1, 6, 40):
            x = torch.randint(-x_half, x_half, (tokens, 256), dtype=torch.int8, generator=generator)
            x[0] = -x_half
            x[-1] = x_half - 1
            wanted = (x.long() @ integers.long().T).float()
            for layout in (stored, weight.to_layout("onednn")):
                assert torch.equal(integer_linear(x, torch.ones(tokens, 1), layout, backend="onednn"), wanted)
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "ALL"])
def test_sums_are_exact_on_processors_without_vnni(isa: str) -> None:
    """oneDNN pretends to run on an older processor, whose pairs of products saturate."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_VNNI], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    if isa == "AVX2":
        assert done.stdout.splitlines() == ["4 4 4 onednn", "4 4 8 int8", "4 8 4 onednn", "4 8 8 int8"]
