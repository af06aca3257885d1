"""Plain data that the operations share: how an input is split and quantized, and what comes of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


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
        blocks = x.unflatten(-1, (-1, self.block))
        outlier = blocks[..., : self.outliers].flatten(-2)
        residual = blocks[..., self.outliers :]
        if self.keep_width:
            residual = torch.nn.functional.pad(residual, (self.outliers, 0))
        return outlier, residual.flatten(-2)


@dataclass(frozen=True)
class InputQuantization:
    """Dynamic symmetric integer quantization of the residual part of an input.

    Attributes:
        bits: width of the integers, 2 to 8.
        clip_ratio: share of the largest magnitude that the grid covers; 1.0 is the grid of compressed-tensors.
        group_size: coordinates per scale, None for one scale per token.
    """

    bits: int = 4
    clip_ratio: float = 1.0
    group_size: int | None = None

    def groups(self, width: int) -> int:
        """Scales per token of `width` coordinates."""
        return 1 if self.group_size is None else width // self.group_size


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


class QuantizedActivations(NamedTuple):
    """A split and quantized input.

    Attributes:
        outlier: full-precision coordinates, `[..., rank]`, dtype of the input; None for rank 0.
        integers: `[..., n]`, int8, or packed in bytes, `[..., nibble_bytes(n)]`, uint8.
        scale: `[..., groups]`, float32.
    """

    outlier: torch.Tensor | None
    integers: torch.Tensor
    scale: torch.Tensor


class KVEntries(NamedTuple):
    """Quantized vectors.

    Attributes:
        integers: 0 to 15, `[..., head_dim / 2]`, uint8: byte j holds coordinate j in its low four bits and coordinate
            head_dim / 2 + j in its high four.
        scale: distance of two grid points, `[...]`.
        zero: value of the integer 0, `[...]`.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
