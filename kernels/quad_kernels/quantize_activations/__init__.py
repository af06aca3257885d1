"""Dynamic symmetric integer quantization of activations."""

from quad_kernels.quantize_activations.reference import quantize_activations

__all__ = ["quantize_activations"]
