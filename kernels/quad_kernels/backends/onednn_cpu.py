"""CPU: oneDNN's integer products, and fewer passes over memory than the references take."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from quad_kernels.backends.base import Backend
from quad_kernels.formats import InputQuantization
from quad_kernels.hadamard import plan_hadamard, small_factors
from quad_kernels.integer_linear import onednn
from quad_kernels.layouts import WeightLayout
from quad_kernels.quantize_activations import few_passes
from quad_kernels.table_product import few_tokens
from quad_kernels.weight import QuantizedWeight


class OneDnnBackend(Backend):
    """Weights are unpacked to int8 once, at load: one byte a weight instead of half a byte, two in bfloat16."""

    name: str = "onednn"
    aliases: tuple[str, ...] = ("cpu",)  # its name in version 0.1.0
    priority: int = 10
    devices: tuple[str, ...] = ("cpu",)
    layouts: Mapping[str, WeightLayout] = MappingProxyType(onednn.LAYOUTS)

    def unavailable(self, device: torch.device) -> str | None:
        """Only on the CPU."""
        return None if device.type == "cpu" else "it is for tensors on the CPU"

    def prepare_weight(self, weight: QuantizedWeight, quantization: InputQuantization | None) -> QuantizedWeight:
        """Returns it in oneDNN's own order where its product can compute the layer, plain int8 otherwise."""
        return weight.with_products().to_layout(onednn.best_layout(weight, quantization))

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the transform, computed with smaller factors than the reference's."""
        return small_factors.apply_hadamard(x, plan_hadamard(x.shape[-1]))

    quantize_activations = staticmethod(few_passes.quantize_activations)
    integer_linear = staticmethod(onednn.integer_linear)
    table_product = staticmethod(few_tokens.table_product)
