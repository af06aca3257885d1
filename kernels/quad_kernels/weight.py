"""The quantized weight of a linear layer in the layout of the backend that will read it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from quad_kernels.formats import InputQuantization
from quad_kernels.packing import pack_int32, pack_nibbles, unpack_int32, unpack_nibbles

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


def prepare_weight(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    bits: int,
    in_features: int,
    quantization: InputQuantization | None,
    zero_point: torch.Tensor | None = None,
    backend: str | None = None,
) -> LinearWeight:
    """Turns the tensors of a checkpoint into the layout that the backend of their device reads; done once, at load.

    Args:
        weight_packed: `[out, ceil(in * bits / 32)]`, int32, as compressed-tensors' pack-quantized format has it.
        weight_scale: `[out, groups]`, floating point.
        bits: 2, 4 or 8.
        in_features: input width.
        quantization: of the inputs that the weight will be multiplied with, None if they stay floating point.
        zero_point: packed along the output channels, `[ceil(out * bits / 32), groups]`, int32, or None.
        backend: name of a backend; by default as in `quad_kernels.choose_backend`.

    Raises:
        ValueError: if the shapes contradict each other.
    """
    from quad_kernels.backends import choose_backend  # imports this module

    words = -(-in_features * bits // 32)
    if weight_packed.shape[1] != words:
        raise ValueError(
            f"{in_features} inputs of {bits} bits are {words} words, weight_packed has {weight_packed.shape[1]}"
        )
    if weight_scale.shape[0] != weight_packed.shape[0] or in_features % weight_scale.shape[1]:
        raise ValueError(
            f"weight_scale {list(weight_scale.shape)} does not fit a weight of {weight_packed.shape[0]} outputs and "
            f"{in_features} inputs"
        )
    out_features = weight_packed.shape[0]
    zeros = None if zero_point is None else unpack_int32(zero_point.T.contiguous(), bits, out_features).T.contiguous()
    integers = unpack_int32(weight_packed, bits, in_features)
    weight = LinearWeight(integers, weight_scale, zeros, in_features, out_features, bits)
    return choose_backend(weight_packed.device, backend).prepare_weight(weight, quantization)


__all__ = [
    "LinearWeight",
    "WeightLayout",
    "expand_scales",
    "prepare_weight",
    "unpack_integers",
]
