"""The interface of a backend. Its methods are the references, so a backend overrides only what it accelerates."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from quad_kernels.elementwise import reference as elementwise_reference
from quad_kernels.formats import InputQuantization, InputSplit, LowRank
from quad_kernels.hadamard import plan_hadamard
from quad_kernels.hadamard import reference as hadamard_reference
from quad_kernels.int4_kv import reference as kv_reference
from quad_kernels.integer_linear import reference as linear_reference
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.layouts import WeightLayout
from quad_kernels.quantize_activations import reference as quantize_reference
from quad_kernels.table_product import reference as table_reference
from quad_kernels.weight import QuantizedWeight
from quad_kernels.weight_rounding import reference as round_reference


class Backend:
    """Plain PyTorch on any device: exact, slow, and the truth for the others.

    Inputs have two dimensions: the public functions flatten what they are given.

    Attributes:
        name: name that forces it.
        aliases: other names that force it, such as an earlier one.
        priority: rank in the automatic choice, which takes the highest that can run.
        devices: device types for which it is chosen automatically; empty for all.
        layouts: weight layouts that it brings, by name; they are registered with it.
        product_bits: width of the integers that it multiplies; narrower inputs and weights are widened first.
    """

    name: str = "reference"
    aliases: tuple[str, ...] = ()
    priority: int = 0
    devices: tuple[str, ...] = ()
    layouts: Mapping[str, WeightLayout] = MappingProxyType({})
    product_bits: int = 8

    def unavailable(self, device: torch.device) -> str | None:
        """Returns why it cannot run on `device`, or None if it can."""
        return None

    def prepare_weight(self, weight: QuantizedWeight, quantization: InputQuantization | None) -> QuantizedWeight:
        """Returns `weight` in the layout to keep it in; here nibbles, the smallest.

        A layer takes every layout, but may have to convert it in every call.

        Args:
            weight: in any layout.
            quantization: quantization of the inputs it will be multiplied with, None if they stay floating point.
        """
        return weight.to_layout("nibbles")

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the orthonormal transform of the last dimension, `plan_hadamard(x.shape[-1])`."""
        return hadamard_reference.apply_hadamard(x, plan_hadamard(x.shape[-1]))

    def quad_linear(
        self,
        x: torch.Tensor,
        weight: QuantizedWeight,
        split: InputSplit,
        quantization: InputQuantization,
        outlier_weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        branch: LowRank | None = None,
    ) -> torch.Tensor:
        """Returns the complete layer of `x`, `[..., width]`, as `[..., out]`, dtype of `x`; here part by part."""
        flat = x.reshape(-1, split.width)
        outlier, integers, scale = self.quantize_activations(flat, quantization, split, None, False)
        if branch is not None:
            outlier, outlier_weight = branch.behind(flat, outlier, outlier_weight)
        y = self.integer_linear(LinearOperands(integers, scale, weight, outlier, outlier_weight, bias, x.dtype))
        return y.view(*x.shape[:-1], weight.out_features)

    quantize_activations = staticmethod(quantize_reference.quantize_activations)
    integer_linear = staticmethod(linear_reference.integer_linear)
    table_product = staticmethod(table_reference.table_product)
    round_columns = staticmethod(round_reference.round_columns)
    descend_columns = staticmethod(round_reference.descend_columns)
    rounding_errors = staticmethod(round_reference.rounding_errors)
    quantize_kv = staticmethod(kv_reference.quantize_kv)
    dequantize_kv = staticmethod(kv_reference.dequantize_kv)
    rotate = staticmethod(elementwise_reference.rotate)
    gated = staticmethod(elementwise_reference.gated)
