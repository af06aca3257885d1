"""A layer whose outlier block is quantized, too: two integer products, each of one scale per token and channel."""

import torch

from quad_kernels.formats import InputQuantization, InputSplit, LowRank
from quad_kernels.functional import integer_linear, quantize_activations
from quad_kernels.quad_linear.autograd import QuadLinearFunction
from quad_kernels.quad_linear.memo import quantize_once
from quad_kernels.weight import QuantizedWeight


def quantized_outlier_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    split: InputSplit,
    quantization: InputQuantization,
    outlier_weight: QuantizedWeight,
    outlier_quantization: InputQuantization,
    bias: torch.Tensor | None,
    branch: LowRank | None,
    backend: str | None,
) -> torch.Tensor:
    """Returns cast(x_r W_r^T + x_o W_o^T + bias) with both inputs quantized (ResQ, arXiv 2412.14363, section 4.1).

    Args:
        x: `[..., split.width]`, floating point.
        weight: weight of the residual.
        split: division of the input, of rank 1 or more.
        quantization: quantization of the residual input.
        outlier_weight: weight of the outlier coordinates, `outlier_weight.in_features == split.rank`.
        outlier_quantization: quantization of the outlier input, with scales of its own.
        bias: `[out]` or None.
        branch: low-rank branch of `x`, in floating point, or None.
        backend: name of a backend, or None.

    Returns:
        `[..., out]`, dtype of `x`; the products are summed in float32. Gradients flow to `x` and to both scales.
    """
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, weight.scale, outlier_weight.scale, *(branch or ()))
    )
    thin = InputSplit(split.rank)
    if differentiable:
        y = _with_gradients(x, weight, split, quantization, backend)
        high = _with_gradients(split.outliers_of(x), outlier_weight, thin, outlier_quantization, backend)
    else:
        outlier, integers, scale = quantize_once(x, split, quantization, backend)
        assert outlier is not None
        y = integer_linear(integers, scale, weight, backend=backend)
        _, integers, scale = quantize_activations(outlier, outlier_quantization, thin, backend=backend)
        high = integer_linear(integers, scale, outlier_weight, backend=backend)
    y = y + high if branch is None else y + high + branch.wide(x)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _with_gradients(
    x: torch.Tensor, weight: QuantizedWeight, split: InputSplit, quantization: InputQuantization, backend: str | None
) -> torch.Tensor:
    """The product of the residual part of `x`, float32; the gradient of the outlier coordinates is zero."""
    return QuadLinearFunction.apply(
        x, weight.scale, None, None, weight, split, quantization, backend, None, torch.float32
    )
