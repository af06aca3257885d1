"""Orthonormal Hadamard transforms of any width, fast where the order allows it."""

from quad_kernels.hadamard.construct import HadamardPlan, hadamard_matrix, is_hadamard_order, plan_hadamard

__all__ = ["HadamardPlan", "hadamard_matrix", "is_hadamard_order", "plan_hadamard"]
