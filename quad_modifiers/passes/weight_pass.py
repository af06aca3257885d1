"""One pass over the decoder that quantizes the weights block by block, with real inputs in every block.

Two streams run side by side when error correction is on: the original model's activations, and those of the model as
quantized so far (input quantization included). Otherwise only the second.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.passes.blockwise import BlockSegments, first_block_inputs, in_float32
from quad_modifiers.quantization.grid import WeightScales
from quad_modifiers.quantization.layerwise import InputMoments, LinearReport, WeightQuantization, quantize_group

Finish = Callable[[QuadLinear, WeightScales], None]

_GROUP_KEYS = ("attention_input", "attention_core", "mlp_input", "mlp_core")


@dataclass(frozen=True)
class _Group:
    """Linears that share one input."""

    key: str
    linears: list[QuadLinear]
    names: str
    everything: list[QuadLinear]  # those that stay in full precision as well


class WeightPass:
    """Quantizes all decoder blocks in order.

    Args:
        model: with `QuadLinear` linears.
        architecture: names of its parts.
        batches: `input_ids` and optional `attention_mask`; None for RTN.
        settings: how to quantize.
        finish: called for each quantized linear once its block is done.
        skipped: names of linears that stay in full precision, as a predicate on the full module name.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: list[dict[str, torch.Tensor]] | None,
        settings: WeightQuantization,
        finish: Finish,
        skipped: Callable[[str], bool],
    ) -> None:
        self.architecture = architecture
        self.settings = settings
        self.finish = finish
        self.skipped = skipped
        self.layers = list(model.get_submodule(architecture.layers).children())
        self.names = {module: name for name, module in model.named_modules() if isinstance(module, QuadLinear)}
        self.scale_dtype = self.layers[0].get_submodule(architecture.linear_paths()[0]).residual.weight.dtype
        self.stream = None if batches is None else first_block_inputs(model, architecture, batches)
        self.original = None
        if settings.error_correction and self.stream is not None:
            self.original = [batch.hidden for batch in self.stream]

    @torch.no_grad()
    def run(self, index: int) -> list[LinearReport]:
        """Quantizes block `index` and moves the streams behind it; to be called for every block in order."""
        self._index, layer = index, self.layers[index]
        finished: list[tuple[QuadLinear, WeightScales]] = []
        with in_float32(layer):
            self._segments = BlockSegments(layer, self.architecture)
            groups = self._groups()
            self._switch(groups, False)
            originals = self._original_inputs()
            self._switch(groups, True)
            reports = [report for report in self._quantize(groups, originals, finished) if report is not None]
        for linear, scales in finished:
            self.finish(linear, scales)
        return reports

    def _groups(self) -> list[_Group]:
        a, segments = self.architecture, self._segments
        parts = (
            (segments.attention, a.attention_inputs),
            (segments.attention, (a.attention_output,)),
            (segments.mlp, a.mlp_inputs),
            (segments.mlp, (a.mlp_output,)),
        )
        groups = []
        for key, (parent, names) in zip(_GROUP_KEYS, parts, strict=True):
            linears = [parent.get_submodule(name) for name in names]
            full = self.names[linears[0]].removesuffix(names[0]) + ",".join(names)
            chosen = [linear for linear in linears if not self.skipped(self.names[linear])]
            groups.append(_Group(key, chosen, full, linears))
        return groups

    def _switch(self, groups: list[_Group], on: bool) -> None:
        for group in groups:
            for linear in group.everything:
                linear.quantize_input = on and linear.input_quantization is not None

    def _original_inputs(self) -> list[dict[str, torch.Tensor]] | None:
        """Inputs of all linears in the original model; moves its stream behind the block."""
        if self.original is None or self.stream is None:
            return None
        inputs = []
        for index, batch in enumerate(self.stream):
            seen = self._segments.forward(self.original[index], batch.arguments[self._index])
            self.original[index] = seen["output"]
            # Kept until their group is reached: half the memory, and the drift they serve is an average.
            inputs.append({key: seen[key].bfloat16() for key in _GROUP_KEYS})
        return inputs

    def _quantize(
        self,
        groups: list[_Group],
        originals: list[dict[str, torch.Tensor]] | None,
        finished: list[tuple[QuadLinear, WeightScales]],
    ) -> Iterator[LinearReport | None]:
        if self.stream is None:
            for group in groups:
                yield self._solve(group, None, finished)
            return
        segments, stream = self._segments, self.stream
        attention, attention_output, mlp, mlp_output = groups
        inputs = [segments.attention_norm(batch.hidden) for batch in stream]
        yield self._solve(attention, self._moments(attention, inputs, originals), finished)
        inputs = [
            segments.attention_core(x, batch.arguments[self._index]) for x, batch in zip(inputs, stream, strict=True)
        ]
        yield self._solve(attention_output, self._moments(attention_output, inputs, originals), finished)
        for x, batch in zip(inputs, stream, strict=True):
            batch.hidden = segments.after_attention(batch.hidden, x)
        inputs = [segments.mlp_norm(batch.hidden) for batch in stream]
        yield self._solve(mlp, self._moments(mlp, inputs, originals), finished)
        inputs = [segments.mlp_core(x) for x in inputs]
        yield self._solve(mlp_output, self._moments(mlp_output, inputs, originals), finished)
        for x, batch in zip(inputs, stream, strict=True):
            batch.hidden = segments.after_mlp(batch.hidden, x)

    def _moments(
        self, group: _Group, inputs: list[torch.Tensor], originals: list[dict[str, torch.Tensor]] | None
    ) -> InputMoments | None:
        if not group.linears:
            return None
        assert self.stream is not None
        moments = InputMoments(group.linears[0], originals is not None)
        for index, (x, batch) in enumerate(zip(inputs, self.stream, strict=True)):
            original = None if originals is None else batch.tokens(originals[index].pop(group.key)).float()
            try:
                moments.add(batch.tokens(x), original)
            except ValueError as error:
                raise ValueError(f"{group.names}: {error}") from error
        return moments

    def _solve(
        self, group: _Group, moments: InputMoments | None, finished: list[tuple[QuadLinear, WeightScales]]
    ) -> LinearReport | None:
        if not group.linears:
            return None
        scales, report = quantize_group(group.linears, moments, self.settings, self.scale_dtype, group.names)
        finished += zip(group.linears, scales, strict=True)
        return report
