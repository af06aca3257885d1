"""Divergences of a model in which something changes from one block on: what comes before is computed once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.tools.inspection.measure.loss import Reference


class LaterBlocks:
    """Runs a model on windows of text from some block on.

    Args:
        decoder: the model, as it is now.
        windows: token ids, `[1, length]` each.
        starts: blocks that runs will begin with; the streams before them are kept.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Sequence[torch.Tensor], starts: Sequence[int]) -> None:
        self.decoder, self.windows = decoder, windows
        self._streams: list[dict[int, Any]] = [{} for _ in windows]  # what a block returns, by its number
        logits = []
        for window, kept in zip(windows, self._streams, strict=True):
            with ExitStack() as stack:
                for last in {start - 1 for start in starts if start}:
                    hook = decoder.blocks[last].module.register_forward_hook(_keep(kept, last))
                    stack.callback(hook.remove)
                logits.append(self._logits(window))
        self.reference = Reference(torch.zeros(len(logits), dtype=torch.float64), logits)

    @torch.no_grad()
    def divergence(self, start: int) -> float:
        """Returns the KL divergence of the model as it is now, mean over tokens and windows, nats.

        `start` is one of `starts`, and nothing has changed before that block.
        """
        total = 0.0
        for index, (window, kept) in enumerate(zip(self.windows, self._streams, strict=True)):
            with self._beginning_with(start, kept):
                total += self.reference.divergence(index, self._logits(window))
        return total / len(self.windows)

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        model = self.decoder.model
        logits: torch.Tensor = model(input_ids=window.to(model.device), use_cache=False).logits
        return logits.flatten(0, -2)

    @contextmanager
    def _beginning_with(self, start: int, kept: dict[int, Any]) -> Iterator[None]:
        """Lets each block before `start` return what the last of them did."""
        skipped = [block.module for block in self.decoder.blocks[:start]]
        for module in skipped:
            module.forward = _returning(kept[start - 1])
        try:
            yield
        finally:
            for module in skipped:
                del module.forward


def _keep(kept: dict[int, Any], number: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, arguments: Any, output: Any) -> None:
        kept[number] = output

    return hook


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *arguments, **named: output
