"""Plain PyTorch linear layer on integers; the truth for every backend."""

import torch

_EXACT_FLOAT32 = 2**24  # integers up to here are exact in float32, whatever the order of summation


def int4_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns x W^T for quantized x and W, `[..., out]`, float32.

    With one scale per token and per output channel the sum over inputs is an exact integer sum, scaled once; with
    groups the scaled group sums are added in float32.

    Args:
        x: integers, `[..., k]`, int8 (4 or 8 bits used).
        x_scale: `[..., 1]` or `[..., x_groups]`, float32.
        weight: integers, `[out, k]`, int8.
        weight_scale: `[out, 1]` or `[out, w_groups]`.
        weight_zero_point: like `weight_scale`, or None for a symmetric grid.
    """
    k = x.shape[-1]
    compute = torch.float32 if k * 1024 <= _EXACT_FLOAT32 else torch.float64
    wide = weight.to(compute)
    if weight_zero_point is not None:
        wide = wide - _expand(weight_zero_point.to(compute), k)
    if x_scale.shape[-1] == 1 and weight_scale.shape[-1] == 1:
        total = (x.to(compute) @ wide.T).float()
        return total * x_scale.float() * weight_scale.float().squeeze(-1)
    scaled_x = x.float() * _expand(x_scale.float(), k)
    return scaled_x @ (wide.float() * _expand(weight_scale.float(), k)).T


def _expand(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """One value per column from one per group."""
    return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)
