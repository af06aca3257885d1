"""NVIDIA GPUs: Triton kernels. With TRITON_INTERPRET=1 they run on the CPU as well, slowly, for tests."""

import importlib.util
import os
from collections.abc import Sequence

import torch

from quad_kernels.backends.base import Backend
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.weight import QuantizedWeight

_MIN_CAPABILITY = (8, 0)


class TritonBackend(Backend):
    """Triton is imported at the first call, not before."""

    name: str = "triton"
    priority: int = 20
    devices: tuple[str, ...] = ("cuda",)

    def unavailable(self, device: torch.device) -> str | None:
        """It needs the package triton and compute capability 8.0, or Triton's interpreter."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install 'quad-modifiers[triton]')"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device.type != "cuda":
            return f"it is for CUDA devices; on {device.type} it runs in Triton's interpreter (TRITON_INTERPRET=1)"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "this torch sees no NVIDIA GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, {_MIN_CAPABILITY[0]}.0 is needed"
        return None

    def prepare_weight(self, weight: QuantizedWeight, quantization: InputQuantization | None) -> QuantizedWeight:
        """Returns it in nibbles; one of two levels, which the kernel does not know, as bytes where it is multiplied."""
        return super().prepare_weight(weight if quantization is None else weight.with_products(), quantization)

    def quantize_activations(
        self,
        x: torch.Tensor,
        quantization: InputQuantization,
        split: InputSplit,
        norm: RMSNorm | None,
        packed: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """One kernel, also with a norm or a Hadamard; combinations of those with groups or packing take two."""
        from quad_kernels.hadamard import launch
        from quad_kernels.quantize_activations import kernel

        one_scale = quantization.scales(split.residual_width) == 1
        columns = split.residual_width if one_scale else quantization.group_size or split.residual_width
        if columns > kernel.MAX_COLUMNS or x.dtype == torch.float64:
            return super().quantize_activations(x, quantization, split, norm, packed)
        with torch.cuda.device_of(x):
            if not split.hadamard:
                return kernel.quantize_activations(x, quantization, split, norm, packed)
            if norm is not None:
                x = norm(x)
            if launch.supports(x, split.residual_width) and quantization.group_size is None and not packed:
                return launch.hadamard_quantize(x, quantization, split)
            outlier, residual = split.divide(x)
            residual = self.hadamard(residual)
            whole = InputSplit(residual.shape[1])
            return outlier, *kernel.quantize_activations(residual, quantization, whole, None, packed)[1:]

    def integer_linear(self, operands: LinearOperands) -> torch.Tensor:
        """One kernel; one more before it for the row sums that zero points need."""
        from quad_kernels.integer_linear import launch

        with torch.cuda.device_of(operands.x):
            return launch.integer_linear(operands)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """One kernel for orders with a power of two of at least 16; other orders run the reference."""
        from quad_kernels.hadamard import launch

        if not launch.supports(x, x.shape[-1]):
            return super().hadamard(x)
        with torch.cuda.device_of(x):
            return launch.hadamard(x)

    def table_product(self, x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """One kernel for few tokens; more run the reference, some rows of the table at a time."""
        from quad_kernels.table_product import kernel

        if x.shape[0] > kernel.MOST_TOKENS or x.dtype == torch.float64:
            return super().table_product(x, words, scale)
        with torch.cuda.device_of(x):
            return kernel.table_product(x, words, scale)

    def quantize_kv(
        self, x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, bits: int = 4
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Several vectors per program."""
        from quad_kernels.int4_kv import kernel

        if x.dtype == torch.float64:
            return super().quantize_kv(x, clip_ratio, scale_dtype, bits)
        with torch.cuda.device_of(x):
            return kernel.quantize_kv(x, clip_ratio, scale_dtype, bits)

    def dequantize_kv(
        self, integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, bits: int = 4
    ) -> torch.Tensor:
        """Several vectors per program."""
        from quad_kernels.int4_kv import kernel

        if dtype == torch.float64:
            return super().dequantize_kv(integers, scale, zero, dtype, bits)
        with torch.cuda.device_of(integers):
            return kernel.dequantize_kv(integers, scale, zero, dtype, bits)

    def rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        head_norms: Sequence[torch.Tensor],
        eps: float,
    ) -> None:
        """One kernel, a program per token."""
        from quad_kernels.elementwise import kernel

        with torch.cuda.device_of(query):
            kernel.rotate(query, key, cosine, sine, head_norms, eps)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """One kernel."""
        from quad_kernels.elementwise import kernel

        with torch.cuda.device_of(gate):
            return kernel.gated(gate, up)
