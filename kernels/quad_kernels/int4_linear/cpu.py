"""Integer linear layer on the CPU: `torch._int_mm`, which is oneDNN's int8 product with int32 sums."""

import math

import torch

from quad_kernels.int4_linear import reference
from quad_kernels.weight import LinearWeight, unpack_integers

_SMALLEST_WIDTH = 16  # _int_mm reads past a weight of one column: its transpose's strides are ambiguous
_MOST_SINGLE_TOKENS = 4  # up to here one matrix-vector product per token beats a matrix product


def int4_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: LinearWeight,
    outlier: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `quad_kernels.int4_linear`; `x` is `[tokens, in]` or packed, int8 or uint8."""
    k = weight.in_features
    groups = math.lcm(x_scale.shape[1], weight.scale.shape[1])
    if k // groups < _SMALLEST_WIDTH or x.shape[0] == 0:
        return reference.int4_linear(x, x_scale, weight, outlier, outlier_weight, bias, out_dtype)
    x, integers = unpack_integers(x, k), weight.unpacked()
    if groups == 1:
        y = _scaled_product(x, x_scale, integers, weight.scale, weight.zero_point)
    else:
        y = _grouped_product(x, x_scale, integers, weight, groups)
    if outlier is not None and outlier_weight is not None:
        y += outlier.to(outlier_weight.dtype) @ outlier_weight.T
    if bias is not None:
        y += bias
    return y.to(out_dtype)


def _grouped_product(
    x: torch.Tensor, x_scale: torch.Tensor, integers: torch.Tensor, weight: LinearWeight, groups: int
) -> torch.Tensor:
    """One integer product per group of coordinates that share both scales."""

    def per_group(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(groups // values.shape[1], dim=1)

    x_scale, scale = per_group(x_scale), per_group(weight.scale)
    zero_point = None if weight.zero_point is None else per_group(weight.zero_point)
    size = weight.in_features // groups
    y = torch.zeros(x.shape[0], weight.out_features)
    for group in range(groups):
        columns, one = slice(group * size, (group + 1) * size), slice(group, group + 1)
        y += _scaled_product(
            x[:, columns].contiguous(),
            x_scale[:, one],
            integers[:, columns],
            scale[:, one],
            None if zero_point is None else zero_point[:, one],
        )
    return y


def _scaled_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    integers: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> torch.Tensor:
    """x_scale * scale * sum over k of x * (integers - zero_point), `[tokens, out]`, float32."""
    total = _integer_product(x, integers)
    if zero_point is not None:
        total -= x.sum(1, keepdim=True, dtype=torch.int32) * zero_point.T.to(torch.int32)
    return total.float().mul_(x_scale).mul_(scale.float().T)


def _integer_product(x: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Returns x integers^T, `[tokens, out]`, int32.

    With the weight as the left operand oneDNN reads it row by row as it lies in memory: on 2 cores with AVX512-VNNI
    and 4096 x 4096 that takes a third to two thirds of the time of the other order (kernels/benchmarks).
    """
    if x.shape[0] <= _MOST_SINGLE_TOKENS:
        return torch.cat([torch._int_mm(integers, token.unsqueeze(1)) for token in x], dim=1).T
    return torch._int_mm(integers, x.T.contiguous()).T
