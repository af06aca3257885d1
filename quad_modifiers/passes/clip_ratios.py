"""Chooses the clip ratio of input grids by what the linears make of the rounding error."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from quad_kernels import InputQuantization, fake_quantize, split_input

from quad_modifiers.journal import open_step
from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.on_disk import on_disk
from quad_modifiers.passes.calibration_stream import CalibrationBatch, first_block_inputs, in_float32
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.reporting import layer_progress

CANDIDATES = tuple(round(1 - 0.02 * step, 2) for step in range(31))  # 1.0 to 0.4
_TOKENS = 2048  # that pass through the model: the errors of all blocks are summed, so that few will do
_MEASURED = 256  # of a batch, spread over it

_Keys = tuple[str, ...]


@torch.no_grad()
def choose_clip_ratios(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], wanted: Callable[[PlacedGroup], bool]
) -> dict[str, float]:
    """Returns the clip ratio of least output error for each role and width of the wanted groups, by `ratio_key`.

    The error is |(x_q - x) W^T|^2 over |x W^T|^2 on calibration tokens, summed over the blocks. Linears that share
    their input share their ratio, and so do all blocks where it has the same bits. A group whose inputs are not to be
    quantized has none.

    Args:
        decoder: with linears whose `input_quantization` is set and not switched on yet; its ratio does not count.
        batches: `input_ids` and optional `attention_mask`; the first ones are used.
        wanted: tells the groups to choose for.
    """
    log = open_step("clip-ratios-by-bits")
    if log.done:
        return dict(log.result(0)[1])
    before = accumulate((batch["input_ids"].numel() for batch in batches), initial=0)
    few = [batch for batch, tokens in zip(batches, before, strict=False) if tokens < _TOKENS]
    stream = first_block_inputs(decoder, few)
    total: dict[_Keys, torch.Tensor] = {}
    for block in layer_progress(decoder.blocks, "choosing clip ratios"):
        errors = _BlockErrors(wanted)
        with in_float32(block.module):
            runner = runner_of(block, decoder.architecture)
            for batch in stream:
                errors.batch = batch
                batch.hidden = on_disk(runner.run(batch.hidden, batch.arguments[block.index], errors.see))
        for keys, found in errors.relative().items():
            total[keys] = total[keys] + found if keys in total else found
    chosen = {key: CANDIDATES[int(found.argmin())] for keys, found in total.items() for key in keys}
    log.finish({}, chosen)
    return chosen


def ratio_key(role: str, quantization: InputQuantization) -> str:
    """Returns the name under which the ratio of a role's inputs is chosen, "q_proj, 4 bits"."""
    return f"{role}, {quantization.bits} bits"


class _BlockErrors:
    """Sums over the batches of one block, by the keys of a group's linears."""

    batch: CalibrationBatch

    def __init__(self, wanted: Callable[[PlacedGroup], bool]) -> None:
        self.wanted = wanted
        self.errors: dict[_Keys, torch.Tensor] = {}  # of each candidate
        self.outputs: dict[_Keys, torch.Tensor] = {}

    def see(self, group: PlacedGroup, x: torch.Tensor) -> None:
        """Adds the input of a group."""
        linears = [linear.module for linear in group.linears]
        if not self.wanted(group) or linears[0].input_quantization is None or not x.numel():
            return
        x = self.batch.tokens(x)
        x = x[:: max(1, len(x) // _MEASURED)].float()
        _, residual = split_input(x, linears[0].split)
        weight = torch.cat([linear.residual.weight for linear in linears])
        grids = [replace(linears[0].input_quantization, clip_ratio=ratio) for ratio in CANDIDATES]
        energy = _energy_of(weight)
        errors = torch.stack([energy(fake_quantize(residual, grid) - residual) for grid in grids])
        output = _energy(torch.cat([linear(x) for linear in linears], dim=-1))
        keys = tuple(ratio_key(linear.role, linears[0].input_quantization) for linear in group.linears)
        self.errors[keys] = self.errors.get(keys, torch.zeros_like(errors)) + errors
        self.outputs[keys] = self.outputs.get(keys, torch.zeros_like(output)) + output

    def relative(self) -> dict[_Keys, torch.Tensor]:
        """Errors over outputs, `[candidates]`, float64."""
        return {keys: errors / self.outputs[keys].clamp(min=1e-30) for keys, errors in self.errors.items()}


def _energy_of(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function |x W^T|^2 of `x`, `[tokens, in]`, for a weight `[out, in]`: by W^T W if that is smaller."""
    out_features, in_features = weight.shape
    if out_features <= in_features:
        return lambda x: _energy(x @ weight.T)
    gram = weight.T @ weight
    return lambda x: ((x @ gram) * x).sum(dtype=torch.float64)


def _energy(y: torch.Tensor) -> torch.Tensor:
    return y.square().sum(dtype=torch.float64)
