"""Integer grids for weights: scales, rounding, and the clip search.

The grid is the one of compressed-tensors, so that a stock runtime reads the same numbers: `bits`-bit integers from
-2^(bits-1) to 2^(bits-1) - 1 and a symmetric scale of absmax / ((2^bits - 1) / 2).
"""

from dataclasses import dataclass, replace

import torch
from quad_kernels import rounding_errors


@dataclass(frozen=True)
class IntegerGrid:
    """What a weight is rounded to.

    Attributes:
        bits: bits of an integer, 2 to 8.
        group_size: input coordinates per scale, None for one scale per output channel.
        symmetric: False adds an integer zero point per scale.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer."""
        return 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Number of scales per output channel.

        Raises:
            ValueError: if `columns` is not a multiple of `group_size`.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise ValueError(f"group_size ({self.group_size}) must divide the input width ({columns})")
        return columns // self.group_size


@dataclass
class WeightScales:
    """Scales and zero points, `[out, groups]`; the zero point is an integer-valued float (0 when symmetric)."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def expand(self, columns: int) -> "WeightScales":
        """One scale per weight, `[out, columns]`."""
        repeat = columns // self.scale.shape[1]
        return WeightScales(
            self.scale.repeat_interleave(repeat, dim=1), self.zero_point.repeat_interleave(repeat, dim=1)
        )


def round_to_grid(weight: torch.Tensor, scales: WeightScales, grid: IntegerGrid) -> torch.Tensor:
    """Returns integer-valued floats, same shape as `weight`; scales must broadcast against it."""
    return (weight / scales.scale + scales.zero_point).round_().clamp_(grid.low, grid.high)


def dequantize(integers: torch.Tensor, scales: WeightScales) -> torch.Tensor:
    """Returns (q - zero_point) * scale."""
    return (integers - scales.zero_point) * scales.scale


def full_range_scales(weight: torch.Tensor, grid: IntegerGrid, scale_dtype: torch.dtype) -> WeightScales:
    """Returns the scales that clip nothing.

    Args:
        weight: `[out, in]`, float32.
        grid: the integer grid.
        scale_dtype: the dtype in which the checkpoint stores scales; they are rounded to it here, before any weight
            is rounded with them.
    """
    grouped = weight.reshape(weight.shape[0], grid.groups(weight.shape[1]), -1)
    if grid.symmetric:
        scale = grouped.abs().amax(-1) / ((grid.high - grid.low) / 2)
        return WeightScales(storable(scale, scale_dtype), torch.zeros_like(scale))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = storable((high - low) / (grid.high - grid.low), scale_dtype)
    return WeightScales(scale, (grid.low - low / scale).round().clamp(grid.low, grid.high))


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns scales as a checkpoint of `dtype` holds them, never zero; the dtype of the result is that of `scale`.

    float16 may hold them as subnormals: its smallest normal number, 6e-5, is far above the scale of a small row. Those
    of the other dtypes are below any weight, and slow or zero on some processors.
    """
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny * finfo.eps if dtype == torch.float16 else finfo.tiny
    return scale.clamp(min=smallest, max=finfo.max).to(dtype).to(scale.dtype)


def search_clip(
    weight: torch.Tensor,
    grid: IntegerGrid,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    candidates: int = 40,
    smallest: float = 0.4,
) -> WeightScales:
    """Returns the scales of least weighted squared rounding error (QUAD, section 4.1: MSE clip search).

    Args:
        weight: `[out, in]`, float32.
        grid: the integer grid.
        scale_dtype: storage dtype of scales.
        importance: `[in]`, weight of each input's error (the Hessian's diagonal); None counts all alike.
        candidates: number of clip ratios tried between `smallest` and 1.
        smallest: smallest clip ratio.
    """
    width = weight.shape[1]
    cost = torch.ones(width, device=weight.device) if importance is None else importance.to(weight)
    grouped = weight.reshape(len(weight), grid.groups(width), -1)
    ends = torch.stack([grouped.amin(-1), grouped.amax(-1)], dim=-1).flatten(1)  # all that the scales depend on
    pairs = replace(grid, group_size=2)
    ratios = torch.linspace(1.0, smallest, candidates).tolist()
    trials = [full_range_scales(ends * ratio, pairs, scale_dtype) for ratio in ratios]
    scale, zero_point = torch.stack([t.scale for t in trials]), torch.stack([t.zero_point for t in trials])
    errors = rounding_errors(weight, scale, zero_point, cost, low=grid.low, high=grid.high)
    best = errors.argmin(0, keepdim=True)  # the first of those that are alike: the one that clips least
    return WeightScales(scale.gather(0, best).squeeze(0), zero_point.gather(0, best).squeeze(0))
