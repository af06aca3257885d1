"""Two ways to run a decoder block and stop where a group of its linears gets its input.

`SegmentedRunner` computes each activation once: the captured input of a writer is reused to continue after the writer
has been changed. It takes blocks whose groups come in pairs, a reader of the stream and the writer after it, which is
what dense pre-norm blocks are. `HookedRunner` takes any block and runs it twice: to see the inputs, and once more after
the linears have been changed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Block, PlacedGroup
from quad_modifiers.on_disk import on_disk
from quad_modifiers.passes.calibration_stream import CalibrationBatch, fast_products

See = Callable[[PlacedGroup, torch.Tensor], None]
"""Called with a group and the input of its linears, float32."""

Visit = Callable[[PlacedGroup, list[torch.Tensor]], None]
"""Called with a group and its input in every batch; it may change the linears of the group."""


class BlockRunner(ABC):
    """Runs one decoder block, whose weights are float32.

    Args:
        block: the block.
    """

    def __init__(self, block: Block) -> None:
        self.block = block

    @abstractmethod
    def run(
        self, hidden: torch.Tensor, arguments: dict[str, Any], see: See, see_stream: See | None = None
    ) -> torch.Tensor:
        """Runs the block on one batch as it is.

        Args:
            hidden: residual stream, `[batch, tokens, hidden]`, float32.
            arguments: keyword arguments of the block (positions, masks).
            see: shown every group's input, in run order.
            see_stream: shown the stream that enters a norm, with the first group that reads this norm.

        Returns:
            The stream after the block.
        """

    @abstractmethod
    def visit(self, batches: Sequence[CalibrationBatch], visit: Visit) -> None:
        """Shows every group's inputs in run order, and moves the batches past the block as `visit` leaves it."""


class SegmentedRunner(BlockRunner):
    """The computation of a block, cut at the inputs of its linears.

    Raises:
        ValueError: if the groups of the block are not pairs of a reader and a writer.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        groups = block.groups
        self.branches = list(zip(groups[::2], groups[1::2], strict=False))
        fit = len(groups) % 2 == 0 and all(
            reader.norm is not None and writer.group.writes_stream and len(writer.linears) == 1
            for reader, writer in self.branches
        )
        if not fit:
            names = ", ".join(group.group.name for group in groups)
            raise ValueError(
                f"{block.name} has the groups {names}, which are not pairs of a reader of the stream and one writer "
                'after it; give its architecture runner="hooked"'
            )

    def run(
        self, hidden: torch.Tensor, arguments: dict[str, Any], see: See, see_stream: See | None = None
    ) -> torch.Tensor:
        """See `BlockRunner.run`."""
        for reader, writer in self.branches:
            if see_stream is not None:
                see_stream(reader, hidden)
            x = _norm(reader, hidden)
            see(reader, x)
            x = _core(reader, writer, x, arguments)
            see(writer, x)
            hidden = self._add_output(writer, hidden, x)
        return hidden

    def visit(self, batches: Sequence[CalibrationBatch], visit: Visit) -> None:
        """See `BlockRunner.visit`."""
        index = self.block.index
        for reader, writer in self.branches:
            inputs = [on_disk(_norm(reader, batch.hidden)) for batch in batches]
            visit(reader, inputs)
            inputs = [
                on_disk(_core(reader, writer, x, batch.arguments[index]))
                for x, batch in zip(inputs, batches, strict=True)
            ]
            visit(writer, inputs)
            for x, batch in zip(inputs, batches, strict=True):
                batch.hidden = on_disk(self._add_output(writer, batch.hidden, x))

    def _add_output(self, writer: PlacedGroup, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with fast_products():
            return torch.add(hidden, writer.linears[0].module(x), alpha=self.block.branch_factor)


def _norm(reader: PlacedGroup, hidden: torch.Tensor) -> torch.Tensor:
    assert reader.norm is not None
    return reader.norm(hidden)


def _core(reader: PlacedGroup, writer: PlacedGroup, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Input of the writer from the output of the norm."""
    with fast_products():
        if writer.group.reads == "values":  # attention, which is called with positions and masks
            return _captured(writer.linears[0].module, lambda: reader.parent(hidden_states=x, **arguments)).float()
        return _captured(writer.linears[0].module, lambda: reader.parent(x)).float()


class _Stop(Exception):
    """Ends a forward pass once the wanted input was seen."""


def _captured(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """Returns the input of `module` while `run` executes, which ends there."""
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


class HookedRunner(BlockRunner):
    """Runs the block as it is and listens at its linears and norms.

    A group's inputs are those of the block before any of its linears was changed; the block runs once more to move the
    stream past it.
    """

    def run(
        self, hidden: torch.Tensor, arguments: dict[str, Any], see: See, see_stream: See | None = None
    ) -> torch.Tensor:
        """See `BlockRunner.run`."""
        handles, norms = [], set()
        for group in self.block.groups:
            if see_stream is not None and group.norm is not None and group.norm not in norms:
                norms.add(group.norm)
                handles.append(_listen(group.norm, group, see_stream))
            handles.append(_listen(group.linears[0].module, group, see))
        try:
            with fast_products():
                output = self.block.module(hidden, **arguments)
        finally:
            for handle in handles:
                handle.remove()
        return output[0] if isinstance(output, tuple) else output

    def visit(self, batches: Sequence[CalibrationBatch], visit: Visit) -> None:
        """See `BlockRunner.visit`."""
        index = self.block.index
        inputs: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        for batch, seen in zip(batches, inputs, strict=True):
            self.run(batch.hidden, batch.arguments[index], partial(_keep, seen))
        for group in self.block.groups:
            # An expert that no token of a batch was sent to is not called.
            none = batches[0].hidden.new_empty(0, group.linears[0].module.in_features)
            visit(group, [seen.pop(group.names, none) for seen in inputs])
        for batch in batches:
            batch.hidden = on_disk(self.run(batch.hidden, batch.arguments[index], lambda group, x: None))


def _keep(seen: dict[str, torch.Tensor], group: PlacedGroup, x: torch.Tensor) -> None:
    seen[group.names] = on_disk(x)


def _listen(module: nn.Module, group: PlacedGroup, see: See) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(group, (args[0] if args else kwargs["hidden_states"]).float())

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def runner_of(block: Block, architecture: Architecture) -> BlockRunner:
    """Returns the runner that the architecture asks for.

    Raises:
        ValueError: if the block is not one for the segmented runner.
    """
    return HookedRunner(block) if architecture.runner == "hooked" else SegmentedRunner(block)
