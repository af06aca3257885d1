"""The arithmetic of a linear as a sum of parts; transformers and vLLM both call it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    LowRank,
    QuantizedWeight,
    fake_quantize,
    quad_linear,
    split_input,
)
from quad_kernels.quad_linear import dequantized
from torch import nn

Apply = Callable[[torch.Tensor], torch.Tensor]


class LinearParts(NamedTuple):
    """What a linear is made of: y = residual(x_residual) + outlier(x_outlier) + branch(x) + terms(x) + bias.

    Attributes:
        split: division of the input into outlier and residual coordinates.
        residual: quantized weight, or a function that applies a weight to floating-point inputs `[..., n]`.
        input_quantization: quantization of the residual input, None to leave it as it is.
        outlier_weight: weight of the outlier coordinates, `[out, rank]`, floating point or quantized, None for rank 0.
        bias: `[out]`, or None.
        terms: functions of the unsplit input whose results are added.
        outlier_quantization: quantization of the outlier input, None to leave it as it is.
        integers_like: receives the gradient of a quantized weight's integers; see `quad_kernels.quad_linear`.
        branch: low-rank branch of the unsplit input, in floating point, or None.
    """

    split: InputSplit
    residual: QuantizedWeight | Apply
    input_quantization: InputQuantization | None = None
    outlier_weight: torch.Tensor | QuantizedWeight | None = None
    bias: torch.Tensor | None = None
    terms: Sequence[Apply] = ()
    outlier_quantization: InputQuantization | None = None
    integers_like: torch.Tensor | None = None
    branch: LowRank | None = None

    def with_change(self, outlier: torch.Tensor | None, scale: torch.Tensor | None) -> "LinearParts":
        """Returns the parts with changes of an adapter, which are summed in float32.

        Args:
            outlier: added to the outlier weight, `[out, rank]`, float32, or None.
            scale: added to the residual's weight scale, `[out, groups]`, float32, or None.
        """
        parts = self
        if outlier is not None and self.outlier_weight is not None:
            assert isinstance(self.outlier_weight, torch.Tensor), "an outlier weight in integers cannot be changed"
            parts = parts._replace(outlier_weight=changed_outlier_weight(self.outlier_weight, outlier))
        if scale is not None:
            assert isinstance(self.residual, QuantizedWeight), "only a quantized weight has scales to change"
            weight = replace(self.residual, scale=changed_weight_scale(self.residual.scale, scale))
            parts = parts._replace(residual=weight)
        return parts


def changed_integers(weight: QuantizedWeight, change: torch.Tensor) -> QuantizedWeight:
    """Returns a weight, in layout int8, whose integers are those of `weight` plus a change, kept on their grid.

    Args:
        weight: as a checkpoint has it (`PackedLinear.quantized_weight`).
        change: in steps of the grid, `[out, in]`, floating point; it is rounded, halves to the even number.
    """
    half = 2 ** (weight.bits - 1)
    integers = change.detach().round().add_(weight.integers).clamp_(-half, half - 1).to(torch.int8)
    return replace(weight, integers=integers)


def changed_outlier_weight(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Returns an outlier weight plus `change`, summed in float32, in the weight's dtype."""
    return (weight.float() + change).to(weight.dtype)


def changed_weight_scale(scale: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Returns weight scales plus `change`, in the scale's dtype, never negative."""
    return (scale.float() + change).clamp(min=0).to(scale.dtype)


def linear_forward(x: torch.Tensor, parts: LinearParts) -> torch.Tensor:
    """Applies a linear to `[..., in]`.

    A quantized weight with quantized inputs is one call of the kernels, outliers, branch and bias included; otherwise
    these are computed part by part and summed in float32. Either sum is rounded to the dtype of `x` before terms are
    added to it.

    Returns:
        `[..., out]`, dtype of `x`.
    """
    weight, quantization = parts.residual, parts.input_quantization
    if quantization is not None and isinstance(weight, QuantizedWeight) and _is_one_call(parts):
        y = quad_linear(
            x,
            weight,
            parts.split,
            quantization,
            outlier_weight=parts.outlier_weight,
            outlier_quantization=parts.outlier_quantization,
            bias=parts.bias,
            branch=parts.branch,
            integers_like=parts.integers_like,
        )
        return _with_terms(y, x, parts)
    outlier, residual = split_input(x, parts.split)
    if quantization is not None:
        residual = fake_quantize(residual, quantization)
    if isinstance(weight, QuantizedWeight):
        y = nn.functional.linear(residual, dequantized(weight, parts.integers_like, x.dtype)).float()
    else:
        y = weight(residual).float()
    if outlier is not None and parts.outlier_weight is not None:
        y = y + _outlier_product(outlier, parts.outlier_weight, parts.outlier_quantization).float()
    if parts.branch is not None:
        y = y + parts.branch.wide(x)
    if parts.bias is not None:
        y = y + parts.bias.float()
    return _with_terms(y.to(x.dtype), x, parts)


def _is_one_call(parts: LinearParts) -> bool:
    """False while outlier inputs are rounded and their weight is not yet, as in calibration."""
    return parts.outlier_quantization is None or not isinstance(parts.outlier_weight, torch.Tensor)


def _outlier_product(
    outlier: torch.Tensor, weight: torch.Tensor | QuantizedWeight, quantization: InputQuantization | None
) -> torch.Tensor:
    """Returns the product of the outlier coordinates in their dtype, with both sides in floating point."""
    if quantization is not None:
        outlier = fake_quantize(outlier, quantization)
    return nn.functional.linear(
        outlier, weight.dequantized(outlier.dtype) if isinstance(weight, QuantizedWeight) else weight
    )


def _with_terms(y: torch.Tensor, x: torch.Tensor, parts: LinearParts) -> torch.Tensor:
    """Adds the terms, in float32 and one after the other, to the sum of the other parts in the dtype of `x`."""
    if not parts.terms:
        return y
    total = y.float()
    for term in parts.terms:
        total = total + term(x).float()
    return total.to(x.dtype)
