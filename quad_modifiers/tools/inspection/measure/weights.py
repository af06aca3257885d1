"""What rounding the weights to 4 bits does to each linear."""

from functools import partial

import torch
from quad_kernels import IntegerGrid, split_input
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.quantization.grid import WeightScales, dequantize, round_to_grid, search_clip
from quad_modifiers.quantization.grid_step import grid_step_ratio
from quad_modifiers.tools.inspection.measure.results import Stage, WeightRow
from quad_modifiers.tools.inspection.measure.watch import watching

GRID = IntegerGrid(4)
_TINY = torch.finfo(torch.float32).tiny
_CANDIDATES = 12  # clip ratios tried: the inspection compares parts, the modifier tries more


class RoundedWeights:
    """Residual weights rounded to nearest on a grid; the scales of each linear are searched once."""

    def __init__(self, grid: IntegerGrid = GRID) -> None:
        self._grid = grid
        self._scales: dict[nn.Module, WeightScales] = {}

    def __call__(self, linear: QuadLinear) -> torch.Tensor:
        """Returns the rounded residual weight, `[out, in]`, float32."""
        wide = linear.residual.weight.detach().float()
        scales = self._scales_of(linear).expand(wide.shape[1])
        return dequantize(round_to_grid(wide, scales, self._grid), scales)

    def grid_step_ratios(self, linear: QuadLinear) -> torch.Tensor:
        """Returns the GSR of each row of the residual weight, `[out]`, float32."""
        return grid_step_ratio(self._scales_of(linear).scale.squeeze(-1), linear.residual.weight.detach().float())

    def _scales_of(self, linear: QuadLinear) -> WeightScales:
        if linear not in self._scales:
            weight = linear.residual.weight.detach()
            self._scales[linear] = search_clip(weight.float(), self._grid, weight.dtype, candidates=_CANDIDATES)
        return self._scales[linear]


@torch.no_grad()
def measure_weights(decoder: Decoder, window: torch.Tensor, rounded: RoundedWeights, stage: Stage) -> list[WeightRow]:
    """Returns one row per unquantized `QuadLinear`, the output errors from the inputs of one window, `[1, length]`."""
    rows: list[WeightRow] = []

    def see(layer: int, role: str, linear: QuadLinear, x: torch.Tensor) -> None:
        outlier, residual = split_input(x, linear.split)
        weight = linear.residual.weight
        change = rounded(linear) - weight.float()
        output = (residual @ weight.T).float()
        energy = weight.float().square().sum()
        if outlier is not None and linear.outlier is not None:
            output += (outlier @ linear.outlier.weight.T).float()
            energy += linear.outlier.weight.float().square().sum()
        moved = (residual @ change.to(x.dtype).T).float()
        # A linear of zeros, as blocks have that were put in or pruned, has no error.
        output_error = moved.square().sum() / output.square().sum().clamp(min=_TINY)
        error = change.square().sum() / energy.clamp(min=_TINY)
        ratio = rounded.grid_step_ratios(linear).mean()
        rows.append(WeightRow(stage, layer, role, float(error), float(output_error), float(ratio)))

    watched = [(linear.module, partial(see, linear.layer, linear.role, linear.module)) for linear in decoder.linears()]
    with watching(watched):
        decoder.run(window)
    return rows
