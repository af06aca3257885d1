"""A layer whose outlier block has integers, too: exact sums of both blocks, on every backend, and its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    QuantizedWeight,
    RMSNorm,
    choose_backend,
    quad_linear,
    quantize_input,
    split_input,
)
from quad_kernels.weight import expand_scales

OUT = 24
SPLITS = {
    "U-type": InputSplit(80, 10),
    "per head": InputSplit(96, 3, 24, keep_width=True),
    "Hadamard": InputSplit(96, 8, 48, keep_width=True, hadamard=True),
}
BITS = InputQuantization(8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weight(width: int, bits: int, groups: int = 1, seed: int = 1) -> QuantizedWeight:
    generator, half = torch.Generator().manual_seed(seed), 2 ** (bits - 1)
    integers = torch.randint(-half, half, (OUT, width), dtype=torch.int8, generator=generator)
    return QuantizedWeight(integers, torch.rand(OUT, groups, generator=generator) / 10 + 0.01, None, width, OUT, bits)


def in_int64(x: torch.Tensor, weight: QuantizedWeight, quantization: InputQuantization) -> torch.Tensor:
    """The product of quantized `x`, its sums in int64, scaled in float64."""
    integers, scale = quantize_input(x, quantization)
    assert scale.shape[1] == weight.scale.shape[1] == 1
    total = integers.long() @ weight.unpacked().long().T
    return total.double() * scale.double() * weight.scale.double().T


def prepared(weight: QuantizedWeight, quantization: InputQuantization, backend: str) -> QuantizedWeight:
    return choose_backend("cpu", backend).prepare_weight(weight, quantization)


@pytest.fixture(params=["reference", "onednn", "native", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        from quad_kernels.integer_linear import autotune

        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled")
        monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("QUAD_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_both_products_are_exact_sums(name: str, dtype: torch.dtype, backend: str) -> None:
    split, low = SPLITS[name], InputQuantization(4, 0.9)
    weight, outlier_weight = make_weight(split.residual_width, 4), make_weight(split.rank, 8, seed=2)
    x, bias = draw(2, 3, split.width).to(dtype), draw(OUT, seed=3).to(dtype)
    got = quad_linear(
        x,
        prepared(weight, low, backend),
        split,
        low,
        outlier_weight=prepared(outlier_weight, BITS, backend),
        outlier_quantization=BITS,
        bias=bias,
    )
    assert got.dtype == dtype
    outlier, residual = split_input(x.reshape(-1, split.width), split)
    wanted = in_int64(residual, weight, low) + in_int64(outlier, outlier_weight, BITS) + bias.double()
    # Three sums in float32, and one rounding. Backends may transform an input to another last bit.
    step = float(low.clip_ratio * residual.float().abs().max() / 7.5 * weight.scale.max() * 8)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    if split.hadamard and dtype == torch.bfloat16:
        assert float((got.double().flatten(0, 1) - wanted).abs().max()) < 2 * step
    else:
        torch.testing.assert_close(got.double().flatten(0, 1), wanted, **bound)


def test_outlier_inputs_have_a_scale_of_their_own() -> None:
    """Large outliers cost the residual nothing, and the other way round."""
    split = SPLITS["U-type"]
    weight, outlier_weight = make_weight(70, 4), make_weight(10, 8, seed=2)
    x = draw(4, 80)
    large = x.clone()
    large[:, :10] *= 1024  # a power of two: no tie falls the other way

    def layer(inputs: torch.Tensor) -> torch.Tensor:
        return quad_linear(
            inputs,
            weight,
            split,
            InputQuantization(4),
            outlier_weight=outlier_weight,
            outlier_quantization=BITS,
        ).double()

    outlier = in_int64(x[:, :10], outlier_weight, BITS)
    torch.testing.assert_close(layer(large) - layer(x), 1023 * outlier, rtol=1e-3, atol=1e-2)


def test_full_precision_inputs_on_integers(backend: str) -> None:
    split = SPLITS["per head"]
    weight, outlier_weight = make_weight(96, 4), make_weight(12, 8, seed=2)
    x, low = draw(5, 96), InputQuantization(4)
    packed = prepared(outlier_weight, BITS, backend)
    got = quad_linear(x, prepared(weight, low, backend), split, low, outlier_weight=packed)
    outlier, residual = split_input(x, split)
    wanted = in_int64(residual, weight, low) + outlier.double() @ outlier_weight.dequantized(torch.float64).T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_groups_beside_outliers_of_one_scale(backend: str) -> None:
    split, low = SPLITS["per head"], InputQuantization(4, 1.0, 24)
    weight, outlier_weight = make_weight(96, 4), make_weight(12, 8, seed=2)
    x = draw(5, 96)
    high = prepared(outlier_weight, BITS, backend)
    residual_weight = prepared(weight, low, backend)
    got = quad_linear(x, residual_weight, split, low, outlier_weight=high, outlier_quantization=BITS)
    outlier, residual = split_input(x, split)
    integers, scale = quantize_input(residual, low)
    wanted = (integers * expand_scales(scale, 96)).double() @ weight.dequantized(torch.float64).T
    wanted = wanted + in_int64(outlier, outlier_weight, BITS)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
def test_gradients_are_those_of_the_unrounded_layer(name: str, clip_ratio: float) -> None:
    """Straight through both roundings; a clipped residual coordinate has none, as in a layer without 8-bit outliers."""
    split, low = SPLITS[name], InputQuantization(4, clip_ratio)
    weight, outlier_weight = make_weight(split.residual_width, 4), make_weight(split.rank, 8, seed=2)
    bias, grad = draw(OUT, seed=5), draw(2, 3, OUT, seed=4)
    results = []
    for own in (True, False):
        x = draw(2, 3, split.width).requires_grad_()
        scale, high = weight.scale.clone().requires_grad_(), outlier_weight.scale.clone().requires_grad_()
        quantized = replace(outlier_weight, scale=high)
        dense = outlier_weight.unpacked().float() * high
        y = quad_linear(
            x,
            replace(weight, scale=scale),
            split,
            low,
            outlier_weight=quantized if own else dense,
            outlier_quantization=BITS if own else None,
            bias=bias,
        )
        y.backward(grad)
        results.append((y.detach(), x.grad, scale.grad, high.grad))
    for ours, others, bound in zip(*results, (0.05, 1e-4, 1e-4, 0.02), strict=True):
        assert float((ours - others).norm() / others.norm()) < bound
    with torch.no_grad():
        again = quad_linear(
            draw(2, 3, split.width), weight, split, low, outlier_weight=outlier_weight, outlier_quantization=BITS,
            bias=bias,
        )  # fmt: skip
    assert torch.equal(again, results[0][0])


def test_in_a_compiled_graph_and_behind_a_norm() -> None:
    split, low = SPLITS["U-type"], InputQuantization(4)
    weight, outlier_weight = make_weight(70, 4), make_weight(10, 8, seed=2)
    norm = RMSNorm(1 + draw(80, seed=7) / 10, 1e-5)

    def layer(x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor:
        return quad_linear(x, weight, split, low, outlier_weight=outlier_weight, outlier_quantization=BITS, norm=norm)

    x = draw(4, 80)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))
        assert torch.equal(layer(x, norm), layer(norm(x)))


def test_parts_that_do_not_fit() -> None:
    split, low = SPLITS["U-type"], InputQuantization(4)
    x, weight = draw(2, 80), make_weight(70, 4)
    with pytest.raises(ValueError, match="the outlier weight has 9 inputs, the split 10"):
        quad_linear(x, weight, split, low, outlier_weight=make_weight(9, 8), outlier_quantization=BITS)
    with pytest.raises(ValueError, match="quantized outlier inputs need a quantized outlier weight"):
        quad_linear(x, weight, split, low, outlier_weight=draw(OUT, 10), outlier_quantization=BITS)
