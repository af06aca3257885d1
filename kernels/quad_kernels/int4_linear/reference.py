"""Plain PyTorch linear layer on integers; the truth for every backend."""

import torch

_EXACT_FLOAT32 = 2**24  # sums of integers up to here are exact in float32, whatever the order of summation

_SMALLEST_INT_MM = 16  # torch._int_mm reads past a weight of one column: its transpose's strides are ambiguous


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
    with torch.autocast(x.device.type, enabled=False):  # the integer sum must stay exact
        return _linear(x, x_scale, weight, weight_scale, weight_zero_point)


def _linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
) -> torch.Tensor:
    k = x.shape[-1]
    per_token = x_scale.shape[-1] == 1 and weight_scale.shape[-1] == 1
    if per_token and weight_zero_point is None and x.device.type == "cpu" and k >= _SMALLEST_INT_MM:
        total = torch._int_mm(x.reshape(-1, k), weight.T).float().unflatten(0, x.shape[:-1])
        return total * x_scale.float() * weight_scale.float().squeeze(-1)
    wide, narrow = weight.float(), x.float()
    if weight_zero_point is not None:
        wide = wide - _expand(weight_zero_point.float(), k)
    if per_token:
        largest_sum = k * _largest(narrow) * _largest(wide)
        compute = torch.float32 if largest_sum <= _EXACT_FLOAT32 else torch.float64
        total = (narrow.to(compute) @ wide.to(compute).T).float()
        return total * x_scale.float() * weight_scale.float().squeeze(-1)
    scaled_x = narrow * _expand(x_scale.float(), k)
    return scaled_x @ (wide * _expand(weight_scale.float(), k)).T


def _largest(integers: torch.Tensor) -> float:
    return float(integers.abs().max()) if integers.numel() else 0.0


def _expand(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """One value per column from one per group."""
    return scale.repeat_interleave(columns // scale.shape[-1], dim=-1)
