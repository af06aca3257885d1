"""GPTQ around full-precision columns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from quad_kernels import IntegerGrid

from quad_modifiers.quantization.gptq import ColumnBlock, ColumnSolver, GptqResult, input_level, inverse_factor
from quad_modifiers.quantization.grid import WeightScales, dequantize, round_to_grid, search_clip

OUT, COLUMNS, RANK = 16, 64, 8
GRIDS = [IntegerGrid(4), IntegerGrid(4, 16), IntegerGrid(4, None, False), IntegerGrid(4, 16, False), IntegerGrid(2, 8)]
GRIDS.append(IntegerGrid(4, 16, sub_scale_bits=4))


def name(grid: IntegerGrid) -> str:
    return f"{grid.bits}-{grid.group_size or 'channel'}-{'symmetric' if grid.symmetric else 'asymmetric'}"


def loss_of(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    delta = delta.double()
    return ((delta @ hessian.double()) * delta).sum(1)


def around_outliers(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantized: int,
    scales: WeightScales,
    grid: IntegerGrid,
    **settings: Any,
) -> GptqResult:
    """The first columns on a grid, the rest in full precision."""
    blocks = [ColumnBlock(quantized, grid), ColumnBlock(weight.shape[1] - quantized)]
    return ColumnSolver(hessian, blocks, **settings).solve(weight, [scales])


def delta_of(result: GptqResult, weight: torch.Tensor) -> torch.Tensor:
    values = [dequantize(block.integers, block.scales.expand(block.integers.shape[1])) for block in result.blocks]
    return torch.cat([*values, result.outlier], dim=1) - weight


@pytest.fixture(params=[0, RANK], ids=["no outliers", "outliers"])
def problem(request, make_hessian, make_weight):
    """Weight, Hessian and number of quantized columns; the outlier columns have most of the energy."""
    rank = request.param
    scale = torch.ones(COLUMNS + rank, dtype=torch.float64)
    scale[COLUMNS:] = 10
    hessian = make_hessian(COLUMNS + rank) * scale.outer(scale)
    return make_weight(OUT, COLUMNS + rank), hessian, COLUMNS


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_beats_round_to_nearest(problem, grid: IntegerGrid, activation_order: bool) -> None:
    weight, hessian, quantized = problem
    scales = search_clip(weight[:, :quantized], grid, torch.float32)
    result = around_outliers(weight, hessian, quantized, scales, grid, activation_order=activation_order)
    nearest = dequantize(round_to_grid(weight[:, :quantized], scales.expand(quantized), grid), scales.expand(quantized))
    rounding = torch.cat([nearest - weight[:, :quantized], torch.zeros(OUT, weight.shape[1] - quantized)], dim=1)
    ratio = float(loss_of(delta_of(result, weight), hessian).sum() / loss_of(rounding, hessian).sum())
    print(f"loss of GPTQ over round to nearest: {ratio:.3f}, bound 0.9")
    assert ratio < 0.9


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_reported_loss_and_integers(problem, grid: IntegerGrid, sweeps: int) -> None:
    weight, hessian, quantized = problem
    kept = weight.clone(), hessian.clone()
    scales = search_clip(weight[:, :quantized], grid, torch.float32)
    result = around_outliers(weight, hessian, quantized, scales, grid, sweeps=sweeps)
    torch.testing.assert_close(result.loss.double(), loss_of(delta_of(result, weight), hessian), rtol=1e-3, atol=1e-7)
    assert result.blocks[0].integers.shape == (OUT, quantized)
    assert result.outlier.shape == (OUT, weight.shape[1] - quantized)
    assert torch.equal(result.blocks[0].integers, result.blocks[0].integers.round().clamp(grid.low, grid.high))
    assert (result.damping, result.attempts) == (0.01, 1)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_outlier_columns_absorb_what_they_can(make_hessian, make_weight) -> None:
    weight, hessian, grid = make_weight(OUT, COLUMNS + RANK), make_hessian(COLUMNS + RANK), IntegerGrid(4)
    scales = search_clip(weight[:, :COLUMNS], grid, torch.float32)
    result = around_outliers(weight, hessian, COLUMNS, scales, grid, damping=1e-6)
    delta = delta_of(result, weight)
    frozen = delta.clone()
    frozen[:, COLUMNS:] = 0
    free, held = loss_of(delta, hessian), loss_of(frozen, hessian)
    assert bool((free <= held).all())
    assert float(free.sum()) < 0.95 * float(held.sum())
    # The outlier columns are the minimizer: the gradient of the loss in them is zero.
    gradient = delta.double() @ hessian[:, COLUMNS:]
    assert float(gradient.abs().max()) < 1e-3 * float((frozen.double() @ hessian[:, COLUMNS:]).abs().max())


def test_outlier_columns_in_the_hessian_beat_leaving_them_out(make_hessian, make_weight) -> None:
    weight, hessian, grid = make_weight(OUT, COLUMNS + RANK), make_hessian(COLUMNS + RANK), IntegerGrid(4)
    scales = search_clip(weight[:, :COLUMNS], grid, torch.float32)
    inside = around_outliers(weight, hessian, COLUMNS, scales, grid)
    outside = around_outliers(weight[:, :COLUMNS], hessian[:COLUMNS, :COLUMNS], COLUMNS, scales, grid)
    ratio = float(inside.loss.sum() / outside.loss.sum())
    print(f"loss with absorbing outlier columns over that without: {ratio:.3f}, bound 0.97")
    assert ratio < 0.97


def singular_hessian(make_hessian) -> torch.Tensor:
    """Hessian of the extended basis: 56 + 8 coordinates of 56-dimensional inputs, [residual | outlier]."""
    from quad_modifiers.linalg import extended_basis, outlier_basis, random_rotation

    gram = make_hessian(56)
    rotation = random_rotation(56, "random", torch.Generator().manual_seed(0))
    basis = extended_basis(outlier_basis(gram, 8)[0], rotation)
    basis = torch.cat([basis[:, 8:], basis[:, :8]], dim=1)
    return basis.T @ gram @ basis


def test_singular_hessian_is_damped_until_it_works(make_hessian, make_weight) -> None:
    hessian, weight, grid = singular_hessian(make_hessian), make_weight(OUT, 64), IntegerGrid(4)
    assert int(torch.linalg.matrix_rank(hessian)) == 56
    scales = search_clip(weight[:, :56], grid, torch.float32)
    result = around_outliers(weight, hessian, 56, scales, grid, damping=0.0)
    assert result.attempts > 1
    assert result.damping >= 1e-4
    assert bool(torch.isfinite(result.outlier).all())
    torch.testing.assert_close(result.loss.double(), loss_of(delta_of(result, weight), hessian), rtol=1e-2, atol=1e-7)
    enough = around_outliers(weight, hessian, 56, scales, grid, damping=0.01)
    assert (enough.damping, enough.attempts) == (0.01, 1)


def test_damping_is_relative_to_the_quantized_columns(make_hessian) -> None:
    hessian = make_hessian(16)
    hessian[12:, 12:] *= 1e6  # far larger outliers must not raise the damping
    reverse = hessian.flip(0, 1)
    factor, damping, attempts = inverse_factor(reverse, input_level(hessian, 12), 0.01)
    damped = reverse.flip(0, 1)
    level = float(hessian.diagonal()[:12].mean())
    torch.testing.assert_close(
        damped - hessian, torch.eye(16, dtype=torch.float64) * 0.01 * level, rtol=1e-3, atol=1e-6
    )
    inverse = factor.double().T @ factor.double()  # the factor is float32
    torch.testing.assert_close(inverse, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert (damping, attempts) == (0.01, 1)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_sweeps_never_increase_the_loss(problem, grid: IntegerGrid, activation_order: bool) -> None:
    """Descent is on the damped loss; with little damping that is the reported one."""
    weight, hessian, quantized = problem
    damped = hessian + 0.01 * input_level(hessian, quantized) * torch.eye(len(hessian))
    scales = search_clip(weight[:, :quantized], grid, torch.float32)
    losses = []
    for sweeps in range(4):
        result = around_outliers(
            weight, hessian, quantized, scales, grid, activation_order=activation_order, sweeps=sweeps, block_size=24
        )
        losses.append(loss_of(delta_of(result, weight), damped))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[-1].sum()) < float(losses[0].sum())


@pytest.mark.parametrize("grid", [IntegerGrid(4), IntegerGrid(4, 16, False)], ids=name)
@pytest.mark.parametrize("sweeps", [0, 1])
def test_block_size_changes_nothing(problem, grid: IntegerGrid, sweeps: int) -> None:
    weight, hessian, quantized = problem
    scales = search_clip(weight[:, :quantized], grid, torch.float32)
    whole, small = (
        around_outliers(weight, hessian, quantized, scales, grid, block_size=b, sweeps=sweeps) for b in (256, 7)
    )
    # Rounding of float32 sums may flip a tie, which moves everything after it.
    assert float((whole.blocks[0].integers != small.blocks[0].integers).float().mean()) < 0.02
    torch.testing.assert_close(whole.loss.sum(), small.loss.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_activation_order_equals_permuting_by_hand(problem, grid: IntegerGrid) -> None:
    """Columns may be processed in any order: the integers come back in the original one, each with its own scale."""
    weight, hessian, quantized = problem
    scales = search_clip(weight[:, :quantized], grid, torch.float32)
    ordered = around_outliers(weight, hessian, quantized, scales, grid, activation_order=True)
    order = torch.arange(weight.shape[1])
    order[:quantized] = hessian.diagonal()[:quantized].argsort(descending=True, stable=True)
    assert not torch.equal(order, torch.arange(weight.shape[1]))
    per_column = scales.expand(quantized)
    per_column = WeightScales(per_column.scale[:, order[:quantized]], per_column.zero_point[:, order[:quantized]])
    by_hand = around_outliers(
        weight[:, order],
        hessian[order][:, order],
        quantized,
        per_column,
        IntegerGrid(grid.bits, 1, grid.symmetric),
        activation_order=False,
    )
    assert torch.equal(ordered.blocks[0].integers[:, order[:quantized]], by_hand.blocks[0].integers)
    torch.testing.assert_close(ordered.outlier, by_hand.outlier)


@pytest.mark.parametrize("grid", [IntegerGrid(4), IntegerGrid(4, 16)], ids=name)
@pytest.mark.parametrize("actorder", [None, "weight"])
def test_as_good_as_llm_compressor(make_hessian, make_weight, grid: IntegerGrid, actorder: str | None) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, hessian = make_weight(64, 96), make_hessian(96)
    scales = search_clip(weight, grid, torch.float32)
    strategy = QuantizationStrategy.CHANNEL if grid.group_size is None else QuantizationStrategy.GROUP
    arguments = QuantizationArgs(
        num_bits=4, symmetric=True, strategy=strategy, group_size=grid.group_size, actorder=actorder
    )
    theirs, _, fallback = quantize_weight(
        weights=weight[None].clone(),
        hessians=hessian.float()[None].clone(),
        scale=scales.scale[None],
        zero_point=scales.zero_point[None],
        global_scale=None,
        quant_args=arguments,
        blocksize=128,
        percdamp=0.01,
    )
    assert not bool(fallback.any())
    ours = around_outliers(weight, hessian, 96, scales, grid, activation_order=actorder is not None)
    ratio = float(ours.loss.sum() / loss_of(theirs[0] - weight, hessian).sum())
    print(f"our loss over llm-compressor's: {ratio:.4f}, bounds 0.98 and 1.02")
    assert 0.98 < ratio < 1.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hessian_must_be_finite(make_hessian, make_weight, bad: float) -> None:
    hessian = make_hessian(8)
    hessian[3, 3] = bad
    weight = make_weight(2, 8)
    with pytest.raises(ValueError, match="NaN or infinite"):
        around_outliers(weight, hessian, 8, search_clip(weight, IntegerGrid(4), torch.float32), IntegerGrid(4))


def test_indefinite_hessian_is_refused_with_advice(make_weight) -> None:
    weight = make_weight(2, 8)
    hessian = -torch.eye(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="use more calibration text"):
        around_outliers(weight, hessian, 8, search_clip(weight, IntegerGrid(4), torch.float32), IntegerGrid(4))


def test_shapes_must_agree(make_hessian, make_weight) -> None:
    weight = make_weight(2, 8)
    scales = search_clip(weight, IntegerGrid(4), torch.float32)
    with pytest.raises(ValueError, match=r"the Hessian is \(9, 9\), the weight has 8 columns"):
        ColumnSolver(make_hessian(9), [ColumnBlock(8, IntegerGrid(4)), ColumnBlock(1)]).solve(weight, [scales])


@pytest.mark.parametrize("rank", [0, RANK])
def test_dead_inputs_are_no_error(make_weight, make_hessian, rank: int) -> None:
    """Channels that are always zero; their weights do not matter, but must stay numbers."""
    weight, hessian, grid = make_weight(OUT, COLUMNS + rank), make_hessian(COLUMNS + rank), IntegerGrid(4)
    hessian[:10] = hessian[:, :10] = 0
    scales = search_clip(weight[:, :COLUMNS], grid, torch.float32, hessian.diagonal()[:COLUMNS])
    result = around_outliers(weight, hessian, COLUMNS, scales, grid)
    assert bool(torch.isfinite(result.loss).all())
    assert bool(torch.isfinite(result.blocks[0].integers).all())


@pytest.mark.parametrize("rank", [0, RANK])
def test_inputs_that_are_always_zero_are_no_error(make_weight, rank: int) -> None:
    weight, grid = make_weight(OUT, COLUMNS + rank), IntegerGrid(4)
    hessian = torch.zeros(COLUMNS + rank, COLUMNS + rank, dtype=torch.float64)
    scales = search_clip(weight[:, :COLUMNS], grid, torch.float32, hessian.diagonal()[:COLUMNS])
    result = around_outliers(weight, hessian, COLUMNS, scales, grid, sweeps=1)
    for tensor in (result.blocks[0].integers, result.outlier, result.loss):
        assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("zeros", [0.0, 1e-38])
def test_a_group_of_zeros_stays_finite(make_hessian, make_weight, zeros: float) -> None:
    """The outlier coordinates of a D-type input leave whole groups of the residual weight empty."""
    grid = IntegerGrid(4, 16)
    weight, hessian = make_weight(OUT, COLUMNS), make_hessian(COLUMNS)
    weight[:, :16] *= zeros
    hessian[:16] = hessian[:, :16] = 0
    hessian.diagonal()[:16] = 1e-3  # damping
    scales = search_clip(weight, grid, torch.float32)
    result = around_outliers(weight, hessian, COLUMNS, scales, grid, sweeps=2)
    values = dequantize(result.blocks[0].integers, result.blocks[0].scales.expand(COLUMNS))
    assert bool(torch.isfinite(values).all())
    assert float(values[:, :16].abs().max()) < 1e-30


def test_blocks_of_several_grids(make_hessian, make_weight) -> None:
    """4 bits, then 8 bits, then full precision: each block on its grid, later ones absorb the error of earlier ones."""
    sizes, grids = (40, 24, 8), (IntegerGrid(4, 8), IntegerGrid(8))
    weight, hessian = make_weight(OUT, sum(sizes)), make_hessian(sum(sizes))
    parts = weight.split(sizes, dim=1)
    scales = [search_clip(part, grid, torch.float32) for part, grid in zip(parts, grids, strict=False)]
    blocks = [ColumnBlock(40, grids[0]), ColumnBlock(24, grids[1]), ColumnBlock(8)]
    result = ColumnSolver(hessian, blocks, block_size=16, sweeps=1).solve(weight, scales)
    for rounded, grid, size in zip(result.blocks, grids, sizes, strict=False):
        assert rounded.integers.shape == (OUT, size)
        assert torch.equal(rounded.integers, rounded.integers.round().clamp(grid.low, grid.high))
    assert int(result.blocks[1].integers.abs().max()) > 7, "the second grid is finer"
    torch.testing.assert_close(result.loss.double(), loss_of(delta_of(result, weight), hessian), rtol=1e-3, atol=1e-7)
    alike = search_clip(weight[:, :64], grids[0], torch.float32)
    coarse = ColumnSolver(hessian, [ColumnBlock(64, grids[0]), blocks[2]]).solve(weight, [alike])
    ratio = float(result.loss.sum() / coarse.loss.sum())
    print(f"loss with 24 columns in 8 bits over that with all in 4 bits: {ratio:.3f}, bound 0.9")
    assert ratio < 0.9


def test_free_columns_must_come_last(make_hessian) -> None:
    grid = IntegerGrid(4)
    on_grid = ColumnBlock(8, grid)
    with pytest.raises(ValueError, match="they must come last"):
        ColumnSolver(make_hessian(16), [on_grid, ColumnBlock(4), ColumnBlock(4, grid)])
    with pytest.raises(ValueError, match=r"the blocks have 8 columns, 1 of them on a grid; the Hessian has 16"):
        ColumnSolver(make_hessian(16), [on_grid])


def test_pieces_of_a_weight_are_what_the_whole_is(make_hessian, make_weight) -> None:
    """To the bit of a sum: output channels have nothing to do with each other."""
    weight, grid = make_weight(OUT, 40), IntegerGrid(4)
    scales = search_clip(weight[:, :32], grid, torch.float32)
    solver = ColumnSolver(make_hessian(40), [ColumnBlock(32, grid), ColumnBlock(8)], sweeps=2)
    whole = solver.solve(weight, [scales])
    rows = (slice(0, 5), slice(5, OUT))
    parts = [solver.solve(weight[each], [WeightScales(scales.scale[each], scales.zero_point[each])]) for each in rows]
    assert torch.equal(torch.cat([part.blocks[0].integers for part in parts]), whole.blocks[0].integers)
    joined = WeightScales.joined([part.blocks[0].scales for part in parts])
    assert torch.equal(joined.scale, whole.blocks[0].scales.scale)
    torch.testing.assert_close(torch.cat([part.outlier for part in parts]), whole.outlier)
    torch.testing.assert_close(torch.cat([part.loss for part in parts]), whole.loss)


def test_a_solver_goes_to_another_device(make_hessian, make_weight) -> None:
    weight, grid = make_weight(OUT, 40), IntegerGrid(4)
    scales = search_clip(weight[:, :32], grid, torch.float32)
    solver = ColumnSolver(make_hessian(40), [ColumnBlock(32, grid), ColumnBlock(8)], sweeps=2)
    wanted = solver.solve(weight, [scales]).loss
    elsewhere = torch.device("meta")
    found = solver.to(elsewhere).solve(weight.to(elsewhere), [scales.to(elsewhere)])
    assert (found.loss.device, found.blocks[0].integers.device) == (elsewhere, elsewhere)
    assert torch.equal(solver.solve(weight, [scales]).loss, wanted), "this one has stayed"
