"""Gradients of the complete layer by the straight-through estimator (QUAD paper, section 4.3)."""

from typing import Any

import torch

from quad_kernels.formats import InputQuantization, InputSplit
from quad_kernels.functional import integer_linear, quantize_activations, split_input
from quad_kernels.hadamard import plan_hadamard, reference
from quad_kernels.processor import linear
from quad_kernels.quad_linear.memo import quantize_once
from quad_kernels.quantize_activations import reference as quantize_reference
from quad_kernels.weight import QuantizedWeight, expand_scales


class QuadLinearFunction(torch.autograd.Function):
    """Keeps the input (which q, k and v share) and its scales for the backward pass; nothing as wide as the weight.

    The integers of the weight are widened in the backward pass and thrown away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        outlier_weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        weight: QuantizedWeight,
        split: InputSplit,
        quantization: InputQuantization,
        backend: str | None,
        integers_like: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The layer; `weight_scale` is `weight.scale`, named to receive a gradient.

        So is `integers_like` for the gradient of the integers; its values are not read. Without an `outlier_weight` the
        outlier coordinates take no part. `out_dtype` is that of `x` by default.
        """
        outlier, integers, scale = quantize_once(x, split, quantization, backend)
        ctx.save_for_backward(x, scale, weight_scale, outlier_weight)
        ctx.weight, ctx.split, ctx.quantization, ctx.backend = weight, split, quantization, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = integer_linear(
            integers,
            scale,
            weight,
            outlier=None if outlier_weight is None else outlier,
            outlier_weight=outlier_weight,
            bias=bias,
            out_dtype=out_dtype or x.dtype,
            backend=backend,
        )
        # No view: autograd lets nobody write into a view that a function of its own returns, as PEFT does.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grad` is `[..., out]`."""
        x, x_scale, weight_scale, outlier_weight = ctx.saved_tensors
        needs_x, needs_scale, needs_outlier, needs_bias = ctx.needs_input_grad[:4]
        needs_integers = ctx.needs_input_grad[8]
        flat_x, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        x_scale = x_scale.reshape(-1, x_scale.shape[-1])
        scale_gradient = outlier_gradient = integer_gradient = None
        if needs_outlier and outlier_weight is not None:
            outlier, _ = ctx.split.divide(flat_x)
            outlier_gradient = (flat.T @ outlier.to(flat.dtype)).to(outlier_weight.dtype)
        if needs_scale or needs_integers:
            _, integers, _ = quantize_activations(flat_x, ctx.quantization, ctx.split, backend=ctx.backend)
            products = flat.float().T @ (integers.float() * expand_scales(x_scale, ctx.weight.in_features))
            if needs_scale:
                scale_gradient = _scale_gradient(ctx.weight, products).to(weight_scale.dtype)
            if needs_integers:
                integer_gradient = _integer_gradient(ctx.weight, products)
        return (
            _input_gradient(ctx, flat_x, flat, outlier_weight).view(x.shape) if needs_x else None,
            scale_gradient,
            outlier_gradient,
            flat.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
            None,
            integer_gradient,
            None,
        )


class DequantizedFunction(torch.autograd.Function):
    """The weight in floating point; gradients as those of `QuadLinearFunction`."""

    @staticmethod
    def forward(
        ctx: Any, weight_scale: torch.Tensor, integers_like: torch.Tensor, weight: QuantizedWeight, dtype: torch.dtype
    ) -> torch.Tensor:
        """Returns `[out, in]`, `dtype`."""
        ctx.weight, ctx.scale_dtype = weight, weight_scale.dtype
        return weight.dequantized(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grad` is `[out, in]`."""
        needs_scale, needs_integers = ctx.needs_input_grad[:2]
        products = grad.to(torch.float32, copy=True)
        scale_gradient = _scale_gradient(ctx.weight, products).to(ctx.scale_dtype) if needs_scale else None
        return scale_gradient, _integer_gradient(ctx.weight, products) if needs_integers else None, None, None


def _input_gradient(ctx: Any, x: torch.Tensor, grad: torch.Tensor, outlier_weight: torch.Tensor | None) -> torch.Tensor:
    split = ctx.split
    gradient = _residual_gradient(ctx.weight, grad)
    if ctx.quantization.clip_ratio < 1:
        gradient.masked_fill_(_clipped(x, split, ctx.quantization), 0.0)
    if split.hadamard:
        gradient = reference.apply_hadamard(gradient, plan_hadamard(gradient.shape[-1]), transpose=True)
    if split.keep_width:
        gradient = gradient.unflatten(-1, (-1, split.block))[..., split.outliers :]
    else:
        gradient = gradient.unflatten(-1, (-1, split.block - split.outliers))
    if split.rank:
        outlier = grad.new_zeros(len(grad), split.rank)
        if outlier_weight is not None:
            outlier = grad @ outlier_weight.to(grad.dtype)
        gradient = torch.cat([outlier.unflatten(-1, (-1, split.outliers)), gradient], dim=-1)
    return gradient.flatten(-2).to(x.dtype)


def _residual_gradient(weight: QuantizedWeight, grad: torch.Tensor) -> torch.Tensor:
    """`grad` times the dequantized weight.

    One scale per output channel goes to the gradient instead of the weight: fewer numbers, and the integers are exact
    in 16 bits.
    """
    if weight.zero_point is not None or weight.scale.shape[1] > 1:
        return linear(grad, weight.dequantized(grad.dtype).T)
    return linear(grad * weight.scale.T.to(grad.dtype), weight.unpacked().to(grad.dtype).T)


def _clipped(x: torch.Tensor, split: InputSplit, quantization: InputQuantization) -> torch.Tensor:
    """True where the residual input lies beyond the grid, whose cells end half a step after its outer points."""
    _, residual = split_input(x, split)
    grids = quantize_reference.grids(residual, quantization)
    steps = grids.steps()
    half = 0.5 if quantization.number_format == "int" else 2.0  # doubled numbers lie 4 apart at the ends
    below, above = steps * (grids.low - half), steps * (grids.high + half)
    return (residual > expand_scales(above, residual.shape[1])) | (residual < expand_scales(below, residual.shape[1]))


def _scale_gradient(weight: QuantizedWeight, products: torch.Tensor) -> torch.Tensor:
    """Sum over the group's inputs of products * integer weight, `[out, groups]`, float32.

    `products` are those of grad and x, summed over tokens, `[out, in]`, float32.
    """
    wide = weight.unpacked().float()
    if weight.zero_point is not None:
        wide -= expand_scales(weight.zero_point.float(), weight.in_features)
    return wide.mul_(products).unflatten(1, (weight.scale.shape[1], -1)).sum(-1)


def _integer_gradient(weight: QuantizedWeight, products: torch.Tensor) -> torch.Tensor:
    """Products times what one integer counts, `[out, in]`, float32; written over `products`.

    An integer at an end of its grid is not pushed beyond it.
    """
    stored, high = weight.stored(), 2 ** (weight.stored_bits - 1) - 1
    products.masked_fill_(((stored == high) & (products < 0)) | ((stored == -high - 1) & (products > 0)), 0.0)
    products *= expand_scales(weight.scale.float(), weight.in_features)
    if weight.sub_scale is not None:
        products *= expand_scales(weight.sub_scale.T, weight.in_features)
    return products
