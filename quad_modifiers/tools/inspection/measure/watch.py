"""Runs a decoder as it is and shows what enters its parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

See = Callable[[torch.Tensor], None]


@contextmanager
def watching(watched: Iterable[tuple[nn.Module, See]]) -> Iterator[None]:
    """Calls `see` with the tokens that enter each module, `[n, width]`, while the block runs."""
    with ExitStack() as stack:
        for module, see in watched:
            stack.enter_context(module.register_forward_pre_hook(_hook(see), with_kwargs=True))
        yield


def _hook(see: See) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        see(x.flatten(0, -2))

    return hook
