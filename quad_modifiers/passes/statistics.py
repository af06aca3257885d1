"""What the projection needs to know about the activations."""

from dataclasses import dataclass
from typing import Literal

import torch

from quad_modifiers.linalg import StreamingGram
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.on_disk import on_disk
from quad_modifiers.passes.calibration_stream import (
    CalibrationBatch,
    first_block_inputs,
    in_float32,
    in_parts,
    working_device,
)
from quad_modifiers.passes.kept_blocks import KeptBlocks
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.ranks import OrderedSum
from quad_modifiers.reporting import layer_progress

_ROWS = 128  # tokens that are widened at a time: they stay in the cache until they are summed

ValuesBasis = Literal["attention", "values"]
"""What the basis of the value heads is made from."""


@dataclass
class ActivationStatistics:
    """Second moments of the inputs of the linears, float64.

    Attributes:
        residual: mean of x^T x / rms(x)^2 over all norms that feed quantized linears, `[hidden, hidden]`.
        heads: second moment of what each writer of values reads, or of the values as they are made, per key-value head,
            `[kv_heads, head_dim, head_dim]`, by the path of its parent.
        channels: energy (sum of squares) of each channel that a writer reads, `[channels]`, by the path of its parent.
    """

    residual: torch.Tensor
    heads: dict[str, torch.Tensor]
    channels: dict[str, torch.Tensor]


def _normalized(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS-normalized stream without the norm's weight, which is folded into the linears."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
def collect_statistics(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], values_basis: ValuesBasis = "attention"
) -> ActivationStatistics:
    """Streams the calibration batches through the model, one block at a time.

    Args:
        decoder: in its original basis.
        batches: `input_ids` and optional `attention_mask`.
        values_basis: whether the moments of the heads are of what attention makes of the values, or of the values.

    Raises:
        ValueError: naming the layer in which an activation is NaN or infinite.
    """
    geometry = decoder.geometry
    stream, device = first_block_inputs(decoder, batches, shared=True), working_device()
    residual = StreamingGram(geometry.hidden, device)
    heads: dict[str, torch.Tensor] = {}
    channels: dict[str, torch.Tensor] = {}
    log = KeptBlocks("statistics", stream)
    if log.carried:
        residual.total, residual.tokens = log.carried["residual"].to(residual.total), int(log.carried["tokens"])
    for block in layer_progress(decoder.blocks, "calibrating"):
        kept = log.result(block)
        if kept is not None:
            heads |= _of_kind(kept[0], "heads", device)
            channels |= _of_kind(kept[0], "channels", device)
            continue
        try:
            with in_float32(block.module):
                sums = _run(decoder, block, stream, values_basis)
        except ValueError as error:
            raise ValueError(f"layer {block.index}: {error}") from error
        residual.total += sums["residual"].to(device)
        residual.tokens += int(sums["residual tokens"])
        counts = _of_kind(sums, "head tokens", device)
        totals = _of_kind(sums, "heads", device)
        means = {
            path: torch.stack([StreamingGram.of(each, int(counts[path])).mean() for each in total])
            for path, total in totals.items()
        }
        energies = _of_kind(sums, "channels", device)
        heads |= means
        channels |= energies
        carried = {"residual": residual.total, "tokens": torch.tensor(residual.tokens)}
        log.finish(_named("heads", means) | _named("channels", energies), carried=carried)
    return ActivationStatistics(residual.mean(), heads, channels)


def _named(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}.{path}": tensor for path, tensor in tensors.items()}


def _of_kind(tensors: dict[str, torch.Tensor], kind: str, device: torch.device) -> dict[str, torch.Tensor]:
    """What was `_named`, on a device."""
    start = f"{kind}."
    return {name.removeprefix(start): each.to(device) for name, each in tensors.items() if name.startswith(start)}


def _run(
    decoder: Decoder, block: Block, stream: list[CalibrationBatch], values_basis: ValuesBasis
) -> dict[str, torch.Tensor]:
    """Moves the stream past a block; returns the sums over all ranks of what the block saw."""
    runner, total = runner_of(block, decoder.architecture), OrderedSum()
    for places in in_parts(stream):
        moments = _PartMoments(decoder.geometry, values_basis)
        for batch in (stream[place] for place in places):
            moments.batch = batch
            call = batch.arguments[block.index]
            batch.hidden = on_disk(runner.run(batch.hidden, call, moments.see, moments.see_stream))
            if not torch.isfinite(batch.hidden).all():  # no norm comes after the last block
                raise ValueError("its output is NaN or infinite")
        total.add(moments.sums())
    return total.total()


class _PartMoments:
    """Sums over a part of the batches, in one block."""

    batch: CalibrationBatch

    def __init__(self, geometry: ModelGeometry, values_basis: ValuesBasis) -> None:
        self.geometry, self.values_basis = geometry, values_basis
        self.residual = StreamingGram(geometry.hidden, working_device())
        self.heads: dict[str, list[StreamingGram]] = {}
        self.channels: dict[str, torch.Tensor] = {}

    def sums(self) -> dict[str, torch.Tensor]:
        """Returns all of them by name, those of each token of the same name's kind beside them."""
        heads = {path: torch.stack([gram.total for gram in grams]) for path, grams in self.heads.items()}
        tokens = {path: torch.tensor(grams[0].tokens) for path, grams in self.heads.items()}
        residual = {"residual": self.residual.total, "residual tokens": torch.tensor(self.residual.tokens)}
        return residual | _named("heads", heads) | _named("head tokens", tokens) | _named("channels", self.channels)

    def see_stream(self, group: PlacedGroup, hidden: torch.Tensor) -> None:
        """Adds the stream that enters a norm."""
        self.residual.add(self.batch.tokens(_normalized(hidden, self.geometry.eps)))

    def see(self, group: PlacedGroup, x: torch.Tensor) -> None:
        """Adds the input of a writer, or the values that a reader makes of its input."""
        reads, wanted = group.group.reads, "values" if self.values_basis == "attention" else "stream"
        if reads == "stream" == wanted:
            for linear in group.linears:
                if "values" in linear.member.produces:
                    self._add_heads(group.path, self._values(linear, self.batch.tokens(x)))
        elif reads == "values" == wanted:
            self._add_heads(group.path, self.batch.tokens(x))
        elif group.group.reads == "channels":
            for rows in self.batch.tokens(x).split(_ROWS):
                energy = rows.double().square().sum(0)
                self.channels[group.path] = self.channels.get(group.path, torch.zeros_like(energy)) + energy

    def _values(self, linear: PlacedLinear, x: torch.Tensor) -> torch.Tensor:
        """The value heads among the output of a linear, `[tokens, kv_heads * head_dim]`."""
        sizes = self.geometry.sizes()
        before = linear.member.produces[: linear.member.produces.index("values")]
        start = sum(sizes[space] for space in before)
        y: torch.Tensor = linear.module(x)
        return y[..., start : start + sizes["values"]]

    def _add_heads(self, path: str, x: torch.Tensor) -> None:
        """Adds vectors of heads, `[tokens, heads * head_dim]`, each to the moments of its key-value head."""
        values = x.unflatten(-1, (self.geometry.kv_heads, -1, self.geometry.head_dim))
        if path not in self.heads:
            self.heads[path] = [StreamingGram(self.geometry.head_dim, x.device) for _ in range(self.geometry.kv_heads)]
        for head, gram in enumerate(self.heads[path]):
            gram.add(values[:, head])
