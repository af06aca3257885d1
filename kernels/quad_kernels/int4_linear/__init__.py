"""Linear layer on integer weights and integer activations."""

from quad_kernels.int4_linear.reference import int4_linear

__all__ = ["int4_linear"]
