"""CPU: native kernels, one call for a whole linear."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from quad_kernels.backends.onednn_cpu import OneDnnBackend
from quad_kernels.formats import InputQuantization, InputSplit, LowRank, RMSNorm
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.layouts import WeightLayout
from quad_kernels.native import library, lines
from quad_kernels.packing import pack_nibbles, unpack_integers
from quad_kernels.table_product import reference as table_reference
from quad_kernels.weight import QuantizedWeight

_FEW_TOKENS = 16  # up to here the head's rows of bytes are read once or a few times


class NativeBackend(OneDnnBackend):
    """Weights stay at half a byte, unpacked in registers; oneDNN's backend does what the kernels do not take."""

    name: str = "native"
    aliases: tuple[str, ...] = ()
    priority: int = 15
    layouts: Mapping[str, WeightLayout] = MappingProxyType(lines.LAYOUTS)

    def unavailable(self, device: torch.device) -> str | None:
        """Only on the CPU, with the library built and at least AVX2."""
        if device.type != "cpu":
            return "it is for tensors on the CPU"
        try:
            library.load()
        except library.NativeLibraryError as error:
            return f"native CPU kernels: {error}"
        return None

    def prepare_weight(self, weight: QuantizedWeight, quantization: InputQuantization | None) -> QuantizedWeight:
        """Returns it in lines, where the inputs are quantized in a way that the kernels take."""
        for form in (weight, weight.with_products()):
            name = lines.best_layout(form)
            if quantization is not None and lines.fits(name, form, quantization.scales(weight.in_features)):
                return form.to_layout(name)
        return super().prepare_weight(weight, quantization)

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the transform by butterflies."""
        return torch.ops.quad_native.hadamard(x) if x.dtype in lines.DTYPES else super().hadamard(x)

    def quantize_activations(
        self, x: torch.Tensor, quantization: InputQuantization, split: InputSplit, norm: RMSNorm | None, packed: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """One pass over each token while it is in the cache."""
        if x.dtype not in lines.DTYPES:
            return super().quantize_activations(x, quantization, split, norm, packed)
        x = x if norm is None else norm(x)
        outlier, integers, scale = torch.ops.quad_native.quantize(x, *lines.settings(quantization, split))
        return outlier if split.rank else None, pack_nibbles(integers) if packed else integers, scale

    def integer_linear(self, operands: LinearOperands) -> torch.Tensor:
        """Returns `[tokens, out]`; see `quad_kernels.integer_linear`."""
        weight, out_dtype = operands.weight, operands.out_dtype
        tensors = (operands.outlier, operands.outlier_weight, operands.bias)
        takes = lines.takes(weight, operands.x_scale.shape[1], *tensors)
        if not takes or out_dtype not in lines.DTYPES:
            return super().integer_linear(operands)
        return torch.ops.quad_native.integer_linear(
            unpack_integers(operands.x, weight.in_features),
            operands.x_scale,
            *lines.operands(weight),
            operands.outlier,
            operands.outlier_weight,
            operands.bias,
            lines.DTYPES[out_dtype],
        )

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
        """One call: every thread takes some of the output channels."""
        y = lines.linear(x, weight, split, quantization, outlier_weight, bias, branch)
        return super().quad_linear(x, weight, split, quantization, outlier_weight, bias, branch) if y is None else y

    def table_product(self, x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Rows of bytes for a few tokens, which is a matter of memory; a product in the dtype of `x` for more."""
        if x.shape[0] > _FEW_TOKENS or x.dtype not in lines.DTYPES or scale.dtype not in lines.DTYPES:
            return table_reference.table_product(x, words, scale)
        return torch.ops.quad_native.head(x, words, scale)

    def round_columns(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sixteen output channels at a time, all columns of which stay in the cache."""
        return torch.ops.quad_native.round_columns(*arguments)

    def descend_columns(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise."""
        return torch.ops.quad_native.descend_columns(*arguments)

    def rounding_errors(self, *arguments: Any) -> torch.Tensor:
        """All scales of a row while it is in the cache."""
        return torch.ops.quad_native.rounding_errors(*arguments)
