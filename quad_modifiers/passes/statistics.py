"""What the projection needs to know about the activations."""

from dataclasses import dataclass

import torch

from quad_modifiers.journal import open_step
from quad_modifiers.linalg import StreamingGram
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.passes.calibration_stream import (
    CalibrationBatch,
    first_block_inputs,
    in_float32,
    keep_streams,
    put_streams_back,
)
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.reporting import layer_progress


@dataclass
class ActivationStatistics:
    """Second moments of the inputs of the linears, float64.

    Attributes:
        residual: mean of x^T x / rms(x)^2 over all norms that feed quantized linears, `[hidden, hidden]`.
        heads: second moment of what each writer of values reads, per key-value head, `[kv_heads, head_dim, head_dim]`,
            by the path of its parent.
        channels: energy (sum of squares) of each channel that a writer reads, `[channels]`, by the path of its parent.
    """

    residual: torch.Tensor
    heads: dict[str, torch.Tensor]
    channels: dict[str, torch.Tensor]


def _normalized(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS-normalized stream without the norm's weight, which is folded into the linears."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
def collect_statistics(decoder: Decoder, batches: list[dict[str, torch.Tensor]]) -> ActivationStatistics:
    """Streams the calibration batches through the model, one block at a time.

    Args:
        decoder: in its original basis.
        batches: `input_ids` and optional `attention_mask`.

    Raises:
        ValueError: naming the layer in which an activation is NaN or infinite.
    """
    geometry = decoder.geometry
    stream = first_block_inputs(decoder, batches)
    residual = StreamingGram(geometry.hidden, stream[0].hidden.device)
    heads: dict[str, torch.Tensor] = {}
    channels: dict[str, torch.Tensor] = {}
    log = open_step("statistics")
    resumed = log.done
    if resumed:
        kept = log.carried()
        put_streams_back(stream, None, kept)
        residual.total, residual.tokens = kept["residual"].to(residual.total), int(kept["tokens"])
    for block in layer_progress(decoder.blocks, "calibrating"):
        if block.index < resumed:
            found, _ = log.result(block.index)
            heads |= _of_kind(found, "heads", stream)
            channels |= _of_kind(found, "channels", stream)
            continue
        moments = _BlockMoments(geometry, residual)
        try:
            with in_float32(block.module):
                _run(decoder, block, stream, moments)
        except ValueError as error:
            raise ValueError(f"layer {block.index}: {error}") from error
        means = {path: torch.stack([gram.mean() for gram in grams]) for path, grams in moments.heads.items()}
        heads |= means
        channels |= moments.channels
        carried = {"residual": residual.total, "tokens": torch.tensor(residual.tokens)}
        log.finish(_named("heads", means) | _named("channels", moments.channels), None, keep_streams(stream) | carried)
    return ActivationStatistics(residual.mean(), heads, channels)


def _named(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}.{path}": tensor for path, tensor in tensors.items()}


def _of_kind(tensors: dict[str, torch.Tensor], kind: str, stream: list[CalibrationBatch]) -> dict[str, torch.Tensor]:
    """What was `_named`, on the device of the stream."""
    device = stream[0].hidden.device
    return {name.removeprefix(f"{kind}."): each.to(device) for name, each in tensors.items() if name.startswith(kind)}


def _run(decoder: Decoder, block: Block, stream: list[CalibrationBatch], moments: "_BlockMoments") -> None:
    runner = runner_of(block, decoder.architecture)
    for batch in stream:
        moments.batch = batch
        batch.hidden = runner.run(batch.hidden, batch.arguments[block.index], moments.see, moments.see_stream)
        if not torch.isfinite(batch.hidden).all():  # no norm comes after the last block
            raise ValueError("its output is NaN or infinite")


class _BlockMoments:
    """Sums over the batches of one block."""

    batch: CalibrationBatch

    def __init__(self, geometry: ModelGeometry, residual: StreamingGram) -> None:
        self.geometry, self.residual = geometry, residual
        self.heads: dict[str, list[StreamingGram]] = {}
        self.channels: dict[str, torch.Tensor] = {}

    def see_stream(self, group: PlacedGroup, hidden: torch.Tensor) -> None:
        """Adds the stream that enters a norm."""
        self.residual.add(self.batch.tokens(_normalized(hidden, self.geometry.eps)))

    def see(self, group: PlacedGroup, x: torch.Tensor) -> None:
        """Adds the input of a writer."""
        if group.group.reads == "values":
            values = self.batch.tokens(x).unflatten(-1, (self.geometry.kv_heads, -1, self.geometry.head_dim))
            if group.path not in self.heads:
                self.heads[group.path] = [
                    StreamingGram(self.geometry.head_dim, x.device) for _ in range(self.geometry.kv_heads)
                ]
            for head, gram in enumerate(self.heads[group.path]):
                gram.add(values[:, head])
        elif group.group.reads == "channels":
            energy = self.batch.tokens(x).double().square().sum(0)
            self.channels[group.path] = self.channels.get(group.path, torch.zeros_like(energy)) + energy
