"""Runs a decoder as it is and shows what enters its parts; what is tried on the inputs of linears."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from quad_kernels import InputQuantization, InputSplit
from torch import nn

from quad_modifiers.nn.quad_linear import QuadLinear

See = Callable[[torch.Tensor], None]

# The clip ratios of the shipped recipes: a 4-bit grid that clips a little has less error, an 8-bit one is fine enough.
INPUT_GRIDS = {4: InputQuantization(4, clip_ratio=0.86), 8: InputQuantization(8, clip_ratio=1.0)}


def split_of(linear: nn.Module) -> InputSplit:
    """Returns how a linear divides its input; a stock one does not."""
    return linear.split if isinstance(linear, QuadLinear) else InputSplit(linear.in_features)


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
