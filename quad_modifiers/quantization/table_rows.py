"""Rounds the rows of an embedding or a head into their 8-bit table."""

import torch
from quad_kernels import IntegerGrid

from quad_modifiers.nn.packed_table import BITS, PackedTable
from quad_modifiers.quantization.grid import full_range_scales, round_to_grid

_ROWS = 4096  # quantized at a time: float32 copies stay small beside the model


def quantize_rows(table: PackedTable, weight: torch.Tensor, start: int = 0) -> None:
    """Rounds rows from `start` on to nearest and stores them.

    Args:
        table: table with as many rows as `weight`.
        weight: `[rows, columns]`, floating point.
        start: first row; the ones before stay as they are.
    """
    grid = IntegerGrid(BITS)
    for first in range(start, len(weight), _ROWS):
        values = weight[first : first + _ROWS].float()
        scales = full_range_scales(values, grid, table.weight_scale.dtype)
        table.fill(first, round_to_grid(values, scales, grid).to(torch.int8), scales.scale)
