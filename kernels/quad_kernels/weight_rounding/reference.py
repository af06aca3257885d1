"""Plain PyTorch: a handful of operations for each column or scale, all output channels at once."""

import torch

from quad_kernels.float4 import round_e2m1

Columns = tuple[torch.Tensor, torch.Tensor]
_VALUES_AT_ONCE = 1 << 16  # on a CPU: they and what is made of them stay in its caches


def _nearest(x: torch.Tensor, low: int, high: int, e2m1: bool) -> torch.Tensor:
    """In place."""
    return round_e2m1(x) if e2m1 else x.round_().clamp_(low, high)


def round_columns(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    low: int,
    high: int,
    e2m1: bool,
) -> Columns:
    """See `quad_kernels.round_columns`."""
    work = columns.clone()
    integers, errors = torch.empty_like(work), torch.empty_like(work)
    diagonal = factor.diagonal()
    for i in range(len(work)):
        w = work[i]
        q = _nearest(torch.addcdiv(zero_point[i], w, scale[i]), low, high, e2m1)
        error = torch.addcmul(w, q - zero_point[i], scale[i], value=-1).div_(diagonal[i])
        integers[i], errors[i] = q, error
        if i + 1 < len(work):
            work[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return integers, errors


def descend_columns(
    integers: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    inverse_step: torch.Tensor,
    low: int,
    high: int,
    e2m1: bool,
) -> Columns:
    """See `quad_kernels.descend_columns`."""
    work = gradient.clone()
    moved, change = torch.empty_like(work), torch.empty_like(work)
    for i in range(len(work)):
        best = _nearest(torch.addcmul(integers[i], work[i], inverse_step[i], value=-1), low, high, e2m1)
        moved[i], change[i] = best, (best - integers[i]) * scale[i]
        if i + 1 < len(work):
            work[i + 1 :].addr_(hessian[i, i + 1 :], change[i])
    return moved, change


def rounding_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    cost: torch.Tensor,
    low: int,
    high: int,
    e2m1: bool,
) -> torch.Tensor:
    """See `quad_kernels.rounding_errors`."""
    trials, out, groups = scale.shape
    grouped, cost = weight.reshape(out, groups, -1), cost.reshape(groups, -1)
    errors = torch.empty_like(scale)
    rows = max(1, _VALUES_AT_ONCE // weight.shape[1]) if weight.device.type == "cpu" else out
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        for trial in range(trials):
            s, z = scale[trial, part].unsqueeze(-1), zero_point[trial, part].unsqueeze(-1)
            q = _nearest((grouped[part] / s).add_(z), low, high, e2m1)
            errors[trial, part] = q.sub_(z).mul_(s).sub_(grouped[part]).square_().mul_(cost).sum(-1)
    return errors
