"""The layout: two rows of 4-bit integers in one row of bytes. And the backend that reads it."""

from types import MappingProxyType

import torch
from quad_kernels import Backend, InputQuantization, LinearOperands, QuantizedWeight, WeightLayout


def pack_row_pairs(integers: torch.Tensor) -> torch.Tensor:
    """Returns `[out / 2, in]`, uint8: row 2 i in the low four bits, row 2 i + 1 in the high four."""
    low, high = integers[0::2].view(torch.uint8), integers[1::2].view(torch.uint8)
    return (low & 15) | (high << 4)


def unpack_row_pairs(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """Returns `[out, in]`, int8."""
    low, high = (stored << 4).view(torch.int8) >> 4, stored.view(torch.int8) >> 4
    return torch.stack((low, high), dim=1).flatten(0, 1)


ROW_PAIRS = WeightLayout(
    pack=pack_row_pairs,
    unpack=unpack_row_pairs,
    accepts=lambda weight: weight.bits <= 4 and weight.out_features % 2 == 0,
)


class RowPairsBackend(Backend):
    """Products of integers in float64, which are exact, two rows of the weight at a time."""

    name = "row_pairs"
    priority = 50
    devices = ("cpu",)
    layouts = MappingProxyType({"row_pairs": ROW_PAIRS})

    def prepare_weight(self, weight: QuantizedWeight, quantization: InputQuantization | None) -> QuantizedWeight:
        return weight.to_layout("row_pairs")

    def integer_linear(self, operands: LinearOperands) -> torch.Tensor:
        x, x_scale, weight = operands.x, operands.x_scale, operands.weight
        groups = max(x_scale.shape[1], weight.scale.shape[1])
        if weight.layout != "row_pairs" or weight.zero_point is not None or x.dtype == torch.uint8 or groups > 1:
            return super().integer_linear(operands)
        stored, wide = weight.integers, x.double()
        halves = (stored << 4).view(torch.int8) >> 4, stored.view(torch.int8) >> 4
        total = torch.stack([wide @ half.double().T for half in halves], dim=-1).flatten(1)
        y = total.float() * x_scale * weight.scale.float().squeeze(-1)
        if operands.outlier is not None:
            y += operands.outlier.float() @ operands.outlier_weight.float().T
        if operands.bias is not None:
            y += operands.bias.float()
        return y.to(operands.out_dtype)
