"""Plain PyTorch linear layer on integers; the truth for every backend."""

import torch

from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.packing import unpack_integers
from quad_kernels.weight import QuantizedWeight, expand_scales

_EXACT_FLOAT32 = 2**24  # sums of integers up to here are exact in float32, whatever the order of summation


def integer_linear(operands: LinearOperands) -> torch.Tensor:
    """Returns `[tokens, out]`; see `quad_kernels.integer_linear`."""
    weight, outlier, outlier_weight, bias = operands.weight, operands.outlier, operands.outlier_weight, operands.bias
    y = _scaled_sum(unpack_integers(operands.x, weight.in_features), operands.x_scale, weight)
    if outlier is not None and outlier_weight is not None:
        y += outlier.float() @ outlier_weight.float().T
    if bias is not None:
        y += bias.float()
    return y.to(operands.out_dtype)


def _scaled_sum(x: torch.Tensor, x_scale: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    k = weight.in_features
    narrow, wide = x.float(), weight.unpacked().float()
    if weight.zero_point is not None:
        wide -= expand_scales(weight.zero_point.float(), k)
    if x_scale.shape[-1] == 1 and weight.scale.shape[-1] == 1:
        largest_sum = k * _largest(narrow) * _largest(wide)
        compute = torch.float32 if largest_sum <= _EXACT_FLOAT32 else torch.float64
        total = (narrow.to(compute) @ wide.to(compute).T).float()
        return total * x_scale * weight.scale.float().squeeze(-1)
    return (narrow * expand_scales(x_scale, k)) @ (wide * expand_scales(weight.scale.float(), k)).T


def _largest(integers: torch.Tensor) -> float:
    return float(integers.abs().max()) if integers.numel() else 0.0
