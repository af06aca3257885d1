"""One pass over the decoder that quantizes the weights block by block, with real inputs in every block.

Two streams run side by side when error correction is on: the original model's activations, and those of the model as
quantized so far (input quantization included). Otherwise only the second.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from quad_kernels import QuantizedWeight, WeightGrid, choose_backend
from quad_kernels.backends.native_cpu import NativeBackend

from quad_modifiers.journal import digest_of
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.on_disk import give_back, on_disk, rest
from quad_modifiers.passes.calibration_stream import (
    CalibrationBatch,
    first_block_inputs,
    in_float32,
    in_parts,
)
from quad_modifiers.passes.kept_blocks import KeptBlocks
from quad_modifiers.passes.quantized_tensors import keep_weight, kept_weight
from quad_modifiers.passes.runners import BlockRunner, runner_of
from quad_modifiers.quantization.group import (
    InputMoments,
    LinearReport,
    MomentSums,
    WeightQuantization,
    quantize_group,
)
from quad_modifiers.ranks import OrderedSum

_SMALL = 2**16  # weights of a linear below which its calls take longer than its products

Finish = Callable[[PlacedLinear, QuantizedWeight], None]
GridOf = Callable[[PlacedLinear], WeightGrid]


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder,
    batches: list[dict[str, torch.Tensor]] | None,
    settings: WeightQuantization,
    finish: Finish,
    skipped: Callable[[str], bool],
    grid_of: GridOf | None = None,
) -> Iterator[list[tuple[PlacedGroup, LinearReport]]]:
    """Quantizes all decoder blocks in order; yields each group of a block with its report when it is done.

    Each block is a layer in the journal of the run: one that is finished there is put in its place instead.

    Args:
        decoder: with `QuadLinear` linears.
        batches: `input_ids` and optional `attention_mask`; None for RTN.
        settings: how to quantize.
        finish: called for each quantized linear to put the weight in its place: once its block is done, or at once
            where the rest of the block is computed faster with it.
        skipped: predicate on full module names: linears that stay in full precision.
        grid_of: the grid of a linear, alike for those that share their input; that of `settings` by default.
    """
    stream = [] if batches is None else first_block_inputs(decoder, batches, shared=True)
    original = [batch.hidden for batch in stream] if settings.error_correction else None
    scale_dtype = next(decoder.linears()).module.qweight.dtype
    log = KeptBlocks("weights", stream, original, lambda: digest_of(decoder.model.named_parameters()))
    for block in decoder.blocks:
        work = _BlockWork(block, settings, scale_dtype, finish, skipped, grid_of or (lambda linear: settings.grid))
        kept = log.result(block)
        if kept is not None:
            work.take(*kept, quantized_inputs=batches is not None)
            rest(block.module)
            yield work.reports
            continue
        with in_float32(block.module):
            if batches is None:
                work.round_to_nearest()
            else:
                work.run(runner_of(block, decoder.architecture), stream, original)
        for linear, weight in work.finished:
            _check_representable(linear)
            if linear.name not in work.in_place:
                finish(linear, weight)
        rest(block.module)
        if log.keeps:
            log.finish(*work.result())
        yield work.reports


def runs_faster_packed(linear: QuadLinear) -> bool:
    """Whether integers of inputs and weights are multiplied faster than float32 here: the native CPU kernels do it."""
    weight = linear.residual.weight
    if not linear.quantize_input or weight.device.type != "cpu" or weight.numel() < _SMALL:
        return False
    return choose_backend(weight.device).name == NativeBackend.name


def _check_representable(linear: PlacedLinear) -> None:
    """Refuses outlier weights that became infinite as they went back to the model's dtype."""
    weight = linear.module.outlier_weight
    if weight is not None and not torch.isfinite(weight).all():
        raise ValueError(
            f"the outlier weights of {linear.name} do not fit {weight.dtype}; raise `damping`, or load the model in "
            "bfloat16 or float32"
        )


class _BlockWork:
    """Quantizes one block.

    Attributes:
        finished: the quantized linears and their weights.
        in_place: names of those whose weights are in their places already.
        reports: the quantized groups, each with what its quantization did.
    """

    def __init__(
        self,
        block: Block,
        settings: WeightQuantization,
        scale_dtype: torch.dtype,
        finish: Finish,
        skipped: Callable[[str], bool],
        grid_of: GridOf,
    ) -> None:
        self.block, self.settings, self.scale_dtype = block, settings, scale_dtype
        self.finish, self.skipped, self.grid_of = finish, skipped, grid_of
        self.finished: list[tuple[PlacedLinear, QuantizedWeight]] = []
        self.in_place: set[str] = set()
        self.reports: list[tuple[PlacedGroup, LinearReport]] = []

    def result(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Returns the tensors and facts from which `take` makes the same block of the one that came."""
        tensors: dict[str, torch.Tensor] = {}
        for linear, weight in self.finished:
            tensors |= keep_weight(linear, weight)
        return tensors, {group.names: asdict(report) for group, report in self.reports}

    def take(self, tensors: dict[str, torch.Tensor], facts: Any, quantized_inputs: bool) -> None:
        """Puts the weights of an earlier run in their places."""
        if quantized_inputs:
            self._switch_inputs(True)
        for linear in self.block.linears():
            weight = kept_weight(linear, tensors, self.grid_of(linear))
            if weight is not None:
                self.finish(linear, weight)
        self.reports = [
            (group, LinearReport(**facts[group.names])) for group in self.block.groups if group.names in facts
        ]

    def round_to_nearest(self) -> None:
        """Quantizes the groups without inputs."""
        for group in self.block.quantized_groups():
            self._solve(group, None)

    def run(self, runner: BlockRunner, stream: list[CalibrationBatch], original: list[torch.Tensor] | None) -> None:
        """Quantizes the groups in run order, and moves both streams past the block."""
        self._switch_inputs(False)
        wanted = None if original is None else self._original_inputs(runner, stream, original)
        self._switch_inputs(True)

        def visit(group: PlacedGroup, inputs: list[torch.Tensor]) -> None:
            if group.group.quantized and self._chosen(group):
                self._solve(group, self._moments(group, inputs, stream, wanted))
                give_back()
                self._go_on_with_integers(group)

        runner.visit(stream, visit)

    def _switch_inputs(self, on: bool) -> None:
        for linear in self.block.linears():
            linear.module.quantize_input = on

    def _original_inputs(
        self, runner: BlockRunner, stream: list[CalibrationBatch], original: list[torch.Tensor]
    ) -> list[dict[str, torch.Tensor]]:
        """Inputs in the original model of the groups that are corrected; moves its stream past the block."""
        inputs: list[dict[str, torch.Tensor]] = []
        for index, batch in enumerate(stream):
            seen: dict[str, torch.Tensor] = {}

            def see(group: PlacedGroup, x: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
                if self._is_corrected(group):
                    # Kept until their group is reached: half the memory, and the drift they serve is an average.
                    seen[group.names] = on_disk(x.bfloat16())

            original[index] = on_disk(runner.run(original[index], batch.arguments[self.block.index], see))
            inputs.append(seen)
        return inputs

    def _is_corrected(self, group: PlacedGroup) -> bool:
        """Not a repeated group: the original model may send other tokens to a part, such as an expert."""
        return group.group.quantized and not group.group.is_repeated and bool(self._chosen(group))

    def _chosen(self, group: PlacedGroup) -> list[PlacedLinear]:
        return [linear for linear in group.linears if not self.skipped(linear.name)]

    def _moments(
        self,
        group: PlacedGroup,
        inputs: list[torch.Tensor],
        stream: list[CalibrationBatch],
        originals: list[dict[str, torch.Tensor]] | None,
    ) -> MomentSums | None:
        """Moments of the inputs, None if there are none: an expert that no token was sent to is rounded to nearest."""
        if not self._is_corrected(group):
            originals = None
        halves = originals is not None and self.settings.error_correction == "auto"
        total = OrderedSum()
        for places in in_parts(stream):
            moments = InputMoments(self._chosen(group)[0].module, originals is not None, halves)
            for x, batch, place in ((inputs[place], stream[place], place) for place in places):
                if not x.numel():
                    continue
                original = None if originals is None else batch.tokens(originals[place].pop(group.names)).float()
                try:
                    moments.add(batch.tokens(x), original)
                except ValueError as error:
                    raise ValueError(f"{group.names}: {error}") from error
            total.add(moments.sums())
        sums = total.total()
        return sums if sums["tokens"].any() else None

    def _go_on_with_integers(self, group: PlacedGroup) -> None:
        for linear, weight in self.finished[-len(self._chosen(group)) :]:
            if runs_faster_packed(linear.module):
                self.finish(linear, weight)
                self.in_place.add(linear.name)

    def _solve(self, group: PlacedGroup, moments: MomentSums | None) -> None:
        chosen = self._chosen(group)
        if not chosen:
            return
        linears = [linear.module for linear in chosen]
        settings = replace(self.settings, grid=self.grid_of(chosen[0]))
        weights, report = quantize_group(linears, moments, settings, self.scale_dtype, group.names)
        self.finished += zip(chosen, weights, strict=True)
        self.reports.append((group, report))
