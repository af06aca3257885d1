"""The quantized weight of a linear layer, in the layout of the backend that will read it."""

from dataclasses import dataclass, replace

import torch

from quad_kernels import float4
from quad_kernels.float4 import NumberFormat
from quad_kernels.layouts import find_layout
from quad_kernels.packing import pack_int32, unpack_int32

SUB_SCALE_BITS = 4  # in a checkpoint
SUB_SCALE_OFFSET = 8  # packed integers are signed


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and scales of a weight `[out_features, in_features]`.

    Attributes:
        integers: integers as `layout` stores them; `[out, in]`, int8, in layout int8.
        scale: scales, `[out, groups]`, floating point; `[out, 1]` with sub-scales.
        zero_point: zero points, `[out, groups]`, int8, or None on a symmetric grid.
        in_features: input width.
        out_features: number of output channels.
        bits: width of `integers`, 2 to 8.
        layout: name of the layout of `integers`, one of `quad_kernels.layouts`.
        sub_scale: integer factors of the groups, `[groups, out]`, int8, at least 1; None without. The weight is scale *
            sub_scale * integer.
        folded_bits: width of the integers that a checkpoint stores, if `integers` are their products with the
            sub-scales, 8 bits wide; else 0.
        number_format: "nvfp4" or "mxfp4" if `integers` are doubled 4-bit floating-point numbers; their `bits` are 5.

    Example:
        >>> integers = torch.tensor([[1, -2], [7, -8]], dtype=torch.int8)
        >>> weight = QuantizedWeight(integers, torch.tensor([[0.5], [2.0]]), None, 2, 2, bits=4)
        >>> weight.dequantized(torch.float32)
        tensor([[  0.5000,  -1.0000],
                [ 14.0000, -16.0000]])
        >>> weight.to_layout("nibbles").integers.shape
        torch.Size([2, 64])
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    in_features: int
    out_features: int
    bits: int
    layout: str = "int8"
    sub_scale: torch.Tensor | None = None
    folded_bits: int = 0
    number_format: NumberFormat = "int"

    @classmethod
    def of_float4(
        cls, weight_packed: torch.Tensor, scale: torch.Tensor, number_format: NumberFormat
    ) -> "QuantizedWeight":
        """Returns the weight of 4-bit floating-point numbers that a checkpoint stores, in layout int8.

        Args:
            weight_packed: `[out, in / 2]`, uint8, as compressed-tensors' formats for them have it.
            scale: scales of doubled numbers, `[out, groups]`, floating point (`quad_kernels.float4.scale_of_stored`).
            number_format: "nvfp4" or "mxfp4".

        Raises:
            ValueError: if the shapes contradict each other.
        """
        out_features, in_features = len(weight_packed), 2 * weight_packed.shape[1]
        size = float4.GROUP_SIZES[number_format]
        if scale.shape != (out_features, in_features // size) or in_features % size:
            raise ValueError(
                f"weight_scale {list(scale.shape)} does not fit a weight of {out_features} outputs and {in_features} "
                f"inputs in groups of {size}"
            )
        integers = float4.unpack_e2m1(weight_packed)
        return cls(integers, scale, None, in_features, out_features, float4.INTEGER_BITS, number_format=number_format)

    @classmethod
    def from_words(
        cls,
        weight_packed: torch.Tensor,
        weight_scale: torch.Tensor,
        bits: int,
        in_features: int,
        zero_point_words: torch.Tensor | None = None,
        sub_scale_words: torch.Tensor | None = None,
    ) -> "QuantizedWeight":
        """Returns the weight that a checkpoint stores, in layout int8.

        Args:
            weight_packed: `[out, ceil(in * bits / 32)]`, int32, as compressed-tensors' pack-quantized format has it.
            weight_scale: `[out, groups]`, floating point.
            bits: 2, 4 or 8.
            in_features: input width.
            zero_point_words: packed along the output channels, `[ceil(out * bits / 32), groups]`, int32, or None.
            sub_scale_words: sub-scales less 8, packed likewise with 4 bits, `[ceil(out / 8), groups]`, int32, or None.

        Raises:
            ValueError: if the shapes contradict each other.
        """
        words = -(-in_features * bits // 32)
        if weight_packed.shape[1] != words:
            raise ValueError(
                f"{in_features} inputs of {bits} bits are {words} words, weight_packed has {weight_packed.shape[1]}"
            )
        if weight_scale.shape[0] != weight_packed.shape[0] or in_features % weight_scale.shape[1]:
            raise ValueError(
                f"weight_scale {list(weight_scale.shape)} does not fit a weight of {weight_packed.shape[0]} outputs "
                f"and {in_features} inputs"
            )
        out_features = weight_packed.shape[0]
        zero_point = None
        if zero_point_words is not None:
            zero_point = unpack_int32(zero_point_words.T.contiguous(), bits, out_features).T.contiguous()
        sub_scale = None
        if sub_scale_words is not None:
            if weight_scale.shape[1] != 1 or in_features % sub_scale_words.shape[1]:
                raise ValueError(
                    f"sub-scales of {sub_scale_words.shape[1]} groups do not fit {in_features} inputs and weight_scale "
                    f"{list(weight_scale.shape)}"
                )
            sub_scale = unpack_int32(sub_scale_words.T.contiguous(), SUB_SCALE_BITS, out_features) + SUB_SCALE_OFFSET
        integers = unpack_int32(weight_packed, bits, in_features)
        return cls(integers, weight_scale, zero_point, in_features, out_features, bits, sub_scale=sub_scale)

    @property
    def stored_bits(self) -> int:
        """Width of the numbers that a checkpoint stores."""
        return 4 if self.number_format != "int" else self.folded_bits or self.bits

    @property
    def factors(self) -> torch.Tensor | None:
        """Sub-scales that `integers` are still to be multiplied by, `[groups, out]`, int8; None if there are none."""
        return None if self.folded_bits else self.sub_scale

    def stored(self) -> torch.Tensor:
        """Returns the integers as a checkpoint has them, `[out, in]`, int8: without their sub-scales."""
        integers = find_layout(self.layout).unpack(self.integers, self.in_features)[: self.out_features]
        if self.sub_scale is None or not self.folded_bits:
            return integers
        return torch.div(integers, self._wide(self.sub_scale.clamp(min=1)), rounding_mode="trunc")  # without a rest

    def unpacked(self) -> torch.Tensor:
        """Returns the integers, `[out, in]`, int8, times their sub-scales."""
        integers = find_layout(self.layout).unpack(self.integers, self.in_features)[: self.out_features]
        return integers if self.factors is None else integers * self._wide(self.factors)

    def _wide(self, sub_scale: torch.Tensor) -> torch.Tensor:
        return expand_scales(sub_scale.T, self.in_features)

    def with_products(self) -> "QuantizedWeight":
        """Returns the same weight with products in the place of integers and sub-scales, for kernels that know none."""
        if self.factors is None:
            return self
        return replace(self, integers=self.unpacked(), bits=8, layout="int8", folded_bits=self.bits)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight as floating point, `[out, in]`, computed in float32, for float64 in float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.unpacked().to(wide)
        if self.zero_point is not None:
            values -= expand_scales(self.zero_point.to(wide), self.in_features)
        return values.mul_(expand_scales(self.scale.to(wide), self.in_features)).to(dtype)

    def to_layout(self, name: str) -> "QuantizedWeight":
        """Returns the same weight stored in another layout, in int8 if that layout does not accept it.

        Raises:
            ValueError: if there is no layout of that name.
        """
        if not find_layout(name).accepts(self):
            name = "int8"
        if name == self.layout:
            return self
        integers = self.unpacked() if self.factors is None else self.stored()
        return replace(self, integers=find_layout(name).pack(integers), layout=name)

    def to_words(self) -> torch.Tensor:
        """Returns the integers as a checkpoint stores them, `[out, ceil(in * bits / 32)]`, int32.

        Floating-point numbers of 4 bits: `[out, in / 2]`, uint8.
        """
        if self.number_format != "int":
            return float4.pack_e2m1(self.unpacked())
        return pack_int32(self.stored(), self.stored_bits)

    def unfolded(self) -> "QuantizedWeight":
        """Returns the same weight in layout int8, with the integers that a checkpoint stores."""
        return replace(self, integers=self.stored(), bits=self.folded_bits or self.bits, layout="int8", folded_bits=0)

    def sub_scale_words(self) -> torch.Tensor | None:
        """Returns the sub-scales as a checkpoint stores them, `[ceil(out / 8), groups]`, int32, or None."""
        if self.sub_scale is None:
            return None
        return pack_int32(self.sub_scale - SUB_SCALE_OFFSET, SUB_SCALE_BITS).T.contiguous()

    def zero_point_words(self) -> torch.Tensor | None:
        """Returns the zero points as a checkpoint stores them, `[ceil(out * bits / 32), groups]`, int32, or None."""
        if self.zero_point is None:
            return None
        return pack_int32(self.zero_point.T.contiguous(), self.bits).T.contiguous()

    def rows(self, part: slice) -> "QuantizedWeight":
        """Returns some of the output channels, as views but for sub-scales.

        Raises:
            ValueError: in another layout than int8, whose rows need not be those of the weight.
        """
        if self.layout != "int8":
            raise ValueError(f"rows need a weight in layout int8, not {self.layout}; call to_layout('int8') first")
        integers = self.integers[part]
        zero_point = None if self.zero_point is None else self.zero_point[part]
        return replace(
            self,
            integers=integers,
            scale=self.scale[part],
            zero_point=zero_point,
            out_features=len(integers),
            sub_scale=None if self.sub_scale is None else self.sub_scale[:, part].contiguous(),
        )


def expand_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns one value per coordinate, `[..., columns]`, from one per group, `[..., groups]`; of one group a view."""
    if scale.shape[-1] == 1:
        return scale.expand(*scale.shape[:-1], columns)
    return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)


__all__ = ["SUB_SCALE_BITS", "SUB_SCALE_OFFSET", "QuantizedWeight", "expand_scales"]
