"""Rows of what rotations act on: the residual stream before each norm, and what the writers of values read."""

from dataclasses import dataclass, field

import torch

from quad_modifiers.journal import digest_of
from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.on_disk import on_disk
from quad_modifiers.passes.calibration_stream import (
    CalibrationBatch,
    first_block_inputs,
    in_float32,
    working_device,
)
from quad_modifiers.passes.kept_blocks import KeptBlocks
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.reporting import layer_progress


@dataclass
class RowSample:
    """Sampled tokens, float32.

    Attributes:
        stream: the stream that enters each norm, not normalized, `[n, width]` each.
        values: inputs of each writer of values, unsplit, `[n, heads * head_dim]`, by the path of its parent.
    """

    stream: list[torch.Tensor] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def sample_rows(decoder: Decoder, batches: list[dict[str, torch.Tensor]], tokens: int, seed: int) -> RowSample:
    """Streams calibration batches through the model and keeps some tokens of each norm and each attention.

    Each block is a layer in the journal of the run.

    Args:
        decoder: the model, its linears not quantized.
        batches: `input_ids` and optional `attention_mask`.
        tokens: rows of the stream to keep, about, over all norms; each attention keeps as many as a block's norms.
        seed: seed of the choice.

    Raises:
        ValueError: naming the layer in which an activation is NaN or infinite.
    """
    stream = first_block_inputs(decoder, batches)
    share = tokens / max(1, len(decoder.blocks)) / sum(batch.hidden.shape[:-1].numel() for batch in stream)
    generator = torch.Generator().manual_seed(seed)
    sample = RowSample()
    log = KeptBlocks("rows", stream, start=lambda: digest_of(decoder.model.named_parameters()))
    if log.carried:
        generator.set_state(log.carried["generator"])
    for block in layer_progress(decoder.blocks, "sampling tokens"):
        kept = log.result(block)
        if kept is not None:
            _add(sample, kept[0])
            continue
        seen = _SeenRows(share, generator)
        with in_float32(block.module):
            runner = runner_of(block, decoder.architecture)
            for batch in stream:
                seen.batch = batch
                batch.hidden = on_disk(
                    runner.run(batch.hidden, batch.arguments[block.index], seen.see, seen.see_stream)
                )
                if not torch.isfinite(batch.hidden).all():
                    raise ValueError(f"layer {block.index}: its output is NaN or infinite")
        rows = {f"stream.{place}": torch.cat(parts) for place, parts in enumerate(seen.stream.values())}
        rows |= {f"values.{path}": torch.cat(parts) for path, parts in seen.values.items()}
        _add(sample, rows)
        log.finish(rows, carried={"generator": generator.get_state()})
    return sample


def _add(sample: RowSample, rows: dict[str, torch.Tensor]) -> None:
    """Adds the rows of a block, those of its norms in their order."""
    for place in range(sum(name.startswith("stream.") for name in rows)):
        sample.stream.append(rows[f"stream.{place}"].to(working_device()))
    for name in rows:
        kind, _, path = name.partition(".")
        if kind == "values":
            sample.values[path] = rows[name].to(working_device())


class _SeenRows:
    """Rows of one block."""

    batch: CalibrationBatch

    def __init__(self, share: float, generator: torch.Generator) -> None:
        self.share, self.generator = share, generator
        self.stream: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self.values: dict[str, list[torch.Tensor]] = {}

    def see_stream(self, group: PlacedGroup, hidden: torch.Tensor) -> None:
        """Keeps some of the stream that enters a norm; the two norms of a block share the tokens."""
        assert group.norm is not None
        self.stream.setdefault(group.norm, []).append(self._some(hidden, self.share / 2))

    def see(self, group: PlacedGroup, x: torch.Tensor) -> None:
        """Keeps some of the input of a writer of values."""
        if group.group.reads == "values":
            self.values.setdefault(group.path, []).append(self._some(x, self.share))

    def _some(self, x: torch.Tensor, share: float) -> torch.Tensor:
        rows = self.batch.tokens(x)
        kept = min(len(rows), max(1, round(share * len(rows))))
        return rows[torch.randperm(len(rows), generator=self.generator)[:kept].to(rows.device)].float()
