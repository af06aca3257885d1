"""Inputs of the linears: what rounding does to them, how coarse their grid is, what they look like."""

from collections import defaultdict
from functools import partial

import torch
from quad_kernels import quantize_input, split_input
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.quantization.grid_step import grid_step_ratio
from quad_modifiers.tools.inspection.measure.results import InputRow, Stage, Surface
from quad_modifiers.tools.inspection.measure.watch import INPUT_GRIDS, split_of, watching

_ROWS, _COLUMNS = 48, 96  # cells of a surface, at most
_TINY = torch.finfo(torch.float32).tiny


class _Sums:
    """Sums over tokens of one input's measures."""

    def __init__(self, linear: nn.Module) -> None:
        self.split = split_of(linear)
        self.tokens = 0
        self.totals = torch.zeros(4, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Adds inputs `[n, width]`, as they come into the linear."""
        x = x.float()
        _, residual = split_input(x, self.split)
        energy = x.square().sum(-1).clamp(min=_TINY)
        outlier_energy = (energy - residual.square().sum(-1)) / energy * (energy > _TINY)  # 0 of a token of zeros
        errors, steps = [], None
        for quantization in INPUT_GRIDS.values():
            integers, scale = quantize_input(residual, quantization)
            errors.append((integers * scale - residual).square().sum(-1) / energy)
            steps = scale.squeeze(-1) if steps is None else steps  # of the first grid, 4 bits
        assert steps is not None
        ratios = grid_step_ratio(steps, residual)
        self.totals += torch.stack([outlier_energy, *errors, ratios]).double().sum(-1).cpu()
        self.tokens += len(x)

    def row(self, stage: Stage, layer: int, group: str) -> InputRow:
        """Returns the means over tokens."""
        return InputRow(stage, layer, group, *(self.totals / max(self.tokens, 1)).tolist())


def measure_inputs(decoder: Decoder, windows: list[torch.Tensor], stage: Stage) -> list[InputRow]:
    """Returns one row per block and group, from the inputs that the model has when it runs as it is."""
    sums: dict[tuple[int, str], _Sums] = {}
    watched = []
    for group in decoder.groups():
        key, linear = (group.layer, group.group.name), group.linears[0].module
        sums.setdefault(key, _Sums(linear))  # repeated groups, such as experts, are one
        watched.append((linear, sums[key].add))
    with watching(watched):
        for window in windows:
            decoder.run(window)
    return [each.row(stage, layer, group) for (layer, group), each in sums.items()]


def measure_surfaces(decoder: Decoder, window: torch.Tensor, layers: list[int], stage: Stage) -> list[Surface]:
    """Returns the magnitudes of a U-type and a D-type input in the given blocks over one window.

    What is shown is what the quantizer sees: outlier coordinates first, then the residual after its online Hadamard.
    """
    seen: dict[tuple[int, str], list[Surface]] = defaultdict(list)

    def see(layer: int, group: str, linear: nn.Module, x: torch.Tensor) -> None:
        outlier, residual = split_input(x.float(), split_of(linear))
        parts = [] if outlier is None else [_pooled(outlier, max(1, _COLUMNS * outlier.shape[1] // x.shape[1]))]
        kept = parts[0].shape[1] if parts else 0
        image = torch.cat([*parts, _pooled(residual, _COLUMNS - kept)], dim=1)
        channels = residual.shape[1] + (0 if outlier is None else outlier.shape[1])
        values = [[float(f"{value:.4g}") for value in row] for row in image.tolist()]
        seen[layer, group].append(Surface(stage, layer, group, kept, len(x), channels, values))

    watched = []
    for layer in layers:
        groups = decoder.blocks[layer].quantized_groups()
        first_reader = next((group for group in groups if not group.group.writes_stream), None)
        last_writer = next((group for group in reversed(groups) if group.group.writes_stream), None)
        for group in (first_reader, last_writer):
            if group is not None:
                linear = group.linears[0].module
                watched.append((linear, partial(see, layer, group.group.name, linear)))
    with watching(watched):
        decoder.run(window)
    return [surfaces[0] for surfaces in seen.values()]


def _pooled(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns the largest magnitude in each cell of a grid of at most `_ROWS` by `columns`."""
    rows, columns = min(_ROWS, x.shape[0]), min(columns, x.shape[1])
    return nn.functional.adaptive_max_pool2d(x.abs().unsqueeze(0), (rows, columns)).squeeze(0).cpu()
