"""Plain PyTorch dynamic activation quantization."""

import torch


def quantize_activations(
    x: torch.Tensor, bits: int, clip_ratio: float = 1.0, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each token (or each group of a token) on its own symmetric grid.

    scale = clip_ratio * absmax / ((2^bits - 1) / 2), integers from -2^(bits-1) to 2^(bits-1) - 1. A clip ratio of 1 is
    the grid of compressed-tensors; the "0.9 of absmax / 7" of the QUAD paper (section 4.1) is 0.964 here.

    Args:
        x: `[..., n]`, floating point.
        bits: 2 to 8.
        clip_ratio: share of the largest magnitude that the grid covers.
        group_size: coordinates per scale, None for one scale per token; divides n.

    Returns:
        integers `[..., n]`, int8, and scales `[..., n / group_size]` (or `[..., 1]`), float32. A zero token gets
        scale 0 and integers 0, and so does one whose scale is no normal float32.

    Raises:
        ValueError: if `group_size` does not divide n.
    """
    if group_size is not None and x.shape[-1] % group_size:
        raise ValueError(f"group_size ({group_size}) must divide the width of the activations ({x.shape[-1]})")
    groups = 1 if group_size is None else x.shape[-1] // group_size
    grouped = x.float().unflatten(-1, (groups, -1))
    scale = grouped.abs().amax(-1) * clip_ratio / ((2**bits - 1) / 2)
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.zeros_like(scale), scale)
    # A division, as in compressed-tensors: at clip ratio 1 the largest value lies on a tie, which a product with the
    # inverse would round the other way. x / inf is the 0 of an all-zero token.
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf)).unsqueeze(-1)
    integers = (grouped / divisor).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return integers.flatten(-2).to(torch.int8), scale
