"""Which blocks of a pass are finished in the journal of the run, and the residual streams behind the last of them."""

from collections.abc import Callable
from typing import Any

import torch

from quad_modifiers.journal import open_step
from quad_modifiers.model.decoder import Block
from quad_modifiers.on_disk import on_disk
from quad_modifiers.passes.calibration_stream import CalibrationBatch


class KeptBlocks:
    """A step of the journal with a layer for each block of a pass; it moves the streams to where the pass goes on.

    Args:
        name: of the step.
        stream: the batches, in front of the first block.
        original: the same of the original model, where the pass has a second stream.
        start: returns a digest of what the pass begins with.

    Attributes:
        carried: what else the last finished block has left for the next one, on the CPU; empty if there is none.

    Raises:
        ValueError: as `open_step`.
    """

    def __init__(
        self,
        name: str,
        stream: list[CalibrationBatch],
        original: list[torch.Tensor] | None = None,
        start: Callable[[], str] | None = None,
    ) -> None:
        self._step = open_step(name, start)
        self._done, self._stream, self._original = self._step.done, stream, original
        self.carried: dict[str, torch.Tensor] = {}
        if self._done:
            self.carried = self._step.carried()
            for index, batch in enumerate(stream):
                batch.hidden = on_disk(self.carried.pop(f"stream.{batch.number}").to(batch.hidden))
                if original is not None:
                    original[index] = on_disk(self.carried.pop(f"original.{batch.number}").to(batch.hidden))

    @property
    def keeps(self) -> bool:
        """Whether what is finished is kept."""
        return self._step.keeps

    def result(self, block: Block) -> tuple[dict[str, torch.Tensor], Any] | None:
        """Returns the tensors, on the CPU, and the facts of a block that was finished before; None if it was not."""
        return self._step.result(block.index) if block.index < self._done else None

    def finish(
        self, tensors: dict[str, torch.Tensor], facts: Any = None, carried: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Keeps the next block, whose results these are, with the streams as they are behind it.

        Args:
            tensors: its result.
            facts: what else belongs to the result, as JSON takes it.
            carried: what else the next block begins with.
        """
        streams = {f"stream.{batch.number}": batch.hidden for batch in self._stream}
        if self._original is not None:
            pairs = zip(self._stream, self._original, strict=True)
            streams |= {f"original.{batch.number}": hidden for batch, hidden in pairs}
        self._step.finish(tensors, facts, streams | (carried or {}))
