"""Orthonormal Hadamard transforms of any width, fast where the order allows it."""

import torch

from quad_kernels import ops
from quad_kernels.hadamard import reference
from quad_kernels.hadamard.construct import HadamardPlan, hadamard_matrix, is_hadamard_order, plan_hadamard


def apply_hadamard(x: torch.Tensor, plan: HadamardPlan, *, backend: str | None = None) -> torch.Tensor:
    """Returns `x @ hadamard_matrix(plan.size)` for the last dimension.

    Args:
        x: `[..., size]`, floating point.
        plan: from `plan_hadamard(size)`.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., size]`, dtype of `x`; computed in float32 (float64 for float64 input), rounded once. Differentiable.

    Raises:
        ValueError: if the last dimension of `x` is not `plan.size`.
    """
    if x.shape[-1] != plan.size:
        raise ValueError(f"the last dimension of x is {x.shape[-1]}, the transform is for {plan.size}")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference.apply_hadamard(x, plan)
    return ops.hadamard(x.reshape(-1, plan.size), backend or "").view(x.shape)


__all__ = ["HadamardPlan", "apply_hadamard", "hadamard_matrix", "is_hadamard_order", "plan_hadamard"]
