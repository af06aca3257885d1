"""Plain PyTorch Hadamard transform: one small matrix product per Kronecker factor."""

import torch

from quad_kernels.hadamard.construct import HadamardPlan, hadamard_factor


def apply_hadamard(x: torch.Tensor, plan: HadamardPlan, transpose: bool = False) -> torch.Tensor:
    """See `quad_kernels.apply_hadamard`; with `transpose`, the gradient of that. Differentiable by PyTorch's means."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute).reshape(-1, *plan.factors)
    with torch.autocast(x.device.type, enabled=False):
        for axis, order in enumerate(plan.factors, start=1):
            factor = hadamard_factor(order, compute, x.device)
            y = (y.movedim(axis, -1) @ (factor.T if transpose else factor)).movedim(-1, axis)
    return y.reshape(x.shape).to(x.dtype)
