"""Linears that share one input, quantized together."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, IntegerGrid, fake_quantize, split_input
from torch import nn

from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.quantization.group import GroupMoments, InputMoments, MomentSums, WeightQuantization, quantize_group

WIDTH, RANK = 40, 8


def make_linears(split: InputSplit, rows: tuple[int, ...] = (24, 8)) -> list[QuadLinear]:
    generator = torch.Generator().manual_seed(0)
    linears = []
    for index, out in enumerate(rows):
        linear = QuadLinear(nn.Linear(split.width, out, bias=index == 0), f"part{index}")
        linear.take_bias()
        weight = torch.randn(out, split.width, generator=generator) / split.width**0.5
        outlier, residual = split_input(weight, split)
        linear.set_weights(split, residual, outlier, linear.bias)
        linears.append(linear)
    return linears


def inputs(tokens: int = 400) -> torch.Tensor:
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5
    x[:, :RANK] *= 10
    return x


SPLITS = {
    "U-type": InputSplit(WIDTH, RANK),
    "D-type": InputSplit(WIDTH, 2, 10, keep_width=True, hadamard=True),
    "plain": InputSplit(WIDTH),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_moments_are_those_of_what_the_runtime_sees(split: InputSplit) -> None:
    linear = make_linears(split)[0]
    linear.input_quantization = InputQuantization(4, 0.92)
    x = inputs()
    moments = InputMoments(linear, False)
    for chunk in x.split(130):
        moments.add(chunk, None)
    outlier, residual = split_input(x, split)
    seen = fake_quantize(residual, linear.input_quantization).double()
    seen = seen if outlier is None else torch.cat([seen, outlier.double()], dim=1)
    hessian = GroupMoments.of(moments.sums(), x.device).hessian
    torch.testing.assert_close(hessian, seen.T @ seen / 400, rtol=1e-5, atol=1e-5)
    assert hessian.shape[0] == split.residual_width + split.rank


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE_AMX"])
def test_the_drift_is_that_of_the_original_on_any_processor(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)  # what oneDNN may use decides the dtype of the products
    linear = make_linears(SPLITS["plain"])[0]
    x = inputs()
    original = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    moments = InputMoments(linear, True)
    for part, other in zip(x.split(130), original.split(130), strict=True):
        moments.add(part, other)
    wanted = (original - x).double().T @ x.double() / len(x)
    exact = fast_dtype(x.device) == torch.float32
    assert exact or limit != "AVX2"
    tolerance = 1e-6 if exact else 4e-3 * float(wanted.abs().max())
    drift = GroupMoments.of(moments.sums(), x.device).drift
    torch.testing.assert_close(drift, wanted, rtol=0, atol=tolerance)


def sums_of(linear: QuadLinear, x: torch.Tensor, method: str) -> MomentSums | None:
    moments = InputMoments(linear, False)
    moments.add(x, None)
    return moments.sums() if method == "gptq" else None


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_report_and_written_weights(split: InputSplit, method: str) -> None:
    linears, x = make_linears(split), inputs()
    wanted = [linear(x) for linear in linears]
    settings = WeightQuantization(IntegerGrid(4), method)
    scales, report = quantize_group(linears, sums_of(linears[0], x, method), settings, torch.float32, "block.a,b")
    assert report.name == "block.a,b"
    assert [tuple(s.scale.shape) for s in scales] == [(24, 1), (8, 1)]
    for linear, scale in zip(linears, scales, strict=True):
        integers = linear.residual.weight / scale.scale
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
        assert int(integers.round().unique().numel()) <= 16
    bias = linears[0].bias
    error = sum(float((linear(x) - before).square().sum()) for linear, before in zip(linears, wanted, strict=True))
    size = float((wanted[0] - bias).square().sum() + wanted[1].square().sum())
    print(f"measured {error / size:.2e}, reported {report.error:.2e}")
    if method == "gptq":
        assert report.attempts >= 1
        assert error / size == pytest.approx(report.error, rel=0.02)
    else:
        assert (report.attempts, report.damping) == (0, 0.0)


def test_gptq_beats_rtn_on_the_layer_output() -> None:
    x, errors = inputs(), {}
    for method in ("rtn", "gptq"):
        linears = make_linears(SPLITS["U-type"])
        wanted = [linear(x) for linear in linears]
        sums = sums_of(linears[0], x, method)
        quantize_group(linears, sums, WeightQuantization(IntegerGrid(4), method), torch.float32, "x")
        errors[method] = sum(float((m(x) - y).square().sum()) for m, y in zip(linears, wanted, strict=True))
    print(errors)
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_bad_moments_name_the_linears() -> None:
    linears = make_linears(SPLITS["U-type"])
    moments = InputMoments(linears[0], False)
    settings = WeightQuantization(IntegerGrid(4))
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj,k_proj: .*no calibration token"):
        quantize_group(linears, moments.sums(), settings, torch.float32, "layers.3.q_proj,k_proj")
    x = inputs(10)
    x[2, 20] = float("nan")
    with pytest.raises(ValueError, match="1 calibration activations are NaN or infinite"):
        moments.add(x, None)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_moments_of_halves_are_those_of_the_whole(split: InputSplit) -> None:
    linear = make_linears(split)[0]
    whole, halved = InputMoments(linear, True), InputMoments(linear, True, halves=True)
    for tokens in (7, 1, 20):
        x = inputs(tokens)
        whole.add(x, 1.1 * x)
        halved.add(x, 1.1 * x)
    assert halved.sums()["tokens"].sum() == whole.sums()["tokens"].sum() == 28
    both, one = (GroupMoments.of(each.sums(), x.device) for each in (halved, whole))
    torch.testing.assert_close(both.hessian, one.hessian, rtol=1e-4, atol=1e-4)
    assert (both.drift - one.drift).norm() < 1e-2 * one.drift.norm()  # products may be bfloat16
    assert len(both.halves) == 2
    numbers = halved.sums()["tokens"].double() / 28
    for name in ("hessian", "drift"):
        mean = sum(share * getattr(half, name) for share, half in zip(numbers, both.halves, strict=True))
        torch.testing.assert_close(mean, getattr(both, name), rtol=1e-6, atol=1e-9)
    assert one.halves == []


@pytest.mark.parametrize("share", [0.5, "auto"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_dead_inputs_with_error_correction(split: InputSplit, damping: float, share: float | str) -> None:
    linears = make_linears(split)
    wanted = [linear.residual.weight.clone() for linear in linears]
    moments = InputMoments(linears[0], True, halves=share == "auto")
    moments.add(torch.zeros(100, WIDTH), torch.zeros(100, WIDTH))
    settings = WeightQuantization(IntegerGrid(8), damping=damping, sweeps=1, error_correction=share)
    _, report = quantize_group(linears, moments.sums(), settings, torch.float32, "dead")
    assert report.error == 0
    for linear, weight in zip(linears, wanted, strict=True):
        torch.testing.assert_close(linear.residual.weight, weight, rtol=0, atol=5e-3)


@pytest.mark.parametrize("share", [0.5, "auto"])
def test_tokens_that_are_alike_do_not_blow_up_the_weights(share: float | str) -> None:
    """Moments of one direction: everything else in them is rounding error, which error correction must not fit."""
    linears = make_linears(SPLITS["U-type"])
    before = max(float(linear.outlier.weight.abs().max()) for linear in linears)
    x = inputs(1).expand(200, WIDTH).clone()
    x[:, RANK:] *= 1e-7
    moments = InputMoments(linears[0], True, halves=share == "auto")
    moments.add(x, x + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    settings = WeightQuantization(IntegerGrid(4), sweeps=1, error_correction=share)
    quantize_group(linears, moments.sums(), settings, torch.float32, "alike")
    assert max(float(linear.outlier.weight.abs().max()) for linear in linears) < 3 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_zeros_with_several_scales(dtype: torch.dtype) -> None:
    linears = make_linears(SPLITS["U-type"])
    linears[0].residual.weight[3:5].zero_()
    moments = InputMoments(linears[0], False)
    moments.add(inputs(), None)
    settings = WeightQuantization(IntegerGrid(4), scale_candidates=(0.5, 1.0), sweeps=1)
    weights, _ = quantize_group(linears, moments.sums(), settings, dtype, "rows")
    assert bool((weights[0].scale > 0).all())
    assert not linears[0].residual.weight[3:5].any()


def test_bad_inputs_of_the_original_are_refused() -> None:
    x = inputs(10)
    bad = x.clone()
    bad[4, 7] = float("inf")
    linears = make_linears(SPLITS["U-type"])
    moments = InputMoments(linears[0], True)
    moments.add(x, bad)
    settings = WeightQuantization(IntegerGrid(4), error_correction=0.5)
    with pytest.raises(ValueError, match="rows: its inputs in the original model are NaN, infinite"):
        quantize_group(linears, moments.sums(), settings, torch.float32, "rows")


def test_inputs_whose_products_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of up to .*e\+2\d have an infinite square"):
        InputMoments(make_linears(SPLITS["U-type"])[0], False).add(inputs(10) * 1e24, None)
