"""Public names of version 0.1.0, which keep working for one release with a DeprecationWarning."""

import warnings
from typing import Any

import torch

from quad_kernels.float4 import NumberFormat
from quad_kernels.functional import integer_linear
from quad_kernels.weight import QuantizedWeight


class LinearWeight(QuantizedWeight):
    """A `QuantizedWeight` that tells its layout from the dtype of the integers, as version 0.1.0 did."""

    def __init__(
        self,
        integers: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        in_features: int,
        out_features: int,
        bits: int,
        layout: str | None = None,
        sub_scale: torch.Tensor | None = None,
        folded_bits: int = 0,
        number_format: NumberFormat = "int",
    ) -> None:
        if layout is None:
            layout = "onednn" if integers.is_mkldnn else "nibbles" if integers.dtype == torch.uint8 else "int8"
        super().__init__(
            integers, scale, zero_point, in_features, out_features, bits, layout, sub_scale, folded_bits, number_format
        )


_RENAMED = {"LinearWeight": (LinearWeight, "QuantizedWeight"), "int4_linear": (integer_linear, "integer_linear")}


def renamed(name: str) -> Any:
    """Returns what `quad_kernels` had under an old name, with a warning; AttributeError if it had none."""
    if name not in _RENAMED:
        raise AttributeError(f"module 'quad_kernels' has no attribute {name!r}")
    thing, new = _RENAMED[name]
    text = f"quad_kernels.{name} is now quad_kernels.{new}; the old name will be removed in the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return thing
