"""CPU: integer dot products of oneDNN through `torch._int_mm`."""

import torch

from quad_kernels.backends.base import Backend
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.weight import LinearWeight, WeightLayout


class CpuBackend(Backend):
    """Weights are unpacked to int8 once, at load: one byte a weight instead of half a byte, two in bfloat16."""

    name: str = "cpu"
    priority: int = 10
    devices: tuple[str, ...] = ("cpu",)
    weight_layout: WeightLayout = "int8"

    def unavailable(self, device: torch.device) -> str | None:
        """Only on the CPU."""
        return None if device.type == "cpu" else "it is for tensors on the CPU"

    def prepare_weight(self, weight: LinearWeight) -> LinearWeight:
        """OneDNN's own order where it has a product for it, plain int8 otherwise."""
        from quad_kernels.int4_linear.cpu import onednn_takes

        return weight.to_layout("onednn" if onednn_takes(weight) else "int8")

    def quantize_activations(
        self,
        x: torch.Tensor,
        quantization: InputQuantization,
        split: InputSplit,
        norm: RMSNorm | None,
        packed: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The reference's integers in fewer passes."""
        from quad_kernels.quantize_activations.cpu import quantize_activations

        return quantize_activations(x, quantization, split, norm, packed)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """Smaller factors than the reference's."""
        from quad_kernels.hadamard import plan_hadamard
        from quad_kernels.hadamard.cpu import apply_hadamard

        return apply_hadamard(x, plan_hadamard(x.shape[-1]))

    def int4_linear(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: LinearWeight,
        outlier: torch.Tensor | None,
        outlier_weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Integer product, then scales, outlier product and bias in float32."""
        from quad_kernels.int4_linear.cpu import int4_linear

        return int4_linear(x, x_scale, weight, outlier, outlier_weight, bias, out_dtype)
