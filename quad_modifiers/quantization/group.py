"""Quantizes the linears that share one input: moments of that input, then all of them as one weight."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from quad_kernels import (
    FloatGrid,
    InputQuantization,
    IntegerGrid,
    QuantizedWeight,
    WeightGrid,
    fake_quantize,
    split_input,
)
from quad_kernels.float4 import INTEGER_BITS

from quad_modifiers.linalg import StreamingGram
from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.quantization.error_correction import Correction, Moments, corrected, cross_fitted
from quad_modifiers.quantization.gptq import (
    ColumnBlock,
    ColumnSolver,
    GptqResult,
    RoundedBlock,
)
from quad_modifiers.quantization.grid import (
    WeightScales,
    dequantize,
    grid_for,
    initial_scales,
    round_to_grid,
)
from quad_modifiers.quantization.outlier_rounding import round_outliers, rounded_to_nearest
from quad_modifiers.ranks import ranks

# Pieces of a weight's output channels that are rounded at once: as many for each of two, four or eight ranks.
_PIECES, _LEAST = 8, 64  # how many, and output channels of one
_MANY_PIECES, _MANY = 16, 2048  # of a weight that has many output channels, for the memory that a piece takes
_ROWS = 512  # of a product that is added to a sum
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class WeightQuantization:
    """Settings of the weight quantization; see `OutlierSplitGPTQ` for their meaning."""

    grid: WeightGrid
    clip_search: bool = True
    scale_candidates: tuple[float, ...] = (1.0,)
    activation_order: bool = True
    damping: float = 0.01
    block_size: int = 128
    sweeps: int = 0
    error_correction: float | Literal["auto"] = 0.0
    outlier_grid: IntegerGrid | None = None


MomentSums = dict[str, torch.Tensor]
"""Sums over inputs by name: `gram` and, for error correction, `cross`, `[halves, n, n]`, and `tokens`, `[halves]`."""


class InputMoments:
    """Adds up second moments of the inputs of one group of linears, columns [residual | outlier].

    Args:
        linear: one of the linears; all share its split and input quantization.
        error_correction: whether the full-precision model's inputs are tracked as well.
        halves: whether the moments of both halves of the tokens are kept, for `cross_fitted`.
    """

    def __init__(self, linear: QuadLinear, error_correction: bool, halves: bool = False) -> None:
        self.linear = linear
        size = linear.split.residual_width + linear.split.rank
        device = linear.residual.weight.device
        self._halves = [_Half(size, device, error_correction) for _ in range(2 if halves else 1)]

    def add(self, x: torch.Tensor, original: torch.Tensor | None) -> None:
        """Adds inputs `[n, width]` of the quantized model and, for error correction, of the original model.

        The Hessian is taken of what the runtime computes with: coordinates after input quantization.

        Raises:
            ValueError: if an input of the quantized model is NaN or infinite, or its square is.
        """
        seen = self._columns(x, self.linear.input_quantization, self.linear.outlier_quantization)
        wanted = None if original is None else self._columns(original, None, None)
        size = -(-len(seen) // len(self._halves))
        for index, half in enumerate(self._halves):
            part = slice(index * size, (index + 1) * size)
            half.add(seen[part], None if wanted is None else wanted[part])

    def _columns(
        self, x: torch.Tensor, quantization: InputQuantization | None, outlier_quantization: InputQuantization | None
    ) -> torch.Tensor:
        outlier, residual = split_input(x, self.linear.split)
        if quantization is not None:
            residual = fake_quantize(residual, quantization)
        if outlier is None:
            return residual
        if outlier_quantization is not None:
            outlier = fake_quantize(outlier, outlier_quantization)
        return torch.cat([residual, outlier], dim=-1)

    def sums(self) -> MomentSums:
        """Returns what was added up, for `GroupMoments.of`; it may be added to that of other inputs first."""
        found = {
            "gram": _stacked_halves([half.gram.total for half in self._halves]),
            "tokens": torch.tensor([half.gram.tokens for half in self._halves]),
        }
        crosses = [half.cross for half in self._halves if half.cross is not None]
        return {**found, "cross": _stacked_halves(crosses)} if crosses else found


def _stacked_halves(sums: list[torch.Tensor]) -> torch.Tensor:
    """A single one is not copied."""
    return sums[0].unsqueeze(0) if len(sums) == 1 else torch.stack(sums)


class _Half:
    """Sums over some of the tokens."""

    def __init__(self, size: int, device: torch.device, error_correction: bool) -> None:
        self.gram = StreamingGram(size, device)
        self.cross = torch.zeros(size, size, dtype=torch.float64, device=device) if error_correction else None

    def add(self, seen: torch.Tensor, wanted: torch.Tensor | None) -> None:
        """Adds inputs of the quantized and of the original model, `[n, size]` each."""
        self.gram.add(seen)
        if self.cross is not None and wanted is not None:
            # The relative error of bfloat16 counts only against the small difference.
            dtype = fast_dtype(seen.device)
            missing, seen = (wanted - seen).to(dtype), seen.to(dtype)
            for start in range(0, len(self.cross), _ROWS):  # a product of all rows, and its sum, would be large
                rows = slice(start, start + _ROWS)
                self.cross[rows] += missing[:, rows].T @ seen


@dataclass
class GroupMoments:
    """Moments of the inputs of a group of linears.

    Attributes:
        hessian: mean of x_seen x_seen^T, `[n, n]`, float64.
        drift: mean of (x_original - x_seen) x_seen^T, `[n, n]`, float64; None without error correction.
        halves: the same of both halves of the tokens, if they were kept apart; fewer where one has no token.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None
    halves: list[Moments]

    @classmethod
    def of(cls, sums: MomentSums, device: torch.device) -> "GroupMoments":
        """Returns the means on a device, where they can in the memory of the sums, which are gone afterwards.

        Raises:
            ValueError: if no input was added, or one of the original model is NaN or infinite, or its products are.
        """
        tokens, gram = sums["tokens"], sums.pop("gram").to(device)
        cross = sums.pop("cross").to(device) if "cross" in sums else None
        halves = []
        if len(gram) > 1 and cross is not None:
            for number, total, drift in zip(tokens.tolist(), gram, cross, strict=True):
                if number:
                    halves.append(Moments(StreamingGram.of(total, number).mean(), drift / number))
        hessian = StreamingGram.of(_over_halves(gram), int(tokens.sum())).mean_in_place()
        drift = None if cross is None else _over_halves(cross)
        if drift is not None:
            if not torch.isfinite(drift).all():
                raise ValueError("its inputs in the original model are NaN, infinite, or too large to be multiplied")
            drift /= tokens.sum()
        return cls(hessian, drift, halves)


def _over_halves(sums: torch.Tensor) -> torch.Tensor:
    return sums[0] if len(sums) == 1 else sums.sum(0)


@dataclass
class LinearReport:
    """What the quantization of one group of linears did.

    Attributes:
        name: names of the linears.
        error: expected squared output error over expected squared output.
        damping: damping used, as a fraction of the mean residual diagonal.
        attempts: Cholesky factorizations tried, 0 for RTN.
    """

    name: str
    error: float
    damping: float
    attempts: int

    @property
    def decibels(self) -> float:
        """Signal-to-quantization-noise ratio of the output, dB."""
        return -10 * math.log10(max(self.error, 1e-30))


@torch.no_grad()
def quantize_group(
    linears: list[QuadLinear],
    sums: MomentSums | None,
    settings: WeightQuantization,
    scale_dtype: torch.dtype,
    name: str,
) -> tuple[list[QuantizedWeight], LinearReport]:
    """Quantizes linears that share their input, as one stacked weight.

    Afterwards each residual weight holds the dequantized values and each outlier weight has absorbed error. The block
    goes on with them in float32; the integers themselves are returned. Outlier weights that get a grid are packed.

    Args:
        linears: linears of the group, in float32.
        sums: of the moments of their common input, which are used up; None for RTN.
        settings: settings of the quantization.
        scale_dtype: storage dtype of the scales.
        name: name of the group, for errors and the report.

    Returns:
        The quantized weight of each linear, its scales in `scale_dtype`, and what the quantization did.

    Raises:
        ValueError: naming the linears if their moments or weights cannot be used.
    """
    columns = linears[0].split.residual_width
    weight = torch.cat([_stacked(linear) for linear in linears])
    if sums is None:
        result = _round_to_nearest(weight, columns, settings, scale_dtype)
        rounded = result.blocks[0]
        error = (dequantize(rounded.integers, rounded.scales.expand(columns)) - weight[:, :columns]).square().sum()
        relative = float(error / weight[:, :columns].square().sum().clamp(min=_TINY))
    else:
        try:
            result, relative = _gptq(weight, columns, GroupMoments.of(sums, weight.device), settings, scale_dtype)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from problem
    weights = _write_back(linears, result, columns, settings, scale_dtype)
    return weights, LinearReport(name, relative, result.damping, result.attempts)


def _stacked(linear: QuadLinear) -> torch.Tensor:
    parts = [linear.residual.weight, *([] if linear.outlier_weight is None else [linear.outlier_weight])]
    return torch.cat([part.float() for part in parts], dim=1)


def _write_back(
    linears: list[QuadLinear],
    result: GptqResult,
    columns: int,
    settings: WeightQuantization,
    scale_dtype: torch.dtype,
) -> list[QuantizedWeight]:
    whole = _quantized(result.blocks[0], settings.grid, scale_dtype)
    values = dequantize(result.blocks[0].integers, result.blocks[0].scales.expand(columns))
    outliers = None
    if settings.outlier_grid is not None and len(result.blocks) > 1:
        outliers = _quantized(result.blocks[1], settings.outlier_grid, scale_dtype)
    weights = []
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.out_features)
        start = rows.stop
        linear.residual.weight.copy_(values[rows])
        if outliers is not None:
            linear.outlier = PackedLinear.of(outliers.rows(rows), scale_dtype, linear.outlier_quantization)
        elif linear.outlier_weight is not None:
            linear.outlier_weight.copy_(result.outlier[rows])
        weights.append(whole.rows(rows))
    return weights


def _quantized(block: RoundedBlock, grid: WeightGrid, scale_dtype: torch.dtype) -> QuantizedWeight:
    integers, scales = block
    if isinstance(grid, FloatGrid):
        scale, (rows, columns) = scales.scale.to(torch.bfloat16), integers.shape  # it holds them exactly
        return QuantizedWeight(
            integers.to(torch.int8), scale, None, columns, rows, INTEGER_BITS, number_format=grid.number_format
        )
    return QuantizedWeight(
        integers.to(torch.int8),
        (scales.scale if scales.base is None else scales.base).to(scale_dtype),
        None if grid.symmetric else scales.zero_point.to(torch.int8),
        integers.shape[1],
        len(integers),
        grid.bits,
        sub_scale=None if scales.sub_scale is None else scales.sub_scale.T.to(torch.int8).contiguous(),
    )


def _round_to_nearest(
    weight: torch.Tensor, columns: int, settings: WeightQuantization, scale_dtype: torch.dtype
) -> GptqResult:
    settings = replace(settings, grid=grid_for(weight[:, :columns], settings.grid))
    scales = _initial_scales(weight[:, :columns], None, settings, scale_dtype)
    integers = round_to_grid(weight[:, :columns], scales.expand(columns), settings.grid)
    blocks, outlier = [RoundedBlock(integers, scales)], weight[:, columns:]
    if settings.outlier_grid is not None and outlier.shape[1]:
        blocks.append(rounded_to_nearest(outlier, settings.outlier_grid, settings.clip_search, scale_dtype))
    return GptqResult(blocks, outlier, torch.zeros(len(weight)), 0.0, 0)


def _initial_scales(
    weight: torch.Tensor, importance: torch.Tensor | None, settings: WeightQuantization, scale_dtype: torch.dtype
) -> WeightScales:
    return initial_scales(weight, settings.grid, scale_dtype, settings.clip_search, importance)


def _gptq(
    weight: torch.Tensor,
    columns: int,
    moments: GroupMoments,
    settings: WeightQuantization,
    scale_dtype: torch.dtype,
) -> tuple[GptqResult, float]:
    """Returns the result and its error: the expected squared one of the output, over that of the output."""
    hessian, target = moments.hessian, weight

    def correct() -> torch.Tensor:
        assert moments.drift is not None
        return corrected(weight, Moments(hessian, moments.drift), columns, correction)

    def prepare() -> tuple[ColumnSolver, float]:
        moments.drift = None  # the solver needs the room
        energy = ((weight @ hessian.to(weight)) * weight).sum().clamp(min=_TINY)
        blocks = [ColumnBlock(columns, settings.grid), ColumnBlock(weight.shape[1] - columns)]
        order, size = settings.activation_order, settings.block_size
        return ColumnSolver(hessian, blocks, settings.damping, order, size, settings.sweeps), float(energy)

    if moments.drift is None:
        solver, energy = prepare()
    else:
        correction = _correction(weight, columns, moments, settings)
        moments.halves = []
        target, (solver, energy) = ranks().both(correct, prepare)
        target, solver = target.to(weight.device), solver.to(weight.device)
    settings = replace(settings, grid=grid_for(target[:, :columns], settings.grid))

    def solve(piece: torch.Tensor) -> GptqResult:
        return _packed(_rounded(piece, columns, hessian, solver, settings, scale_dtype))

    result = _joined(ranks().each(target.tensor_split(_pieces(len(target))), solve), weight)
    return result, float(result.loss.sum()) / energy


def _pieces(channels: int) -> int:
    return _MANY_PIECES if channels >= _MANY else min(_PIECES, max(1, channels // _LEAST))


def _rounded(
    weight: torch.Tensor,
    columns: int,
    hessian: torch.Tensor,
    solver: ColumnSolver,
    settings: WeightQuantization,
    scale_dtype: torch.dtype,
) -> GptqResult:
    """Rounds some of the output channels of a group."""
    base = _initial_scales(weight[:, :columns], hessian.diagonal()[:columns], settings, scale_dtype)
    best: GptqResult | None = None
    for candidate in settings.scale_candidates:
        trial = solver.solve(weight, [base if candidate == 1 else base.times(candidate, scale_dtype)])
        best = trial if best is None else _better_rows(best, trial)
    assert best is not None
    if settings.outlier_grid is None or weight.shape[1] == columns:
        return best
    return round_outliers(
        best,
        weight,
        hessian,
        settings.outlier_grid,
        scale_dtype,
        clip_search=settings.clip_search,
        activation_order=settings.activation_order,
        block_size=settings.block_size,
    )


def _packed(result: GptqResult) -> GptqResult:
    """The integers take a byte each while they wait, or travel to other ranks."""
    blocks = [RoundedBlock(block.integers.to(torch.int8), block.scales) for block in result.blocks]
    return replace(result, blocks=blocks)


def _joined(pieces: list[GptqResult], like: torch.Tensor) -> GptqResult:
    """The result for all output channels of what was rounded in pieces, with the dtype and device of the weight."""
    blocks = [
        RoundedBlock(
            torch.cat([block.integers.to(like) for block in parts]),
            WeightScales.joined([block.scales.to(like.device) for block in parts]),
        )
        for parts in zip(*(piece.blocks for piece in pieces), strict=True)
    ]
    return GptqResult(
        blocks,
        torch.cat([piece.outlier.to(like.device) for piece in pieces]),
        torch.cat([piece.loss.to(like.device) for piece in pieces]),
        max(piece.damping for piece in pieces),
        max(piece.attempts for piece in pieces),
    )


def _correction(weight: torch.Tensor, columns: int, moments: GroupMoments, settings: WeightQuantization) -> Correction:
    if settings.error_correction != "auto":
        return Correction(settings.error_correction, settings.damping)
    halves = moments.halves
    return cross_fitted(weight, halves, columns) if len(halves) == 2 else Correction(0.0, settings.damping)


def _better_rows(first: GptqResult, second: GptqResult) -> GptqResult:
    """Takes each output channel from the result with the smaller loss."""
    better = second.loss < first.loss
    rows = better.unsqueeze(1)
    return GptqResult(
        [
            RoundedBlock(torch.where(rows, theirs.integers, ours.integers), ours.scales.where(rows, theirs.scales))
            for ours, theirs in zip(first.blocks, second.blocks, strict=True)
        ],
        torch.where(rows, second.outlier, first.outlier),
        torch.where(better, second.loss, first.loss),
        max(first.damping, second.damping),
        max(first.attempts, second.attempts),
    )
