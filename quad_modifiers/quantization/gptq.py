"""GPTQ (arXiv 2210.17323) around full-precision columns.

Columns come in blocks, each with a grid of its own; the last may be in full precision. Columns on a grid are rounded
one by one and each rounding error is moved to the columns not yet processed. The full-precision outlier columns come
last and are never rounded: they take whatever error can still be undone by them, for free. Afterwards a few sweeps of
exact coordinate descent on the same quadratic loss revisit every rounding decision, with the outlier columns eliminated
through their Schur complement.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from quad_kernels import FloatGrid, WeightGrid, descend_columns, round_columns

from quad_modifiers.quantization.grid import WeightScales, dequantize

MAX_DAMPING = 1.0
# Shares of the largest diagonal element: the energy of an input that is nothing but rounding error, in float32, and the
# error of the Hessian itself, whose products are float32.
_NOISE_ENERGY = 1e-12
_HESSIAN_ERROR = 1e-4


@dataclass(frozen=True)
class ColumnBlock:
    """Neighbouring columns that are treated alike.

    Attributes:
        columns: number of columns.
        grid: grid that they are rounded to, None for full precision.
    """

    columns: int
    grid: WeightGrid | None = None


class RoundedBlock(NamedTuple):
    """The columns of a block after rounding.

    Attributes:
        integers: `[out, columns]`, integer-valued float32.
        scales: scales of its groups, `[out, groups]`.
    """

    integers: torch.Tensor
    scales: WeightScales


@dataclass
class GptqResult:
    """What `ColumnSolver.solve` returns.

    Attributes:
        blocks: the blocks that have a grid, in order.
        outlier: `[out, columns]`, float32, the full-precision columns after absorbing error, or, from `round_outliers`,
            the values that they were rounded to.
        loss: `[out]`, (W - W_hat) H (W - W_hat)^T per output channel, the expected squared output error.
        damping: fraction of the mean residual diagonal that was added to the Hessian.
        attempts: number of Cholesky factorizations tried (more than one: the damping asked for was too small).
    """

    blocks: list[RoundedBlock]
    outlier: torch.Tensor
    loss: torch.Tensor
    damping: float
    attempts: int


class Factorization(NamedTuple):
    """A Cholesky factorization of a damped Hessian.

    Attributes:
        lower: its lower Cholesky factor, `[n, n]`, float32: float64 is for the factorization, which can fail.
        damping: fraction of the level that was added to the diagonal.
        attempts: number of factorizations tried.
    """

    lower: torch.Tensor
    damping: float
    attempts: int


def input_level(hessian: torch.Tensor, quantized: int) -> torch.Tensor:
    """Returns the mean diagonal of the quantized columns, a scalar; 1 where all inputs are zero throughout.

    The outlier columns do not count: they are far larger and would drown the rest. But what is nothing beside them is
    rounding error, as where all tokens are alike: a level below it would have GPTQ fit that.
    """
    diagonal = hessian.diagonal()
    level = torch.maximum(diagonal[:quantized].mean(), diagonal.max() * _NOISE_ENERGY)
    return torch.where(level > torch.finfo(torch.float32).tiny, level, torch.ones_like(level))


def factorizations(hessian: torch.Tensor, level: torch.Tensor, damping: float) -> Iterator[Factorization]:
    """Yields the factorizations that succeed, with damping that grows tenfold up to 1, or the error of the Hessian.

    In the extended basis the undamped Hessian is singular by construction; so is that of inputs that are constant, or
    zero on all calibration data.

    Args:
        hessian: `[n, n]`, float64; each time the damping is added to its diagonal in place.
        level: what the damping is a fraction of, a scalar.
        damping: first fraction tried.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian has NaN or infinite entries")
    diagonal = hessian.diagonal().clone()
    most = max(MAX_DAMPING, float(_HESSIAN_ERROR * diagonal.max() / level))
    attempts = 0
    while damping <= most:
        attempts += 1
        hessian.diagonal().copy_(diagonal + damping * level)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        lower = lower.float()
        if not failed:
            yield Factorization(lower, damping, attempts)
        damping = max(damping * 10, 1e-4)


def inverse_factor(reverse: torch.Tensor, level: torch.Tensor, damping: float) -> tuple[torch.Tensor, float, int]:
    """Returns the upper Cholesky factor of the inverse of a damped Hessian, the damping used, and the attempts.

    With J the reversal of the order, J H J = L L^T gives H^-1 = U^T U for the upper triangular U = J L^-1 J: one
    factorization and one triangular solve instead of two factorizations and an inverse.

    Args:
        reverse: J H J, `[n, n]`, float64; the damping is added to its diagonal.
        level: what the damping is a fraction of, a scalar (`input_level`).
        damping: first fraction tried; it grows until the factorization succeeds.

    Returns:
        U, `[n, n]`, float32, the fraction and the number of attempts.

    Raises:
        ValueError: if the Hessian is not finite or cannot be factorized with damping up to 1.
    """
    for found in factorizations(reverse, level, damping):
        identity = torch.eye(len(reverse), dtype=torch.float32, device=reverse.device)
        factor = torch.linalg.solve_triangular(found.lower, identity, upper=False).flip(0, 1)
        if torch.isfinite(factor).all():
            return factor, found.damping, found.attempts
    raise ValueError(
        f"the Hessian cannot be factorized even with damping {MAX_DAMPING}, nor with what its rounding errors need; "
        "use more calibration text"
    )


class ColumnSolver:
    """Rounds the columns of weights block by block, each to its grid; those in full precision absorb error.

    What does not depend on the weight is computed once. Output channels have nothing to do with each other, so that a
    weight may be solved in pieces.

    Args:
        hessian: `[n, n]`, mean of x x^T over the inputs that the runtime will see, float32 or float64.
        blocks: what becomes of the columns, in order; a block in full precision can only be the last.
        damping: initial fraction of the mean diagonal added to the Hessian.
        activation_order: True to process the columns of a block by falling Hessian diagonal; groups keep their place
            (static groups).
        block_size: columns whose mutual updates are done at once.
        sweeps: coordinate-descent sweeps after GPTQ.

    Raises:
        ValueError: from `inverse_factor`, or if the blocks do not fit the Hessian.
    """

    def __init__(
        self,
        hessian: torch.Tensor,
        blocks: Sequence[ColumnBlock],
        damping: float = 0.01,
        activation_order: bool = True,
        block_size: int = 128,
        sweeps: int = 0,
    ) -> None:
        ranges = _grid_ranges(blocks, len(hessian))
        quantized = ranges[-1].stop
        order = torch.arange(len(hessian), device=hessian.device)
        if activation_order:
            for part in ranges:
                inside = hessian.diagonal()[part.start : part.stop]
                order[part.start : part.stop] = inside.argsort(descending=True, stable=True) + part.start
        backwards = order.flip(0)
        damped = hessian[backwards.unsqueeze(1), backwards]
        self._hessian = damped.float().flip(0, 1)
        level = input_level(hessian, quantized)
        self._factor, self._damping, self._attempts = inverse_factor(damped, level, damping)
        self._response = _outlier_response(damped[: len(damped) - quantized].flip(0, 1), quantized).float()
        self._reduced = _without_outliers(damped.float().flip(0, 1), self._response) if sweeps else None
        self._ranges, self._quantized, self._order = ranges, quantized, order
        self._block_size, self._sweeps = block_size, sweeps

    def to(self, device: torch.device) -> "ColumnSolver":
        """Returns the same solver for weights on a device."""
        moved = copy(self)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return moved

    def solve(self, weight: torch.Tensor, scales: Sequence[WeightScales]) -> GptqResult:
        """Returns what becomes of output channels.

        Args:
            weight: some or all of them, `[out, n]`, float32, columns in the order of the blocks.
            scales: of their groups, for each block with a grid.

        Raises:
            ValueError: if the weight does not fit the Hessian.
        """
        if weight.shape[1] != len(self._hessian):
            columns = tuple(self._hessian.shape)
            raise ValueError(f"the Hessian is {columns}, the weight has {weight.shape[1]} columns")
        order, quantized, factor, ranges = self._order, self._quantized, self._factor, self._ranges
        spread = _ordered_scales(ranges, scales, order)
        work = weight[:, order].T.contiguous()  # [n, out]
        target = work.clone()
        integers = torch.empty_like(spread.scale)
        for start, stop, grid in _steps(ranges, self._block_size):
            integers[start:stop], errors = round_columns(
                work[start:stop],
                factor[start:stop, start:stop],
                spread.scale[start:stop],
                spread.zero_point[start:stop],
                low=grid.low,
                high=grid.high,
                e2m1=isinstance(grid, FloatGrid),
            )
            work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if self._reduced is not None:
            steps = _steps(ranges, self._block_size) * self._sweeps
            _descend(integers, spread, target[:quantized], self._reduced, steps)
        delta = dequantize(integers, spread) - target[:quantized]
        absorbed = self._response @ delta
        full_delta = torch.cat([delta, absorbed])
        loss = (full_delta * (self._hessian @ full_delta)).sum(0)
        inverse = order[:quantized].argsort()
        in_place = integers.T[:, inverse]
        return GptqResult(
            [
                RoundedBlock(in_place[:, part.start : part.stop].contiguous(), own)
                for part, own in zip(ranges, scales, strict=True)
            ],
            (target[quantized:] + absorbed).T.contiguous(),
            loss,
            self._damping,
            self._attempts,
        )


class _GridRange(NamedTuple):
    """Columns from `start` to `stop` that are rounded to one grid."""

    start: int
    stop: int
    grid: WeightGrid


def _grid_ranges(blocks: Sequence[ColumnBlock], columns: int) -> list[_GridRange]:
    ranges: list[_GridRange] = []
    start = 0
    for block in blocks:
        if block.grid is not None:
            if ranges and ranges[-1].stop != start:
                raise ValueError("columns in full precision absorb the error of all others; they must come last")
            ranges.append(_GridRange(start, start + block.columns, block.grid))
        start += block.columns
    if start != columns or not ranges:
        raise ValueError(f"the blocks have {start} columns, {len(ranges)} of them on a grid; the Hessian has {columns}")
    return ranges


def _ordered_scales(ranges: list[_GridRange], scales: Sequence[WeightScales], order: torch.Tensor) -> WeightScales:
    """One scale and zero point per rounded column, transposed and in the order of processing, `[n, out]`."""
    wide = [own.expand(part.stop - part.start) for part, own in zip(ranges, scales, strict=True)]
    columns = order[: ranges[-1].stop]
    return WeightScales(
        torch.cat([each.scale for each in wide], dim=1)[:, columns].T.contiguous(),
        torch.cat([each.zero_point for each in wide], dim=1)[:, columns].T.contiguous(),
    )


def _steps(ranges: list[_GridRange], block_size: int) -> list[tuple[int, int, WeightGrid]]:
    """Runs of at most `block_size` columns with one grid, in order."""
    return [
        (start, min(start + block_size, part.stop), part.grid)
        for part in ranges
        for start in range(part.start, part.stop, block_size)
    ]


def _outlier_response(rows: torch.Tensor, quantized: int) -> torch.Tensor:
    """-H_oo^-1 H_oq, `[r, quantized]`, of the last r rows of H.

    It is how the full-precision columns best follow a change of the quantized ones.

    float64: next to outliers the damping is less than float32 resolves, and inputs that are constant need it.
    """
    lower = torch.linalg.cholesky(rows[:, quantized:])
    half = torch.linalg.solve_triangular(lower, rows[:, :quantized], upper=False)
    return -torch.linalg.solve_triangular(lower.T, half, upper=True)


def _without_outliers(hessian: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Schur complement: the loss as a function of the quantized columns, the others always following optimally."""
    quantized = response.shape[1]
    return hessian[:quantized, :quantized] + hessian[:quantized, quantized:] @ response


def _descend(
    integers: torch.Tensor,
    scales: WeightScales,
    target: torch.Tensor,
    hessian: torch.Tensor,
    steps: list[tuple[int, int, WeightGrid]],
) -> None:
    """Coordinate descent over the integers, in place, step by step; tensors are `[n, out]` (transposed)."""
    gradient = hessian @ (dequantize(integers, scales) - target)
    step = hessian.diagonal().unsqueeze(1) * scales.scale
    # A group of zeros has the smallest scale there is; it stays as it is.
    inverse_step = torch.where(step > torch.finfo(step.dtype).tiny, 1.0 / step, 0.0)
    for start, stop, grid in steps:
        part = slice(start, stop)
        integers[part], change = descend_columns(
            integers[part],
            gradient[part],
            hessian[part, part],
            scales.scale[part],
            inverse_step[part],
            low=grid.low,
            high=grid.high,
            e2m1=isinstance(grid, FloatGrid),
        )
        gradient.addmm_(hessian[:, part], change)
