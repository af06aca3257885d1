"""What an integer linear layer is computed from."""

from dataclasses import dataclass

import torch

from quad_kernels.weight import QuantizedWeight


@dataclass(frozen=True)
class LinearOperands:
    """The operands of `quad_kernels.integer_linear`, flattened and checked; every backend takes them.

    Attributes:
        x: integers of the input, `[tokens, in]`, int8, or packed, `[tokens, nibble_bytes(in)]`, uint8.
        x_scale: scales of the input, `[tokens, x_groups]`, float32.
        weight: quantized weight, in any layout.
        outlier: full-precision coordinates, `[tokens, rank]`, floating point, or None.
        outlier_weight: weight of the outliers, `[out, rank]`; None exactly where `outlier` is.
        bias: bias, `[out]`, floating point, or None.
        out_dtype: dtype of the result, `[tokens, out]`.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    weight: QuantizedWeight
    outlier: torch.Tensor | None
    outlier_weight: torch.Tensor | None
    bias: torch.Tensor | None
    out_dtype: torch.dtype
