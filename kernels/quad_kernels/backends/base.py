"""The interface of a backend. Its methods are the references, so a backend overrides only what it accelerates."""

import torch

from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.weight import LinearWeight, WeightLayout


class Backend:
    """Plain PyTorch on any device: exact, slow, and the truth for the others.

    Attributes:
        name: by which it is forced.
        priority: the highest among the backends that can run is chosen.
        devices: device types for which it is chosen automatically; empty for all.
        weight_layout: how it wants weights to be stored.
    """

    name: str = "reference"
    priority: int = 0
    devices: tuple[str, ...] = ()
    weight_layout: WeightLayout = "nibbles"

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on `device`, or None if it can."""
        return None

    def prepare_weight(self, weight: LinearWeight) -> LinearWeight:
        """Returns `weight` as this backend reads it best; every backend reads every layout of its devices."""
        return weight.to_layout(self.weight_layout)

    def quantize_activations(
        self,
        x: torch.Tensor,
        quantization: InputQuantization,
        split: InputSplit,
        norm: RMSNorm | None,
        packed: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """See `quad_kernels.quantize_activations`; `x` is `[tokens, width]`."""
        from quad_kernels.quantize_activations import reference

        return reference.quantize_activations(x, quantization, split, norm, packed)

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
        """See `quad_kernels.int4_linear`; `x` is `[tokens, in]`, the weight in either layout."""
        from quad_kernels.int4_linear import reference

        return reference.int4_linear(x, x_scale, weight, outlier, outlier_weight, bias, out_dtype)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """The orthonormal transform of the last dimension, `plan_hadamard(x.shape[-1])`."""
        from quad_kernels.hadamard import plan_hadamard, reference

        return reference.apply_hadamard(x, plan_hadamard(x.shape[-1]))

    def quantize_kv(
        self, x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `quad_kernels.quantize_kv`; `x` is `[vectors, head_dim]`."""
        from quad_kernels.int4_kv import reference

        return reference.quantize_kv(x, clip_ratio, scale_dtype)

    def dequantize_kv(
        self, integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `quad_kernels.dequantize_kv`; `integers` is `[vectors, head_dim / 2]`."""
        from quad_kernels.int4_kv import reference

        return reference.dequantize_kv(integers, scale, zero, dtype)
