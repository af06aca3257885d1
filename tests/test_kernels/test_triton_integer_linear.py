"""The Triton kernel of the integer linear layer; without a GPU in Triton's interpreter, see conftest.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    LinearOperands,
    NumberFormat,
    QuantizedWeight,
    WeightLayout,
    choose_backend,
    float4,
    integer_linear,
    quad_linear,
)
from quad_kernels.integer_linear.config import SPLITS, TILES, Config
from quad_kernels.layouts import register_layout, temporary_layouts
from quad_kernels.packing import pack_nibbles

from .native_weights import random_float4

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("own_cache")


def integers(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001).to(dtype)


def linear_weight(
    values: torch.Tensor, bits: int, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None
) -> QuantizedWeight:
    scale = torch.ones(len(values), 1) if scale is None else scale
    return QuantizedWeight(values, scale, zero_point, values.shape[1], len(values), bits).to_layout("nibbles")


def moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    zero = None if weight.zero_point is None else weight.zero_point.to(device)
    sub_scale = None if weight.sub_scale is None else weight.sub_scale.to(device)
    integers, scale = weight.integers.to(device), weight.scale.to(device)
    return replace(weight, integers=integers, scale=scale, zero_point=zero, sub_scale=sub_scale)


def on(device: torch.device, **tensors: torch.Tensor | None) -> dict[str, Any]:
    return {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The integer sums, rounded once: float64 holds them exactly."""
    return (x.double() @ weight.unpacked().double().T).float()


def assert_rounded_alike(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both sum in float32, in another order, and round once: they differ by at most one step of the output."""
    bound = float(2e-6 * wanted.float().abs().max())
    torch.testing.assert_close(got.cpu(), wanted, rtol=torch.finfo(wanted.dtype).eps, atol=bound)


def run_config(
    config: Config,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    from quad_kernels.integer_linear import launch

    return launch.integer_linear(LinearOperands(x, x_scale, weight, None, None, None, out_dtype), config)


# --- the integer part ---


@pytest.mark.parametrize(
    ("x_bits", "w_bits", "packed"),
    [(4, 4, False), (8, 4, False), (4, 4, True), (8, 8, False), (4, 8, True), (4, 2, False)],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 63), (3, 64, 576), (16, 33, 256), (63, 20, 130), (2, 1, 1)])
@pytest.mark.usefixtures("poisoned")
def test_integer_sum_is_exact(
    m: int, n: int, k: int, x_bits: int, w_bits: int, packed: bool, device: torch.device
) -> None:
    x, weight = integers((m, k), x_bits, 0), linear_weight(integers((n, k), w_bits, 1), w_bits)
    got = integer_linear(
        (pack_nibbles(x) if packed else x).to(device), torch.ones(m, 1).to(device), moved(weight, device)
    )
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), exact(x, weight))


@pytest.mark.usefixtures("poisoned")
def test_integer_sum_of_many_tokens_is_exact(device: torch.device) -> None:
    x, weight = integers((1000, 200), 8, 0), linear_weight(integers((70, 200), 4, 1), 4)
    got = integer_linear(x.to(device), torch.ones(1000, 1).to(device), moved(weight, device))
    assert torch.equal(got.cpu(), exact(x, weight))


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.usefixtures("poisoned")
def test_every_tile_and_split_gives_the_same_integers(tile: tuple[int, ...], device: torch.device) -> None:
    block_m, block_n, block_k, warps, stages = tile
    x, weight = integers((5, 700), 8, 0), linear_weight(integers((20, 700), 4, 1), 4)
    for split in SPLITS if block_m * block_n <= 16 * 64 else SPLITS[:2]:  # large tiles are slow in the interpreter
        config = Config(block_m, block_n, block_k, split, warps, stages)
        got = run_config(config, x.to(device), torch.ones(5, 1).to(device), moved(weight, device))
        assert torch.equal(got.cpu(), exact(x, weight)), config


@pytest.mark.parametrize("config", [Config(16, 64, 128, 1, 4, 4), Config(16, 64, 128, 4, 4, 4)])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.usefixtures("poisoned")
def test_tiles_beyond_every_edge(config: Config, w_bits: int, device: torch.device) -> None:
    """Several tiles in both directions, more than a band of them, none of the sizes a multiple of a tile."""
    m, n, k = 16 * 9 + 5, 64 * 2 + 9, 128 * 4 + 77
    x, weight = integers((m, k), 8, 0), linear_weight(integers((n, k), w_bits, 1), w_bits)
    got = run_config(config, x.to(device), torch.ones(m, 1).to(device), moved(weight, device))
    assert torch.equal(got.cpu(), exact(x, weight))


@pytest.mark.parametrize(("x_value", "w_value"), [(-128, -8), (-128, 7)])
def test_largest_sums_do_not_overflow(x_value: int, w_value: int, device: torch.device) -> None:
    k = 2**17 - 1
    x = torch.full((1, k), x_value, dtype=torch.int8)
    weight = linear_weight(torch.full((1, k), w_value, dtype=torch.int8), 4)
    got = run_config(Config(16, 64, 512, 1, 4, 3), x.to(device), torch.ones(1, 1).to(device), moved(weight, device))
    assert torch.equal(got.cpu(), exact(x, weight))


def test_sums_that_could_overflow_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, 2**17, dtype=torch.int8)
    weight = linear_weight(torch.zeros(1, 2**17, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="131072 inputs could leave int32; use groups"):
        integer_linear(x.to(device), torch.ones(1, 1).to(device), moved(weight, device))


@pytest.mark.parametrize("zero", [None, -8])
def test_products_that_cancel_are_not_rounded(zero: int | None, device: torch.device) -> None:
    k = 4096
    x = torch.full((1, k + 1), 127, dtype=torch.int8)
    x[0, k // 2 : k] *= -1
    x[0, k] = 1
    zero_point = None if zero is None else torch.full((2, 1), zero, dtype=torch.int8)
    weight = linear_weight(torch.full((2, k + 1), 7, dtype=torch.int8), 4, zero_point=zero_point)
    got = integer_linear(x.to(device), torch.ones(1, 1).to(device), moved(weight, device))
    assert got.tolist() == [[7 - (zero or 0)] * 2]


# --- the rest of the layer ---


@pytest.mark.parametrize(
    ("x_groups", "w_groups", "w_bits", "packed", "zero_points", "rank", "split", "dtype"),
    [
        (1, 1, 4, False, False, 0, 1, torch.bfloat16),
        (1, 1, 4, False, False, 64, 4, torch.bfloat16),
        (1, 1, 4, False, True, 72, 1, torch.float16),
        (1, 1, 4, False, True, 0, 2, torch.float32),
        (1, 1, 8, False, False, 64, 1, torch.bfloat16),
        (1, 1, 8, False, True, 72, 2, torch.float32),
        (1, 1, 4, True, True, 64, 1, torch.float16),
        (1, 1, 8, True, False, 8, 1, torch.float32),
        (1, 3, 4, False, False, 64, 1, torch.bfloat16),
        (1, 3, 4, False, True, 72, 3, torch.float32),
        (3, 1, 4, True, False, 0, 1, torch.bfloat16),
        (3, 1, 8, False, True, 64, 3, torch.float32),
        (3, 3, 4, False, True, 8, 1, torch.bfloat16),
        (2, 3, 4, False, False, 64, 4, torch.float32),  # common groups of 64, half a block
        (1, 8, 4, True, True, 0, 4, torch.float32),  # groups of 48 cross the borders of blocks
        (4, 1, 8, False, True, 8, 1, torch.float16),
        (1, 12, 8, True, True, 72, 1, torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_complete_layer_agrees_with_the_reference(
    x_groups: int,
    w_groups: int,
    w_bits: int,
    packed: bool,
    zero_points: bool,
    rank: int,
    split: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quad_kernels.integer_linear import launch

    m, n, k = 3, 40, 384
    x = integers((m, k), 4 if packed else 8, 0)
    zero = integers((n, w_groups), w_bits, 3) if zero_points else None
    weight = linear_weight(integers((n, k), w_bits, 1), w_bits, scales(n, w_groups, seed=2, dtype=dtype), zero)
    arguments = {
        "x": pack_nibbles(x) if packed else x,
        "x_scale": scales(m, x_groups, seed=4),
        "outlier": normal(m, rank, seed=5, dtype=dtype) if rank else None,
        "outlier_weight": normal(n, rank, seed=6, dtype=dtype) if rank else None,
        "bias": normal(n, seed=7, dtype=dtype),
    }
    monkeypatch.setattr(launch, "choose_config", lambda *_: Config(16, 64, 128, split, 4, 4))
    monkeypatch.setattr(launch, "qualifies", lambda *_: False)
    wanted = integer_linear(**arguments, weight=weight, out_dtype=dtype, backend="reference")  # type: ignore[arg-type]
    got = integer_linear(**on(device, **arguments), weight=moved(weight, device), out_dtype=dtype)
    assert got.dtype == dtype
    assert_rounded_alike(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 9, 63])
def test_chosen_configuration_agrees_with_the_reference(m: int, dtype: torch.dtype, device: torch.device) -> None:
    n, k, rank = 130, 700, 65
    weight = linear_weight(integers((n, k), 4, 1), 4, scales(n, 1, seed=2, dtype=dtype))
    arguments = {
        "x": integers((m, k), 4, 0),
        "x_scale": scales(m, 1, seed=4),
        "outlier": normal(m, rank, seed=5, dtype=dtype),
        "outlier_weight": normal(n, rank, seed=6, dtype=dtype) / 8,
        "bias": normal(n, seed=7, dtype=dtype),
    }
    wanted = integer_linear(**arguments, weight=weight, out_dtype=dtype, backend="reference")  # type: ignore[arg-type]
    got = integer_linear(**on(device, **arguments), weight=moved(weight, device), out_dtype=dtype)
    assert_rounded_alike(got, wanted)


def test_zero_tokens_and_a_huge_value(device: torch.device) -> None:
    x = integers((4, 300), 4, 0)
    x[1] = 0
    x_scale = torch.tensor([[1.0], [0.0], [1e30], [1e-30]])
    weight = linear_weight(integers((9, 300), 4, 1), 4)
    got = integer_linear(x.to(device), x_scale.to(device), moved(weight, device)).cpu()
    assert torch.equal(got, exact(x, weight) * x_scale)


def test_no_tokens(device: torch.device) -> None:
    weight = moved(linear_weight(integers((9, 300), 4, 1), 4), device)
    got = integer_linear(torch.empty(0, 300, dtype=torch.int8, device=device), torch.empty(0, 1, device=device), weight)
    assert got.shape == (0, 9)


def test_a_layout_that_only_another_backend_reads_is_converted(device: torch.device) -> None:
    flipped = WeightLayout(lambda i: i.T.contiguous(), lambda stored, _: stored.T.contiguous(), lambda weight: True)
    x, weight = integers((3, 96), 8, 0), linear_weight(integers((20, 96), 4, 1), 4)
    with temporary_layouts():
        register_layout("flipped", flipped)
        stored = moved(weight.to_layout("flipped"), device)
        got = integer_linear(x.to(device), torch.ones(3, 1).to(device), stored)
    assert torch.equal(got.cpu(), exact(x, weight))


def test_strided_inputs(device: torch.device) -> None:
    """Columns of a wider tensor, transposed tensors, one scale for all tokens."""
    m, n, k, rank = 5, 40, 200, 16
    values, outliers = integers((m, k + 30), 8, 0), normal(m, rank + 7, seed=2, dtype=torch.bfloat16)
    outlier_weight = normal(rank, n, seed=3, dtype=torch.bfloat16)
    weight = linear_weight(integers((n, k), 4, 1), 4)
    plain = (values[:, 30:].contiguous(), torch.ones(m, 1), outliers[:, 7:].contiguous(), outlier_weight.T.contiguous())
    strided = (values[:, 30:], torch.ones(1, 1).expand(m, 1), outliers[:, 7:], outlier_weight.T)
    transposed = (values[:, 30:].T.contiguous().T, torch.ones(m, 1), outliers[:, 7:].T.contiguous().T, outlier_weight.T)
    results = [
        integer_linear(
            x.to(device), s.to(device), moved(weight, device), outlier=o.to(device), outlier_weight=w.to(device)
        )
        for x, s, o, w in (plain, strided, transposed)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_outliers_of_another_dtype_than_their_weight(device: torch.device) -> None:
    outlier, outlier_weight = normal(3, 8, seed=0, dtype=torch.float32), normal(6, 8, seed=1, dtype=torch.bfloat16)
    weight = linear_weight(integers((6, 32), 4, 1), 4)
    x, x_scale = integers((3, 32), 4, 2), torch.ones(3, 1)
    arguments = {"x": x, "x_scale": x_scale, "outlier": outlier, "outlier_weight": outlier_weight}
    got = integer_linear(**on(device, **arguments), weight=moved(weight, device))
    wanted = integer_linear(**arguments, weight=weight, backend="reference")
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-6, atol=1e-5)


def test_split_programs_leave_their_counters_at_zero(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from quad_kernels.integer_linear import launch

    counters = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr(launch, "arrival_counters", lambda count, _: counters)
    x, weight = integers((5, 600), 8, 0), linear_weight(integers((100, 600), 4, 1), 4)
    for _ in range(2):
        got = run_config(Config(16, 64, 128, 4, 4, 4), x.to(device), torch.ones(5, 1).to(device), moved(weight, device))
        assert torch.equal(got.cpu(), exact(x, weight))
        assert not counters.any()


# --- on a GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (4096, 14336), (896, 4864), (1000, 4000)])
@pytest.mark.parametrize("m", [1, 3, 16, 63, 128, 1000, 4096])
def test_large_shapes_are_exact(m: int, n: int, k: int, device: torch.device) -> None:
    x, weight = integers((m, k), 8, 0).to(device), moved(linear_weight(integers((n, k), 4, 1), 4), device)
    wanted = (x.double() @ weight.unpacked().double().T).float()
    assert torch.equal(integer_linear(x, torch.ones(m, 1, device=device), weight), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("rank", [0, 64])
def test_split_sums_are_the_same_in_every_run(rank: int, device: torch.device) -> None:
    m, n, k = 7, 512, 4096
    weight = moved(linear_weight(integers((n, k), 4, 1), 4, scales(n, k // 128, seed=2, dtype=torch.bfloat16)), device)
    arguments = on(
        device,
        x=integers((m, k), 8, 0),
        x_scale=scales(m, 1, seed=4),
        outlier=normal(m, rank, seed=5, dtype=torch.bfloat16) if rank else None,
        outlier_weight=normal(n, rank, seed=6, dtype=torch.bfloat16) if rank else None,
    )
    first = integer_linear(**arguments, weight=weight)
    assert all(torch.equal(integer_linear(**arguments, weight=weight), first) for _ in range(50))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graphs_replay_beside_each_other(device: torch.device) -> None:
    """Two graphs and plain calls, on three streams at once: no counter and no workspace is shared."""
    weight = moved(linear_weight(integers((1024, 8192), 4, 1), 4), device)
    inputs = [integers((4, 8192), 8, seed).to(device) for seed in range(3)]
    ones = torch.ones(4, 1, device=device)
    wanted = [integer_linear(x, ones, weight) for x in inputs]
    graphs, outputs = [], []
    for x in inputs[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(integer_linear(x, ones, weight))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            plain = integer_linear(inputs[2], ones, weight)
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip([*outputs, plain], wanted, strict=True))


def test_a_weight_of_two_levels_becomes_bytes_once(device: torch.device) -> None:
    factors = torch.randint(1, 16, (4, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    plain = replace(linear_weight(integers((40, 128), 4, 3), 4).to_layout("int8"), sub_scale=factors)
    backend = choose_backend(device)
    weight = backend.prepare_weight(moved(plain, device), InputQuantization(4))
    assert (backend.name, weight.layout, weight.bits, weight.factors) == ("triton", "int8", 8, None)
    assert torch.equal(weight.to_words().cpu(), plain.to_words())
    kept = backend.prepare_weight(moved(plain, device), None)  # floating-point inputs: half a byte each
    assert (kept.layout, kept.bits) == ("nibbles", 4)
    x = integers((5, 128), 8, 4)
    for prepared in (weight, kept):
        y = integer_linear(x.to(device), torch.ones(5, 1, device=device), prepared)
        assert torch.equal(y.cpu(), exact(x, plain))


@pytest.mark.parametrize("number_format", ["nvfp4", "mxfp4"])
def test_floating_point_numbers_are_multiplied_as_integers(number_format: NumberFormat, device: torch.device) -> None:
    plain = random_float4(40, 96, number_format)
    quantization = InputQuantization(group_size=float4.GROUP_SIZES[number_format], number_format=number_format)
    weight = choose_backend(device).prepare_weight(moved(plain, device), quantization)
    assert (weight.layout, weight.bits) == ("int8", 5)
    assert torch.equal(weight.to_words().cpu(), plain.to_words())
    x = normal(5, 96, seed=4, dtype=torch.float32)
    split = InputSplit(96)
    got = quad_linear(x.to(device), weight, split, quantization)
    wanted = quad_linear(x, plain, split, quantization, backend="reference")
    assert_rounded_alike(got, wanted)
