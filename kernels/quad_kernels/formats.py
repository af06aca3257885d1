"""Plain data that the operations share: how an input is split and quantized, and what comes of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from quad_kernels import float4
from quad_kernels.float4 import NumberFormat


@dataclass(frozen=True)
class InputSplit:
    """Outlier coordinates are the first `outliers` of every `block` coordinates.

    U-type inputs (q, k, v, gate, up) have one block: the residual stream with its outlier coordinates first. D-type
    inputs (o_proj, down_proj) have one block per head, or one for all channels; their residual keeps the full width
    with zeros where the outliers were, so that the online Hadamard has a convenient size.

    Attributes:
        width: number of coordinates of the input.
        outliers: outlier coordinates per block, 0 for none.
        block: coordinates per block, a divisor of `width`; 0 means `width`.
        keep_width: True if the residual keeps `width` coordinates, outliers zeroed, instead of dropping them.
        hadamard: True if an online Hadamard is applied to the residual.
    """

    width: int
    outliers: int = 0
    block: int = 0
    keep_width: bool = False
    hadamard: bool = False

    def __post_init__(self) -> None:
        if self.block == 0:
            object.__setattr__(self, "block", self.width)
        if self.block < 1 or self.width % self.block:
            raise ValueError(f"block ({self.block}) must divide the input width ({self.width})")
        if not 0 <= self.outliers < self.block:
            raise ValueError(f"outliers per block ({self.outliers}) must be smaller than the block ({self.block})")

    @property
    def rank(self) -> int:
        """Total number of outlier coordinates."""
        return self.outliers * (self.width // self.block)

    @property
    def residual_width(self) -> int:
        """Input width of the residual linear."""
        return self.width if self.keep_width else self.width - self.rank

    def outlier_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Positions of the outlier coordinates, `[rank]`, int64."""
        positions = torch.arange(self.width, device=device)
        return positions[positions % self.block < self.outliers]

    def divide(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Returns outliers `[..., rank]` (None for rank 0) and residual `[..., residual_width]`, not transformed."""
        if not self.outliers:
            return None, x
        residual = x.unflatten(-1, (-1, self.block))[..., self.outliers :]
        if self.keep_width:
            residual = torch.nn.functional.pad(residual, (self.outliers, 0))
        return self.outliers_of(x), residual.flatten(-2)

    def outliers_of(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the outlier coordinates of `x`, `[..., rank]`."""
        return x.unflatten(-1, (-1, self.block))[..., : self.outliers].flatten(-2)


@dataclass(frozen=True)
class IntegerGrid:
    """What a weight is rounded to; see docs/concepts/two-level.md for sub-scales.

    Attributes:
        bits: bits of an integer, 2 to 8.
        group_size: input coordinates per scale, None for one scale per output channel.
        symmetric: False adds an integer zero point per scale.
        sub_scale_bits: bits of an integer factor per group, with one floating-point scale per output channel; None for
            a floating-point scale per group.

    Raises:
        ValueError: for sub-scales without groups, with zero points, or whose products leave 8 bits.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    sub_scale_bits: int | None = None

    def __post_init__(self) -> None:
        problem = sub_scale_problem(self.bits, self.group_size, self.sub_scale_bits)
        if problem is not None:
            raise ValueError(problem)
        if self.sub_scale_bits is not None and not self.symmetric:
            raise ValueError("sub_scale_bits goes with symmetric integers, not with zero points")

    @property
    def number_format(self) -> NumberFormat:
        """What is rounded to: integers."""
        return "int"

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest integer."""
        return 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Number of groups per output channel.

        Raises:
            ValueError: if `columns` is not a multiple of `group_size`.
        """
        return _groups(columns, self.group_size)

    def scales(self, columns: int) -> int:
        """Number of floating-point scales per output channel; ValueError as from `groups`."""
        groups = self.groups(columns)
        return groups if self.sub_scale_bits is None else 1


def _groups(columns: int, size: int | None) -> int:
    if size is None:
        return 1
    if columns % size:
        raise ValueError(f"group_size ({size}) must divide the input width ({columns})")
    return columns // size


@dataclass(frozen=True)
class FloatGrid:
    """4-bit floating-point numbers that a weight is rounded to; `quad_kernels.float4` says how they are stored.

    Attributes:
        number_format: "nvfp4" or "mxfp4".
        unit: a power of two that scales are stored in, for nvfp4: that of the weight (`fitted`).

    Raises:
        ValueError: for another number format.
    """

    number_format: NumberFormat
    unit: float = 1.0

    def __post_init__(self) -> None:
        if self.number_format not in float4.GROUP_SIZES:
            raise ValueError(
                f"number_format ({self.number_format!r}) must be one of {', '.join(float4.GROUP_SIZES)} here"
            )

    bits = 4
    symmetric = True
    sub_scale_bits = None
    low = -float4.LARGEST
    high = float4.LARGEST

    @property
    def group_size(self) -> int:
        """Input coordinates per scale."""
        return float4.GROUP_SIZES[self.number_format]

    def groups(self, columns: int) -> int:
        """Number of groups per output channel; ValueError if `columns` is not a multiple of `group_size`."""
        return _groups(columns, self.group_size)

    scales = groups

    def fitted(self, weight: torch.Tensor, widening: float) -> "FloatGrid":
        """Returns the grid for a weight whose scales may be `widening` times those that clip nothing."""
        if self.number_format != "nvfp4" or not weight.numel():
            return self
        return FloatGrid(self.number_format, float4.unit_of(float(weight.abs().max()) * widening / float4.LARGEST))

    def scale(self, largest: torch.Tensor) -> torch.Tensor:
        """Returns the scales of groups by the largest magnitude that they are to hold, as a checkpoint holds them."""
        scale = float4.input_scale(largest, self.number_format)
        return float4.storable_scale(scale, self.number_format, self.unit)


WeightGrid = IntegerGrid | FloatGrid


def weight_grid(
    bits: int, group_size: int | None, symmetric: bool, sub_scale_bits: int | None, number_format: NumberFormat
) -> WeightGrid:
    """Returns the grid of a weight by its settings; those of floating-point numbers must be their own.

    Raises:
        ValueError: for settings that do not go together.
    """
    if number_format == "int":
        return IntegerGrid(bits, group_size, symmetric, sub_scale_bits)
    problem = float_problem(number_format, bits, group_size, sub_scale_bits, symmetric=symmetric)
    if problem is not None:
        raise ValueError(problem)
    return FloatGrid(number_format)


@dataclass(frozen=True)
class InputQuantization:
    """Dynamic integer quantization of the residual part of an input.

    Attributes:
        bits: width of the integers, 2 to 8.
        clip_ratio: share of the largest magnitude, or of the range, that the grid covers; 1.0 is the grid of
            compressed-tensors.
        group_size: coordinates per scale, None for one scale per token.
        sub_scale_bits: bits of an integer factor per group, with one floating-point scale per token; None for a
            floating-point scale per group.
        symmetric: False adds an integer zero point per scale, for up to 7 bits: what kernels multiply are the integers
            less their zero points, which take a bit more.
        number_format: "nvfp4" or "mxfp4" for 4-bit floating-point numbers in groups of 16 or 32, which kernels get as
            integers of twice their value; "int" for integers.
        four_over_six: True makes the largest magnitude of a group of NVFP4 either 6 or 4, whichever rounds the group
            with the smaller squared error (arXiv 2512.02010).

    Raises:
        ValueError: for sub-scales without groups, with zero points, or whose products leave 8 bits, for zero points
            with 8 bits, and for floating-point numbers with anything but their own 4 bits and groups.
    """

    bits: int = 4
    clip_ratio: float = 1.0
    group_size: int | None = None
    sub_scale_bits: int | None = None
    symmetric: bool = True
    number_format: NumberFormat = "int"
    four_over_six: bool = False

    def __post_init__(self) -> None:
        problem = sub_scale_problem(self.bits, self.group_size, self.sub_scale_bits)
        if self.four_over_six and self.number_format != "nvfp4":
            problem = f"four_over_six is for nvfp4, not for {self.number_format}"
        if problem is None and self.number_format != "int":
            problem = float_problem(
                self.number_format, self.bits, self.group_size, self.sub_scale_bits, symmetric=self.symmetric
            )
        if problem is None and not self.symmetric:
            problem = self._zero_point_problem()
        if problem is not None:
            raise ValueError(problem)

    def _zero_point_problem(self) -> str | None:
        if self.sub_scale_bits is not None:
            return "sub_scale_bits goes with symmetric integers, not with zero points"
        if self.bits > 7:
            return f"inputs of {self.bits} bits less their zero points do not fit into 8 bits; use 7, or symmetric ones"
        return None

    @property
    def largest_sub_scale(self) -> int:
        """Largest factor of a group, 0 without sub-scales."""
        return 0 if self.sub_scale_bits is None else 2**self.sub_scale_bits - 1

    @property
    def integer_bits(self) -> int:
        """Width of the signed integers that kernels multiply: with sub-scales products, else less zero points."""
        if self.sub_scale_bits is not None:
            return 8
        if self.number_format != "int":
            return float4.INTEGER_BITS
        return self.bits if self.symmetric else self.bits + 1

    @property
    def kernel_format(self) -> int:
        """The number format as kernels get it: 0 for integers, 1 for NVFP4, 2 for MXFP4, 3 for four over six."""
        return 3 if self.four_over_six else ("int", "nvfp4", "mxfp4").index(self.number_format)

    def groups(self, width: int) -> int:
        """Groups per token of `width` coordinates."""
        return 1 if self.group_size is None else width // self.group_size

    def scales(self, width: int) -> int:
        """Floating-point scales per token of `width` coordinates."""
        return self.groups(width) if self.sub_scale_bits is None else 1


def sub_scale_problem(bits: int, group_size: int | None, sub_scale_bits: int | None) -> str | None:
    """Returns what is wrong with such sub-scales, None if nothing is."""
    if sub_scale_bits is None:
        return None
    if group_size is None:
        return "sub_scale_bits needs a group_size: a sub-scale belongs to a group"
    if sub_scale_bits < 1 or 2 ** (bits - 1) * (2**sub_scale_bits - 1) > 127:
        return (
            f"integers of {bits} bits times sub-scales of {sub_scale_bits} bits do not fit into 8 bits; use 4 and 4, "
            "or fewer"
        )
    return None


def float_problem(
    number_format: str, bits: int, group_size: int | None, sub_scale_bits: int | None, *, symmetric: bool
) -> str | None:
    """Returns what does not go with 4-bit floating-point numbers, None if everything does."""
    size = float4.GROUP_SIZES.get(number_format)
    if size is None:
        return f"number_format ({number_format!r}) must be int, {' or '.join(float4.GROUP_SIZES)}"
    if bits != 4:
        return f"numbers of {number_format} have 4 bits, not {bits}"
    if group_size != size:
        return f"groups of {number_format} are of {size}, not {group_size}"
    if sub_scale_bits is not None or not symmetric:
        return f"{number_format} has neither sub_scale_bits nor zero points; leave them out"
    return None


@dataclass(frozen=True)
class RMSNorm:
    """A root mean square norm computed before the split, y = cast(x / sqrt(mean(x^2) + eps)) * weight.

    The statistics are float32; the normalised value is rounded to the dtype of x before the weight multiplies it, as
    transformers' Llama does.

    Attributes:
        weight: factors of the coordinates, `[width]`, dtype of x, or None for all ones.
        eps: number that is added to the mean square.
    """

    weight: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised `x`, `[..., width]`, dtype of `x`."""
        wide = x.float()
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight


class LowRank(NamedTuple):
    """A low-rank branch of a linear, (x down^T) up^T of the unsplit input, in floating point.

    Attributes:
        down: `[rank, in]`.
        up: `[out, rank]`, dtype of `down`.
    """

    down: torch.Tensor
    up: torch.Tensor

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x down^T, `[..., rank]`, rounded to the dtype of `x`, `[..., in]`."""
        return torch.nn.functional.linear(x, self.down.to(x.dtype))

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the branch of `x`, `[..., in]`, as `[..., out]`, float32."""
        return torch.nn.functional.linear(self.inner(x).float(), self.up.float())

    def behind(
        self, x: torch.Tensor, outlier: torch.Tensor | None, weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns outliers and their weight with the branch behind them, for kernels that know of outliers only.

        Without outliers the weight is `up` itself; else it is put together in every call.

        Args:
            x: unsplit input, `[..., in]`.
            outlier: its outlier coordinates, `[..., n]`, or None.
            weight: their weight, `[out, n]`, or None, which leaves them out.

        Returns:
            `[..., n + rank]` and `[out, n + rank]`.
        """
        if outlier is None or weight is None:
            return self.inner(x), self.up
        return torch.cat([outlier, self.inner(x)], dim=-1), torch.cat([weight, self.up.to(weight.dtype)], dim=-1)


class QuantizedActivations(NamedTuple):
    """A split and quantized input.

    Attributes:
        outlier: full-precision coordinates, `[..., rank]`, dtype of the input; None for rank 0.
        integers: `[..., n]`, int8, or packed in bytes, `[..., nibble_bytes(n)]`, uint8; with sub-scales the products of
            integers and the sub-scales of their groups, on asymmetric grids less their zero points.
        scale: `[..., scales]`, float32.
    """

    outlier: torch.Tensor | None
    integers: torch.Tensor
    scale: torch.Tensor


class KVEntries(NamedTuple):
    """Quantized vectors.

    Attributes:
        integers: 0 to 15, `[..., head_dim / 2]`, uint8: byte j holds coordinate j in its low four bits and coordinate
            head_dim / 2 + j in its high four. In 8 bits 0 to 255, `[..., head_dim]`, one byte each.
        scale: distance of two grid points, `[...]`.
        zero: value of the integer 0, `[...]`.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
