"""Plain PyTorch cache entries; the truth for every backend."""

import torch


def quantize_kv(
    x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_kv`; `x` is `[vectors, head_dim]`."""
    wide, largest = x.float(), 2**bits - 1
    low = wide.amin(-1)
    span = wide.amax(-1) - low
    span = torch.where(span.isfinite(), span, torch.full_like(span, torch.nan))
    scale = (span * clip_ratio / torch.full_like(span, largest)).to(scale_dtype)
    zero = (low + span * ((1 - clip_ratio) / 2)).to(scale_dtype)
    step = scale.float().unsqueeze(-1)
    quotient = (wide - zero.float().unsqueeze(-1)) / step
    usable = (step > 0) & step.isfinite()
    integers = torch.where(usable, quotient.round_().clamp_(0, largest), torch.zeros_like(quotient)).to(torch.uint8)
    if bits == 8:
        return integers, scale, zero
    first, second = integers.chunk(2, dim=-1)
    return first | (second << 4), scale, zero


def dequantize_kv(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, bits: int = 4
) -> torch.Tensor:
    """See `quad_kernels.dequantize_kv`; `integers` is `[vectors, head_dim / 2]`, in 8 bits `[vectors, head_dim]`."""
    values = (integers if bits == 8 else torch.cat([integers & 0xF, integers >> 4], dim=-1)).float()
    return (values * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).to(dtype)
