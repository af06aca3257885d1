"""Rounds the outlier columns behind GPTQ to a grid of their own.

Once the residual columns are rounded, `ColumnSolver` has moved the others to where they undo most of the error.
What GPTQ would do next in order, column by column, depends on the Hessian of the outlier columns alone: with H^-1 =
U^T U for the upper triangular U, the last block of U is the factor of the inverse of the last block of H. So the
outlier columns are a problem of their own, and their scales are chosen for what they have become
(docs/concepts/gptq.md).
"""

import torch
from quad_kernels import IntegerGrid

from quad_modifiers.quantization.gptq import (
    MAX_DAMPING,
    ColumnBlock,
    ColumnSolver,
    GptqResult,
    RoundedBlock,
    input_level,
)
from quad_modifiers.quantization.grid import dequantize, initial_scales, round_to_grid


def rounded_to_nearest(
    outlier: torch.Tensor, grid: IntegerGrid, clip_search: bool, scale_dtype: torch.dtype
) -> RoundedBlock:
    """Returns outlier weights `[out, rank]`, float32, rounded to nearest."""
    scales = initial_scales(outlier, grid, scale_dtype, clip_search)
    return RoundedBlock(round_to_grid(outlier, scales.expand(outlier.shape[1]), grid), scales)


def round_outliers(
    result: GptqResult,
    target: torch.Tensor,
    hessian: torch.Tensor,
    grid: IntegerGrid,
    scale_dtype: torch.dtype,
    *,
    clip_search: bool = True,
    activation_order: bool = True,
    block_size: int = 128,
) -> GptqResult:
    """Returns a result of `ColumnSolver` whose full-precision columns are rounded, too.

    Args:
        result: with one block on a grid, followed by `rank` columns in full precision.
        target: the weight that was quantized, `[out, n]`, float32.
        hessian: `[n, n]`, as it was given to the solver.
        grid: grid of the outlier columns.
        scale_dtype: storage dtype of the scales.
        clip_search: whether scales are chosen by weighted squared error; else they clip nothing.
        activation_order: as for `ColumnSolver`.
        block_size: likewise.

    Returns:
        The result with a second block, and with the loss of both.
    """
    residual, outlier = result.blocks[0], result.outlier
    columns = residual.integers.shape[1]
    own = hessian[columns:, columns:]
    scales = initial_scales(outlier, grid, scale_dtype, clip_search, own.diagonal())
    # The damping is that of the whole: what was added to the diagonal, over the level of these columns.
    added = result.damping * input_level(hessian, columns)
    solver = ColumnSolver(
        own,
        [ColumnBlock(outlier.shape[1], grid)],
        min(MAX_DAMPING, float(added / input_level(own, outlier.shape[1]))),
        activation_order,
        block_size,
    )
    rounded = solver.solve(outlier, [scales]).blocks[0]
    values = [dequantize(block.integers, block.scales.expand(block.integers.shape[1])) for block in (residual, rounded)]
    delta = torch.cat(values, dim=1) - target
    loss = ((delta @ hessian.to(delta)) * delta).sum(1)
    return GptqResult([residual, rounded], values[1], loss, result.damping, result.attempts)
