"""Grids for weights: scales, rounding, and the clip search.

Grids are those of compressed-tensors, so that a stock runtime reads the same numbers: `bits`-bit integers from
-2^(bits-1) to 2^(bits-1) - 1 and a symmetric scale of absmax / ((2^bits - 1) / 2), or 4-bit floating-point numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from quad_kernels import FloatGrid, IntegerGrid, WeightGrid, rounding_errors
from quad_kernels.float4 import round_e2m1


@dataclass
class WeightScales:
    """Scales and zero points of the groups of a weight.

    Attributes:
        scale: steps of the groups, `[out, groups]`; with sub-scales the products of `base` and `sub_scale`.
        zero_point: integer-valued floats, `[out, groups]`, 0 when symmetric.
        base: floating-point scales, `[out, 1]`, None without sub-scales.
        sub_scale: integer-valued floats from 1 on, `[out, groups]`, None without.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    base: torch.Tensor | None = None
    sub_scale: torch.Tensor | None = None

    @classmethod
    def sub_scaled(cls, base: torch.Tensor, sub_scale: torch.Tensor) -> "WeightScales":
        """Returns scales of two levels: `base` `[out, 1]`, `sub_scale` `[out, groups]`, both floating point."""
        return cls(base * sub_scale, torch.zeros_like(sub_scale), base, sub_scale)

    @classmethod
    def joined(cls, parts: "Sequence[WeightScales]") -> "WeightScales":
        """Returns the scales of the rows of several, one after the other."""
        columns = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        return cls(*(None if each[0] is None else torch.cat(each) for each in columns))

    def expand(self, columns: int) -> "WeightScales":
        """One scale per weight, `[out, columns]`."""
        repeat = columns // self.scale.shape[1]
        return WeightScales(
            self.scale.repeat_interleave(repeat, dim=1), self.zero_point.repeat_interleave(repeat, dim=1)
        )

    def to(self, device: torch.device) -> "WeightScales":
        """Returns the scales on a device."""
        moved = [getattr(self, field.name) for field in fields(self)]
        return WeightScales(*(None if each is None else each.to(device) for each in moved))

    def times(self, factor: float, dtype: torch.dtype) -> "WeightScales":
        """Returns scales that are multiplied by a number, as a checkpoint of `dtype` holds them."""
        if self.base is not None and self.sub_scale is not None:
            return WeightScales.sub_scaled(storable(self.base * factor, dtype), self.sub_scale)
        return WeightScales(storable(self.scale * factor, dtype), self.zero_point)

    def where(self, rows: torch.Tensor, others: "WeightScales") -> "WeightScales":
        """Returns these scales, with those of `others` in the rows where `rows`, `[out, 1]`, is True."""
        pairs = [(getattr(self, field.name), getattr(others, field.name)) for field in fields(self)]
        return WeightScales(*(None if ours is None else torch.where(rows, theirs, ours) for ours, theirs in pairs))


# Scales of floating-point numbers that are tried, over the one that holds the largest magnitude: 1.5 brings that to 4
# instead of 6, below which the numbers lie closer.
# There are 8 scales of NVFP4 from one power of two to the next, and one of MXFP4.
_FLOAT_RATIOS = {"nvfp4": [1.6 * 2 ** (-step / 8) for step in range(14)], "mxfp4": [2.0, 1.0, 0.5]}


def grid_for(weight: torch.Tensor, grid: WeightGrid) -> WeightGrid:
    """Returns a grid whose scales can be stored for a whole weight, `[out, in]`, however it is then cut into pieces."""
    return grid.fitted(weight, max(_FLOAT_RATIOS[grid.number_format])) if isinstance(grid, FloatGrid) else grid


def round_to_grid(weight: torch.Tensor, scales: WeightScales, grid: WeightGrid) -> torch.Tensor:
    """Returns integer-valued floats, same shape as `weight`; scales must broadcast against it."""
    if isinstance(grid, FloatGrid):
        return round_e2m1(weight / scales.scale)
    return (weight / scales.scale + scales.zero_point).round_().clamp_(grid.low, grid.high)


def dequantize(integers: torch.Tensor, scales: WeightScales) -> torch.Tensor:
    """Returns (q - zero_point) * scale."""
    return (integers - scales.zero_point) * scales.scale


def full_range_scales(weight: torch.Tensor, grid: WeightGrid, scale_dtype: torch.dtype) -> WeightScales:
    """Returns the scales that clip nothing.

    Args:
        weight: `[out, in]`, float32.
        grid: the grid.
        scale_dtype: the dtype in which the checkpoint stores scales; they are rounded to it here, before any weight
            is rounded with them. Scales of floating-point numbers have a dtype of their own.
    """
    grouped = weight.reshape(weight.shape[0], grid.groups(weight.shape[1]), -1)
    if isinstance(grid, FloatGrid):
        return _float_scales(grouped.abs().amax(-1), grid)
    if grid.sub_scale_bits is not None:
        steps = grouped.abs().amax(-1) / ((grid.high - grid.low) / 2)
        most = 2**grid.sub_scale_bits - 1
        widest = steps.amax(1, keepdim=True)
        base = storable(widest * (1 + torch.finfo(scale_dtype).eps) / most, scale_dtype)  # not rounded below it
        return WeightScales.sub_scaled(base, (steps / base).ceil_().clamp_(1, most))
    if grid.symmetric:
        scale = grouped.abs().amax(-1) / ((grid.high - grid.low) / 2)
        return WeightScales(storable(scale, scale_dtype), torch.zeros_like(scale))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = storable((high - low) / (grid.high - grid.low), scale_dtype)
    return WeightScales(scale, (grid.low - low / scale).round().clamp(grid.low, grid.high))


def _float_scales(largest: torch.Tensor, grid: FloatGrid) -> WeightScales:
    scale = grid.scale(largest)
    return WeightScales(scale, torch.zeros_like(scale))


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns scales as a checkpoint of `dtype` holds them, never zero; the dtype of the result is that of `scale`.

    float16 may hold them as subnormals: its smallest normal number, 6e-5, is far above the scale of a small row. Those
    of the other dtypes are below any weight, and slow or zero on some processors.
    """
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny * finfo.eps if dtype == torch.float16 else finfo.tiny
    return scale.clamp(min=smallest, max=finfo.max).to(dtype).to(scale.dtype)


def initial_scales(
    weight: torch.Tensor,
    grid: WeightGrid,
    scale_dtype: torch.dtype,
    clip_search: bool,
    importance: torch.Tensor | None = None,
) -> WeightScales:
    """Returns the scales of `search_clip`, or with `clip_search` False those that clip nothing."""
    if not clip_search:
        return full_range_scales(weight, grid, scale_dtype)
    return search_clip(weight, grid, scale_dtype, importance)


def search_clip(
    weight: torch.Tensor,
    grid: WeightGrid,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    candidates: int = 40,
    smallest: float = 0.4,
) -> WeightScales:
    """Returns the scales of least weighted squared rounding error (QUAD, section 4.1: MSE clip search).

    Args:
        weight: `[out, in]`, float32.
        grid: the grid.
        scale_dtype: storage dtype of scales.
        importance: `[in]`, weight of each input's error (the Hessian's diagonal); None counts all alike.
        candidates: number of clip ratios tried between `smallest` and 1.
        smallest: smallest clip ratio; floating-point numbers have candidates of their own.
    """
    width = weight.shape[1]
    cost = torch.ones(width, device=weight.device) if importance is None else importance.to(weight)
    if isinstance(grid, FloatGrid):
        largest = weight.reshape(len(weight), grid.groups(width), -1).abs().amax(-1)
        tried = [_float_scales(largest * ratio, grid) for ratio in _FLOAT_RATIOS[grid.number_format]]
        return _best_of(weight, tried, grid, cost)
    if grid.sub_scale_bits is not None:
        return _search_sub_scales(weight, grid, scale_dtype, cost)
    grouped = weight.reshape(len(weight), grid.groups(width), -1)
    ends = torch.stack([grouped.amin(-1), grouped.amax(-1)], dim=-1).flatten(1)  # all that the scales depend on
    pairs = replace(grid, group_size=2)
    ratios = torch.linspace(1.0, smallest, candidates).tolist()
    return _best_of(weight, [full_range_scales(ends * ratio, pairs, scale_dtype) for ratio in ratios], grid, cost)


def _best_of(
    weight: torch.Tensor, trials: Sequence[WeightScales], grid: WeightGrid, cost: torch.Tensor
) -> WeightScales:
    """Of scales of one level, those of each group with the least error."""
    scale, zero_point = torch.stack([t.scale for t in trials]), torch.stack([t.zero_point for t in trials])
    e2m1 = isinstance(grid, FloatGrid)
    errors = rounding_errors(weight, scale, zero_point, cost, low=grid.low, high=grid.high, e2m1=e2m1)
    best = errors.argmin(0, keepdim=True)  # the first of those that are alike: the one that clips least
    return WeightScales(scale.gather(0, best).squeeze(0), zero_point.gather(0, best).squeeze(0))


def _search_sub_scales(
    weight: torch.Tensor, grid: IntegerGrid, scale_dtype: torch.dtype, cost: torch.Tensor
) -> WeightScales:
    """The base of each row and the sub-scale of each group of least weighted squared rounding error.

    All sub-scales are tried with some bases: those that give the group of the widest step a sub-scale from the upper
    half, and that of the full range.
    """
    steps = search_clip(weight, replace(grid, sub_scale_bits=None), torch.float32, cost).scale
    assert grid.sub_scale_bits is not None
    most = 2**grid.sub_scale_bits - 1
    widest = steps.amax(1, keepdim=True)
    bases = [storable(widest / largest, scale_dtype) for largest in range(most, most // 2, -1)]
    whole = full_range_scales(weight, grid, scale_dtype)
    assert whole.base is not None
    best, least = whole, torch.full((len(weight), 1), torch.inf, device=weight.device)
    factors = torch.arange(1.0, most + 1, device=weight.device)
    for base in (*bases, whole.base):
        trials = (base * factors).T.unsqueeze(-1).expand(-1, -1, steps.shape[1]).contiguous()
        errors = rounding_errors(weight, trials, torch.zeros_like(trials), cost, low=grid.low, high=grid.high)
        error, index = errors.min(0)
        found = WeightScales.sub_scaled(base, factors[index])
        total = error.sum(1, keepdim=True)
        best = best.where(total < least, found)
        least = torch.minimum(least, total)
    return best
