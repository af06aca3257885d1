"""Plain PyTorch dynamic activation quantization; the truth for every backend."""

import torch

from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.hadamard.construct import plan_hadamard
from quad_kernels.hadamard.reference import apply_hadamard
from quad_kernels.packing import pack_nibbles


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit,
    norm: RMSNorm | None,
    packed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_activations`; `x` is `[tokens, width]`."""
    if norm is not None:
        x = norm(x)
    outlier, residual = split.divide(x)
    if split.hadamard:
        residual = apply_hadamard(residual, plan_hadamard(split.residual_width))
    integers, scale = quantize(residual, quantization)
    if outlier is not None:
        outlier = outlier.clone(memory_format=torch.contiguous_format)  # a custom op may not return a view of its input
    return outlier, pack_nibbles(integers) if packed else integers, scale


def quantize(x: torch.Tensor, quantization: InputQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[tokens, n]`: integers `[tokens, n]`, int8, and scales `[tokens, scales]`, float32."""
    bits = quantization.bits
    grouped = x.unflatten(-1, (quantization.groups(x.shape[-1]), -1))
    scale, factors = grids(x, quantization)
    steps = scale if factors is None else scale * factors
    # A division, as in compressed-tensors: at clip ratio 1 the largest value is a tie, which a product with the
    # inverse would round the other way. x / inf is the 0 of an all-zero token.
    divisor = torch.where(steps > 0, steps, torch.full_like(steps, torch.inf)).unsqueeze(-1)
    integers = (grouped / divisor).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if factors is not None:
        integers *= factors.unsqueeze(-1)
    return integers.flatten(-2).to(torch.int8), scale


def grids(x: torch.Tensor, quantization: InputQuantization) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the grids of `[tokens, n]`: scales `[tokens, scales]`, and factors `[tokens, groups]`, both float32.

    The factors are integers from 1 on, such that the largest step of a token is the largest factor times its scale;
    None without sub-scales.
    """
    largest = x.unflatten(-1, (quantization.groups(x.shape[-1]), -1)).abs().amax(-1).float()
    # By a tensor: CUDA would multiply by the rounded inverse of a number.
    steps = _normal(largest * quantization.clip_ratio / torch.full_like(largest, (2**quantization.bits - 1) / 2))
    most = quantization.largest_sub_scale
    if not most:
        return steps, None
    widest = steps.amax(-1, keepdim=True)
    scale = _normal(widest / torch.full_like(widest, most))
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    return scale, (steps / divisor).round_().clamp_(1, most)


def _normal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.zeros_like(scale), scale)
