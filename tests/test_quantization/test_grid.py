"""Scales, rounding and clip search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quad_kernels import IntegerGrid

from quad_modifiers.quantization.grid import (
    WeightScales,
    dequantize,
    full_range_scales,
    round_to_grid,
    search_clip,
)

GRIDS = [
    IntegerGrid(bits, group_size, symmetric)
    for bits in (2, 4, 8)
    for group_size in (None, 16)
    for symmetric in (True, False)
]
TWO_LEVELS = [IntegerGrid(4, 16, sub_scale_bits=4), IntegerGrid(2, 8, sub_scale_bits=6)]


def name(grid: IntegerGrid) -> str:
    kind = "symmetric" if grid.symmetric else "asymmetric"
    kind = "two levels" if grid.sub_scale_bits else kind
    return f"{grid.bits}bits-{grid.group_size or 'channel'}-{kind}"


def shifted_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, 48, generator=torch.Generator().manual_seed(seed)) + 0.4


def fake(weight: torch.Tensor, grid: IntegerGrid, scales: WeightScales) -> torch.Tensor:
    wide = scales.expand(weight.shape[1])
    return dequantize(round_to_grid(weight, wide, grid), wide)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_full_range_is_the_grid_of_compressed_tensors(grid: IntegerGrid) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = QuantizationStrategy.CHANNEL if grid.group_size is None else QuantizationStrategy.GROUP
    arguments = QuantizationArgs(
        num_bits=grid.bits, symmetric=grid.symmetric, strategy=strategy, group_size=grid.group_size
    )
    weight = shifted_weight()
    parts = weight.reshape(12, grid.groups(48), -1)
    scale, zero_point = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
    ours = full_range_scales(weight, grid, torch.float32)
    torch.testing.assert_close(ours.scale, scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.zero_point, zero_point.float(), rtol=0, atol=0)
    wanted = fake_quantize(weight, scale, zero_point, arguments)
    got = fake(weight, grid, ours)
    step = ours.expand(48).scale
    # A quotient beside a tie may round the other way.
    differs = (got - wanted).abs() > 1e-5
    assert float(differs.float().mean()) < 0.01
    assert bool(((got - wanted).abs() <= 1.001 * step).all())


@pytest.mark.parametrize("grid", [*GRIDS, *TWO_LEVELS], ids=name)
def test_full_range_clips_nothing(grid: IntegerGrid) -> None:
    weight = shifted_weight()
    scales = full_range_scales(weight, grid, torch.float32)
    error = (fake(weight, grid, scales) - weight).abs()
    # Half a step; the asymmetric grid's zero point is rounded too.
    assert bool((error <= (0.5001 if grid.symmetric else 1.0001) * scales.expand(48).scale).all())
    assert scales.scale.shape == (12, grid.groups(48))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_clip_search_is_never_worse_than_full_range(grid: IntegerGrid, weighted: bool) -> None:
    weight = shifted_weight()
    weight[:, 5] *= 6  # an outlier that the search should clip
    importance = torch.logspace(-2, 2, 48).flip(0) if weighted else None
    cost = torch.ones(48) if importance is None else importance

    def errors(scales: WeightScales) -> torch.Tensor:
        error = (fake(weight, grid, scales) - weight).square() * cost
        return error.reshape(12, grid.groups(48), -1).sum(-1)

    searched = errors(search_clip(weight, grid, torch.float32, importance))
    full = errors(full_range_scales(weight, grid, torch.float32))
    assert bool((searched <= full * (1 + 1e-6)).all())
    if grid.bits < 8:
        assert float(searched.sum()) < 0.97 * float(full.sum()), "the search did nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", TWO_LEVELS, ids=name)
def test_steps_of_two_levels_are_multiples_of_the_stored_scale(
    grid: IntegerGrid, weighted: bool, dtype: torch.dtype
) -> None:
    weight = shifted_weight()
    weight[:, 5] *= 6
    weight[3] = 0
    weight[4, :24] *= 1e-3
    cost = torch.logspace(-2, 2, 48).flip(0) if weighted else torch.ones(48)
    searched, full = search_clip(weight, grid, dtype, cost), full_range_scales(weight, grid, dtype)
    for scales in (searched, full):
        assert torch.equal(scales.base.to(dtype).float(), scales.base)
        assert torch.equal(scales.sub_scale, scales.sub_scale.round())
        assert scales.sub_scale.amin() >= 1
        assert scales.sub_scale.amax() <= 2**grid.sub_scale_bits - 1
        assert torch.equal(scales.scale, scales.base * scales.sub_scale)
    errors = [((fake(weight, grid, scales) - weight).square() * cost).sum(1) for scales in (searched, full)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    assert float(errors[0].sum()) < 0.97 * float(errors[1].sum()), "the search did nothing"
    # Close to a floating-point scale for every group.
    groups = search_clip(weight, replace(grid, sub_scale_bits=None), torch.float32, cost)
    ideal = ((fake(weight, grid, groups) - weight).square() * cost).sum()
    assert float(errors[0].sum()) < 1.25 * float(ideal)


def test_importance_decides_what_is_clipped() -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 20
    grid = IntegerGrid(4)
    importance = torch.ones(64)
    careless = search_clip(weight, grid, torch.float32, importance.index_fill(0, torch.tensor([0]), 0.0))
    careful = search_clip(weight, grid, torch.float32, importance.index_fill(0, torch.tensor([0]), 1e4))
    assert float(careless.scale) < 0.5 * float(careful.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_scales_survive_storage(dtype: torch.dtype, symmetric: bool, search: bool) -> None:
    weight = shifted_weight()
    weight[3] = 0
    weight[4] *= 1e-8
    grid = IntegerGrid(4, None, symmetric)
    scales = search_clip(weight, grid, dtype) if search else full_range_scales(weight, grid, dtype)
    assert torch.equal(scales.scale.to(dtype).float(), scales.scale)
    assert bool((scales.scale > 0).all())
    assert bool(torch.isfinite(fake(weight, grid, scales)).all())
    assert not fake(weight, grid, scales)[3].any()
    assert torch.equal(scales.zero_point, scales.zero_point.round())
    assert bool((scales.zero_point >= grid.low).all())
    assert bool((scales.zero_point <= grid.high).all())


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match=r"group_size \(16\) must divide the input width \(40\)"):
        IntegerGrid(4, 16).groups(40)


@pytest.mark.parametrize("grid", [IntegerGrid(4), IntegerGrid(8)], ids=["4 bits", "8 bits"])
def test_small_rows_keep_their_precision_in_float16(grid: IntegerGrid) -> None:
    """Their scales are subnormal in float16."""
    weight = shifted_weight()
    small = weight * (2e-3 / weight.abs().max())
    ours, wanted = (full_range_scales(each, grid, torch.float16) for each in (small, weight))
    error = (fake(small, grid, ours) - small).norm() / small.norm()
    assert error < 1.1 * (fake(weight, grid, wanted) - weight).norm() / weight.norm()
