"""Linear layer on integer weights and integer activations, with the full-precision outlier product."""

import torch

from quad_kernels import ops
from quad_kernels.packing import nibble_bytes
from quad_kernels.weight import LinearWeight, WeightLayout, prepare_weight


def integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: LinearWeight,
    *,
    outlier: torch.Tensor | None = None,
    outlier_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:
    """Returns cast(x W^T + outlier W_o^T + bias) for quantized x and W.

    With one scale per token and per output channel the sum over inputs is an exact integer sum, scaled once; with
    groups the scaled group sums are added in float32. The outlier product is added in float32.

    Args:
        x: integers, `[..., in]`, int8 (up to 8 bits used), or packed, `[..., nibble_bytes(in)]`, uint8.
        x_scale: `[..., 1]` or `[..., x_groups]`, float32.
        weight: from `prepare_weight`.
        outlier: `[..., rank]`, floating point, or None.
        outlier_weight: `[out, rank]`, dtype of `outlier`.
        bias: `[out]`.
        out_dtype: of the result.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., out]`, `out_dtype`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    columns = x.shape[-1]
    wanted = nibble_bytes(weight.in_features) if x.dtype == torch.uint8 else weight.in_features
    if columns != wanted:
        raise ValueError(f"x has {columns} columns, a weight of {weight.in_features} inputs needs {wanted}")
    if (outlier is None) != (outlier_weight is None):
        raise ValueError("outlier and outlier_weight go together")
    if outlier is not None and outlier_weight is not None and outlier.shape[-1] != outlier_weight.shape[-1]:
        raise ValueError(f"{outlier.shape[-1]} outliers do not fit an outlier weight {list(outlier_weight.shape)}")
    y = ops.integer_linear(
        x.reshape(-1, columns),
        x_scale.reshape(-1, x_scale.shape[-1]),
        weight.integers,
        weight.scale,
        weight.zero_point,
        weight.in_features,
        weight.out_features,
        weight.bits,
        None if outlier is None else outlier.reshape(-1, outlier.shape[-1]),
        outlier_weight,
        bias,
        out_dtype,
        backend or "",
    )
    return y.view(*x.shape[:-1], weight.out_features)


__all__ = ["LinearWeight", "WeightLayout", "integer_linear", "prepare_weight"]
