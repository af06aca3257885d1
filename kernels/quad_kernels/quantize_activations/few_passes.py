"""Activation quantization on the CPU: the integers and scales of the reference in fewer passes and operations.

For one token the time is that of starting operations, for many that of their passes over memory.
"""

import torch

from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.hadamard import plan_hadamard
from quad_kernels.hadamard.small_factors import transform
from quad_kernels.packing import pack_nibbles
from quad_kernels.quantize_activations import reference

_TOKENS_AT_ONCE = 128  # the float32 numbers of more would stream through memory in each pass
_LARGEST_SUBNORMAL = torch.finfo(torch.float32).tiny * (1 - 2**-23)


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit,
    norm: RMSNorm | None,
    packed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_activations`; `x` is `[tokens, width]`."""
    if x.dtype == torch.float64:
        return reference.quantize_activations(x, quantization, split, norm, packed)
    if x.shape[0] <= _TOKENS_AT_ONCE:
        return _rows(x, quantization, split, norm, packed)
    outliers, integers, scales = zip(
        *(_rows(part, quantization, split, norm, packed) for part in x.split(_TOKENS_AT_ONCE)), strict=True
    )
    outlier = None if outliers[0] is None else torch.cat(outliers)
    return outlier, torch.cat(integers), torch.cat(scales)


def _rows(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit,
    norm: RMSNorm | None,
    packed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    if norm is not None:
        x = norm(x)
    outlier, residual = _divide(x, split)
    if quantization.group_size is not None or not quantization.symmetric:
        integers, scale = reference.quantize(residual, quantization)
    else:
        integers, scale = _quantize(residual, quantization)
    return outlier, pack_nibbles(integers) if packed else integers, scale


def _divide(x: torch.Tensor, split: InputSplit) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Like a call of `split`, but the outliers are a copy: a custom op may not return a view of its input."""
    outliers = split.outliers
    one_block = split.block == split.width
    blocks = x if one_block else x.unflatten(1, (split.width // split.block, split.block))
    outlier = blocks[..., :outliers].clone(memory_format=torch.contiguous_format) if outliers else None
    if split.keep_width:
        residual = x.to(torch.float32, copy=True) if split.hadamard else x.clone()
        residual.view(blocks.shape)[..., :outliers] = 0
    elif outliers:
        residual = blocks[..., outliers:].flatten(1)
    else:
        residual = x
    if split.hadamard:
        residual = transform(residual.to(torch.float32), plan_hadamard(split.residual_width)).to(x.dtype)
    return None if outlier is None else outlier.flatten(1), residual


def _quantize(x: torch.Tensor, quantization: InputQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize` with one symmetric grid per token."""
    bits = quantization.bits
    largest = x.abs().amax(1, keepdim=True).float()
    scale = largest.mul_(quantization.clip_ratio).div_((2**bits - 1) / 2)
    divisor = torch.threshold(scale, _LARGEST_SUBNORMAL, torch.inf)
    scale = torch.threshold_(scale, _LARGEST_SUBNORMAL, 0.0)
    integers = torch.div(x, divisor).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return integers.to(torch.int8), scale
