"""The complete QUAD layer: split, quantization, integer product, outliers, branch and bias; differentiable."""

import torch

from quad_kernels.backends import choose_backend
from quad_kernels.formats import InputQuantization, InputSplit, LowRank, RMSNorm
from quad_kernels.functional import integer_linear, quantize_activations
from quad_kernels.layouts import find_layout
from quad_kernels.quad_linear.autograd import DequantizedFunction, QuadLinearFunction
from quad_kernels.quad_linear.memo import quantize_once
from quad_kernels.quad_linear.quantized_outlier import quantized_outlier_linear
from quad_kernels.weight import QuantizedWeight


def quad_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    split: InputSplit,
    quantization: InputQuantization,
    *,
    outlier_weight: torch.Tensor | QuantizedWeight | None = None,
    outlier_quantization: InputQuantization | None = None,
    bias: torch.Tensor | None = None,
    branch: LowRank | None = None,
    norm: RMSNorm | None = None,
    integers_like: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Returns a QUAD linear layer of `x` (QUAD paper, section 4.1).

    Args:
        x: `[..., split.width]`, float32, bfloat16 or float16.
        weight: weight of the residual, from `prepare_weight`; `weight.in_features == split.residual_width`.
        split: division of the input.
        quantization: quantization of the residual input.
        outlier_weight: `[out, split.rank]`, floating point or quantized, None for rank 0.
        outlier_quantization: quantization of the outlier input, which needs a quantized `outlier_weight`; None leaves
            it in floating point.
        bias: `[out]` or None.
        branch: low-rank branch of the unsplit input, which is added before the one rounding, or None.
        norm: norm that is applied to `x` first, in the same pass.
        integers_like: `[out, split.residual_width]`, float32, or None; its values are not read, and its gradient is
            that of the weight's integers as if they were real numbers, but for those at an end of the grid that it
            would push beyond it: theirs is zero.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., out]`, dtype of `x`. Gradients flow to `x`, `outlier_weight`, `bias`, `branch` and `weight.scale` by the
        straight-through estimator: quantization counts as the identity where it does not clip. A quantized outlier
        weight gets one to its scale, if its inputs are quantized.

    Raises:
        ValueError: if the parts do not fit each other; NotImplementedError for gradients through `norm`.

    Example:
        >>> integers = torch.tensor([[1, -2, 0], [7, -8, 1]], dtype=torch.int8)
        >>> weight = QuantizedWeight(integers, torch.tensor([[0.5], [1.0]]), None, 3, 2, bits=4)
        >>> x = torch.tensor([[100.0, 3.0, -7.5, 1.0]])
        >>> outlier_weight = torch.tensor([[0.01], [0.02]])
        >>> quad_linear(x, weight, InputSplit(4, outliers=1), InputQuantization(4), outlier_weight=outlier_weight)
        tensor([[10.5000, 88.0000]])
    """
    if weight.in_features != split.residual_width:
        raise ValueError(f"the weight has {weight.in_features} inputs, the split's residual {split.residual_width}")
    if split.rank and outlier_weight is None:
        raise ValueError(f"outlier and outlier_weight go together; the split has {split.rank} outliers")
    if branch is not None:
        _check_branch(branch, weight, split)
        x, norm = x if norm is None else norm(x), None  # the branch reads it as well
    if isinstance(outlier_weight, QuantizedWeight):
        if outlier_weight.in_features != split.rank:
            raise ValueError(f"the outlier weight has {outlier_weight.in_features} inputs, the split {split.rank}")
        if outlier_quantization is not None:
            x = x if norm is None else norm(x)
            return quantized_outlier_linear(
                x, weight, split, quantization, outlier_weight, outlier_quantization, bias, branch, backend
            )
        outlier_weight = outlier_weight.dequantized(x.dtype)
    elif outlier_quantization is not None:
        raise ValueError("quantized outlier inputs need a quantized outlier weight; leave outlier_quantization out")
    tensors = (x, outlier_weight, bias, weight.scale, integers_like, *(branch or ()))
    if torch.is_grad_enabled() and _requires_grad(*tensors):
        if norm is not None:
            raise NotImplementedError("gradients do not pass the fused norm; apply the norm before the layer")
        out_dtype = x.dtype if branch is None else torch.float32
        y = QuadLinearFunction.apply(
            x, weight.scale, outlier_weight, bias, weight, split, quantization, backend, integers_like, out_dtype
        )
        return y if branch is None else (y + branch.wide(x)).to(x.dtype)
    linear = find_layout(weight.layout).linear
    if linear is not None and norm is None:
        if x.shape[-1] != split.width:
            raise ValueError(f"the input has {x.shape[-1]} coordinates, its split is for {split.width}")
        if not torch.compiler.is_compiling():
            chosen = choose_backend(x.device, backend)
            return chosen.quad_linear(x, weight, split, quantization, outlier_weight, bias, branch)
        # A compiled graph holds the operator of the layout itself: no Python at run time, and no other choice.
        y = None if backend else linear(x, weight, split, quantization, outlier_weight, bias, branch)
        if y is not None:
            return y
    if norm is None:
        outlier, integers, scale = quantize_once(x, split, quantization, backend)
    else:
        outlier, integers, scale = quantize_activations(x, quantization, split, norm=norm, backend=backend)
    if branch is not None:
        outlier, outlier_weight = branch.behind(x, outlier, outlier_weight)
    return integer_linear(
        integers,
        scale,
        weight,
        outlier=outlier,
        outlier_weight=outlier_weight,
        bias=bias,
        out_dtype=x.dtype,
        backend=backend,
    )


def dequantized(weight: QuantizedWeight, integers_like: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight as floating point, `[out, in]`, for a layer whose inputs are not quantized.

    Args:
        weight: quantized weight; its scales receive a gradient.
        integers_like: as in `quad_linear`.
        dtype: of the result.
    """
    if integers_like is None:
        return weight.dequantized(dtype)
    dense: torch.Tensor = DequantizedFunction.apply(weight.scale, integers_like, weight, dtype)
    return dense


def _check_branch(branch: LowRank, weight: QuantizedWeight, split: InputSplit) -> None:
    down, up = branch
    if down.shape[1] != split.width or up.shape != (weight.out_features, len(down)) or up.dtype != down.dtype:
        raise ValueError(
            f"a branch of {list(down.shape)} and {list(up.shape)}, {down.dtype} and {up.dtype}, does not fit "
            f"{split.width} inputs and {weight.out_features} output channels, or has two dtypes"
        )


def _requires_grad(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


__all__ = ["dequantized", "quad_linear"]
