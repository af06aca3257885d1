"""Outlier columns on a grid of their own, behind GPTQ."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import IntegerGrid

from quad_modifiers.quantization.gptq import ColumnBlock, ColumnSolver, GptqResult
from quad_modifiers.quantization.grid import WeightScales, dequantize, search_clip
from quad_modifiers.quantization.outlier_rounding import round_outliers, rounded_to_nearest

OUT, COLUMNS, RANK = 12, 20, 6
LOW, HIGH = IntegerGrid(4), IntegerGrid(8)


def in_order(weight: torch.Tensor, hessian: torch.Tensor, blocks: list[tuple[IntegerGrid, torch.Tensor]]):
    """Integers of columns that are rounded one by one, the others moved to their best place after each; float64.

    The others minimise the loss given all that is rounded: solved anew for every column, from the definition.
    """
    wanted, current, count = weight.double(), weight.double().clone(), weight.shape[1]
    grids = [(grid, scale[:, index]) for grid, scale in blocks for index in range(scale.shape[1])]
    integers = torch.empty_like(wanted)
    for column, (grid, scale) in enumerate(grids):
        integers[:, column] = (current[:, column] / scale).round().clamp(grid.low, grid.high)
        current[:, column] = integers[:, column] * scale
        done, rest = slice(column + 1), slice(column + 1, count)
        delta = current[:, done] - wanted[:, done]
        response = torch.linalg.solve(hessian[rest, rest], hessian[rest, done] @ delta.T).T
        current[:, rest] = wanted[:, rest] - response
    return integers, current


@pytest.fixture
def problem(make_hessian, make_weight):
    scale = torch.ones(COLUMNS + RANK, dtype=torch.float64)
    scale[COLUMNS:] = 6
    hessian = make_hessian(COLUMNS + RANK) * scale.outer(scale)
    return make_weight(OUT, COLUMNS + RANK), hessian


def around(weight: torch.Tensor, hessian: torch.Tensor, **settings) -> tuple[GptqResult, WeightScales]:
    scales = search_clip(weight[:, :COLUMNS], LOW, torch.float32)
    solver = ColumnSolver(hessian, [ColumnBlock(COLUMNS, LOW), ColumnBlock(RANK)], **settings)
    return solver.solve(weight, [scales]), scales


def loss_of(weight: torch.Tensor, result: GptqResult, hessian: torch.Tensor) -> torch.Tensor:
    values = [dequantize(block.integers, block.scales.expand(block.integers.shape[1])) for block in result.blocks]
    delta = torch.cat(values, dim=1).double() - weight.double()
    return ((delta @ hessian) * delta).sum(1)


def test_both_blocks_are_those_of_gptq_in_order(problem) -> None:
    weight, hessian = problem
    first, scales = around(weight, hessian, activation_order=False)
    result = round_outliers(first, weight, hessian, HIGH, torch.float32, activation_order=False)
    level = hessian.diagonal()[:COLUMNS].mean()
    damped = hessian + torch.eye(COLUMNS + RANK, dtype=torch.float64) * first.damping * level
    low, high = (block.scales.expand(size).scale.double() for block, size in zip(result.blocks, (20, 6), strict=True))
    wanted, values = in_order(weight, damped, [(LOW, low), (HIGH, high)])
    got = torch.cat([block.integers for block in result.blocks], dim=1)
    assert torch.equal(got, wanted.float())
    torch.testing.assert_close(result.outlier, values[:, COLUMNS:].float())
    assert torch.equal(low, scales.expand(COLUMNS).scale.double())
    moved = (result.outlier - weight[:, COLUMNS:]).abs().max() / high.max()
    assert float(moved) > 2, "they have absorbed error of the 4-bit columns, by more than their own rounding"


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("clip_search", [False, True])
def test_little_of_what_the_columns_absorb_is_lost(problem, activation_order, sweeps, clip_search) -> None:
    weight, hessian = problem
    first, _ = around(weight, hessian, activation_order=activation_order, sweeps=sweeps)
    result = round_outliers(
        first,
        weight,
        hessian,
        HIGH,
        torch.float32,
        clip_search=clip_search,
        activation_order=activation_order,
        block_size=4,
    )
    assert result.blocks[0] is first.blocks[0]
    integers = result.blocks[1].integers
    assert integers.shape == (OUT, RANK)
    assert torch.equal(integers, integers.round().clamp(HIGH.low, HIGH.high))
    assert int(integers.abs().max()) > 64
    torch.testing.assert_close(result.loss.double(), loss_of(weight, result, hessian), rtol=1e-3, atol=1e-7)
    free, lost = float(first.loss.sum()), float(result.loss.sum())
    # Without absorbing: rounded before GPTQ, which knows nothing of them.
    plain = rounded_to_nearest(weight[:, COLUMNS:], HIGH, clip_search, torch.float32)
    alone, _ = around(weight, hessian)
    apart = GptqResult([alone.blocks[0], plain], alone.outlier, alone.loss, 0.0, 1)
    kept = float(loss_of(weight, apart, hessian).sum())
    print(f"full precision {free:.3e}, 8 bits {lost:.3e}, 8 bits that absorb nothing {kept:.3e}")
    assert free < lost < 1.1 * free
    assert lost < 0.8 * kept


def test_the_scale_is_that_of_what_the_columns_have_become(problem) -> None:
    """Absorbed error may exceed the former range: scales of the former weight would clip it."""
    weight, hessian = problem
    weight = weight.clone()
    weight[:, COLUMNS:] *= 1e-3
    first, _ = around(weight, hessian)
    result = round_outliers(first, weight, hessian, HIGH, torch.float32)
    assert float(first.outlier.abs().max()) > 2 * float(weight[:, COLUMNS:].abs().max())
    assert float((result.outlier - first.outlier).norm() / first.outlier.norm()) < 0.05


@pytest.mark.parametrize("energy", [1.0, 1e6])
def test_outliers_of_zeros(energy: float, problem) -> None:
    weight, hessian = torch.zeros(OUT, COLUMNS + RANK), problem[1]
    hessian = hessian * energy
    hessian[COLUMNS:] = hessian[:, COLUMNS:] = 0
    first, _ = around(weight, hessian)
    result = round_outliers(first, weight, hessian, HIGH, torch.bfloat16)
    assert not result.outlier.any()
    loud = round_outliers(around(problem[0], hessian)[0], problem[0], hessian, HIGH, torch.float32)
    torch.testing.assert_close(loud.outlier, problem[0][:, COLUMNS:], rtol=0, atol=5e-3)
    assert bool(torch.isfinite(result.loss).all())
