"""Plain PyTorch Hadamard transform: one small matrix product per Kronecker factor."""

import torch

from quad_kernels.hadamard.construct import HadamardPlan, hadamard_factor


def apply_hadamard(x: torch.Tensor, plan: HadamardPlan) -> torch.Tensor:
    """Returns `x @ hadamard_matrix(plan.size)` for the last dimension.

    Args:
        x: `[..., size]`, floating point.
        plan: from `plan_hadamard(size)`.

    Returns:
        `[..., size]`, dtype of `x`; computed in float32 (float64 for float64 input), rounded once.

    Raises:
        ValueError: if the last dimension of `x` is not `plan.size`.
    """
    if x.shape[-1] != plan.size:
        raise ValueError(f"the last dimension of x is {x.shape[-1]}, the transform is for {plan.size}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute).reshape(-1, *plan.factors)
    with torch.autocast(x.device.type, enabled=False):
        for axis, order in enumerate(plan.factors, start=1):
            factor = hadamard_factor(order, compute, x.device)
            y = (y.movedim(axis, -1) @ factor).movedim(-1, axis)
    return y.reshape(x.shape).to(x.dtype)
