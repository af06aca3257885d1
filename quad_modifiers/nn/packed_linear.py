"""The residual weight of a loaded checkpoint: packed integers, unpacked only while they are used."""

import torch
from quad_kernels.packing import unpack_int32
from torch import nn

from quad_modifiers.nn.quad_linear import IntegerWeight, expand_scales


class PackedLinear(nn.Module):
    """A quantized linear without bias that holds its weight packed.

    Args:
        in_features: input width.
        out_features: output channels.
        bits: 2, 4 or 8.
        group_size: input coordinates per scale, None for one scale per output channel.
        symmetric: False for a zero point per scale.
        dtype: of the scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        groups = 1 if group_size is None else in_features // group_size
        per_word = 32 // bits
        self.register_buffer("weight_packed", torch.empty(out_features, -(-in_features // per_word), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], dtype=torch.int64))
        zero_point = None if symmetric else torch.empty(-(-out_features // per_word), groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero_point)

    def integer_weight(self) -> IntegerWeight:
        """Unpacks the weight; integers `[out, in]`, int8."""
        zero_point = None
        if self.weight_zero_point is not None:
            zero_point = unpack_int32(self.weight_zero_point.T, self.bits, self.out_features).T
        integers = unpack_int32(self.weight_packed, self.bits, self.in_features)
        return IntegerWeight(integers, self.weight_scale, zero_point)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight as floating point, `[out, in]`."""
        integers, scale, zero_point = self.integer_weight()
        values = integers.float()
        if zero_point is not None:
            values = values - expand_scales(zero_point.float(), self.in_features)
        return (values * expand_scales(scale.float(), self.in_features)).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the dequantized weight to floating-point inputs `[..., in]` (weight-only quantization)."""
        return nn.functional.linear(x, self.dequantized(x.dtype))

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group_size={self.group_size}"
