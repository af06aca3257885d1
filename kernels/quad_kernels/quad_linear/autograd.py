"""Gradients of the complete layer by the straight-through estimator (QUAD paper, section 4.3)."""

from typing import Any

import torch

from quad_kernels.formats import InputQuantization, InputSplit
from quad_kernels.hadamard import plan_hadamard, reference
from quad_kernels.int4_linear import int4_linear
from quad_kernels.quantize_activations import quantize_activations
from quad_kernels.weight import LinearWeight, expand_scales


class QuadLinearFunction(torch.autograd.Function):
    """Keeps the input alone for the backward pass (which q, k and v share) and quantizes it again there.

    The packed weight is dequantized in the backward pass and thrown away: no full-precision copy of it stays.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        outlier_weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        weight: LinearWeight,
        split: InputSplit,
        quantization: InputQuantization,
        backend: str | None,
    ) -> torch.Tensor:
        """The layer; `weight_scale` is `weight.scale`, named to receive a gradient."""
        outlier, integers, scale = quantize_activations(x, quantization, split, backend=backend)
        ctx.save_for_backward(x, weight_scale, outlier_weight)
        ctx.weight, ctx.split, ctx.quantization, ctx.backend = weight, split, quantization, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return int4_linear(
            integers,
            scale,
            weight,
            outlier=outlier,
            outlier_weight=outlier_weight,
            bias=bias,
            out_dtype=x.dtype,
            backend=backend,
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grad` is `[..., out]`."""
        x, weight_scale, outlier_weight = ctx.saved_tensors
        needs_x, needs_scale, needs_outlier, needs_bias = ctx.needs_input_grad[:4]
        flat_x, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        outlier, residual = ctx.split(flat_x)
        _, integers, scale = quantize_activations(flat_x, ctx.quantization, ctx.split, backend=ctx.backend)
        outlier_gradient = None
        if needs_outlier and outlier is not None and outlier_weight is not None:
            outlier_gradient = (flat.T @ outlier.to(flat.dtype)).to(outlier_weight.dtype)
        return (
            _input_gradient(ctx, flat, residual, scale, outlier_weight).view(x.shape) if needs_x else None,
            _scale_gradient(ctx.weight, flat, integers, scale).to(weight_scale.dtype) if needs_scale else None,
            outlier_gradient,
            flat.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
            None,
        )


def _input_gradient(
    ctx: Any, grad: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, outlier_weight: torch.Tensor | None
) -> torch.Tensor:
    split, bits = ctx.split, ctx.quantization.bits
    gradient = grad @ ctx.weight.dequantized(grad.dtype)
    if ctx.quantization.clip_ratio < 1:
        limit = expand_scales(scale, residual.shape[-1])
        # The grid's cells end half a step beyond its first and last point.
        clipped = (residual > limit * (2 ** (bits - 1) - 0.5)) | (residual < -limit * (2 ** (bits - 1) + 0.5))
        gradient = gradient.masked_fill(clipped, 0.0)
    if split.hadamard:
        gradient = _hadamard_transposed(gradient)
    if split.keep_width:
        gradient = gradient.unflatten(-1, (-1, split.block))[..., split.outliers :]
    else:
        gradient = gradient.unflatten(-1, (-1, split.block - split.outliers))
    if split.rank and outlier_weight is not None:
        outlier = (grad @ outlier_weight.to(grad.dtype)).unflatten(-1, (-1, split.outliers))
        gradient = torch.cat([outlier, gradient], dim=-1)
    return gradient.flatten(-2).to(residual.dtype)


def _hadamard_transposed(gradient: torch.Tensor) -> torch.Tensor:
    """Gradient of the transform: that of its own linear operations, `gradient @ hadamard_matrix(n).T`."""
    with torch.enable_grad():
        zero = torch.zeros_like(gradient, requires_grad=True)
        y = reference.apply_hadamard(zero, plan_hadamard(gradient.shape[-1]))
    return torch.autograd.grad(y, zero, gradient)[0]


def _scale_gradient(
    weight: LinearWeight, grad: torch.Tensor, integers: torch.Tensor, x_scale: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens and the group's inputs of grad * x * integer weight, `[out, groups]`, float32."""
    x = integers.float() * expand_scales(x_scale, weight.in_features)
    wide = weight.unpacked().float()
    if weight.zero_point is not None:
        wide = wide - expand_scales(weight.zero_point.float(), weight.in_features)
    products = (grad.float().T @ x) * wide
    return products.unflatten(1, (weight.scale.shape[1], -1)).sum(-1)
