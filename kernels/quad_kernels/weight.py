"""The quantized weight of a linear layer in the layout of the backend that will read it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from quad_kernels.packing import pack_int32, pack_nibbles, unpack_nibbles

WeightLayout = Literal["int8", "nibbles", "onednn"]


@dataclass(frozen=True)
class LinearWeight:
    """Integers and scales of a weight `[out_features, in_features]`.

    Attributes:
        integers: layout int8: `[out, in]`, int8. Layout nibbles: `[out, nibble_bytes(in)]`, uint8, at most 4 bits
            (`quad_kernels.packing.nibbles` has the order). Layout onednn: opaque, one byte each, for oneDNN's int8
            product on the CPU.
        scale: `[out, groups]`, floating point.
        zero_point: `[out, groups]`, int8, or None on a symmetric grid.
        in_features: input width.
        out_features: output channels.
        bits: width of the integers, 2 to 8.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    in_features: int
    out_features: int
    bits: int

    @property
    def layout(self) -> WeightLayout:
        """How `integers` is stored."""
        if self.integers.is_mkldnn:
            return "onednn"
        return "nibbles" if self.integers.dtype == torch.uint8 else "int8"

    def unpacked(self) -> torch.Tensor:
        """The integers, `[out, in]`, int8."""
        if self.layout == "onednn":
            return self.integers.to_dense().T.contiguous()
        return unpack_integers(self.integers, self.in_features)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as floating point, `[out, in]`."""
        values = self.unpacked().float()
        if self.zero_point is not None:
            values -= expand_scales(self.zero_point.float(), self.in_features)
        return values.mul_(expand_scales(self.scale.float(), self.in_features)).to(dtype)

    def to_layout(self, layout: WeightLayout) -> "LinearWeight":
        """The same weight stored in another layout; more than 4 bits stay int8."""
        if layout == "nibbles" and self.bits > 4:
            layout = "int8"
        if layout == self.layout:
            return self
        integers = self.unpacked()
        if layout == "nibbles":
            integers = pack_nibbles(integers)
        elif layout == "onednn":
            integers = torch.ops.onednn.qlinear_prepack(integers, None)
        return replace(self, integers=integers)

    def to_words(self) -> torch.Tensor:
        """The integers as the checkpoint stores them, `[out, ceil(in * bits / 32)]`, int32."""
        return pack_int32(self.unpacked(), self.bits)


def unpack_integers(integers: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns `[..., columns]`, int8, from either layout."""
    return unpack_nibbles(integers, columns) if integers.dtype == torch.uint8 else integers


def expand_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns one value per coordinate, `[..., columns]`, from one per group, `[..., groups]`."""
    return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)


__all__ = [
    "LinearWeight",
    "WeightLayout",
    "expand_scales",
    "unpack_integers",
]
