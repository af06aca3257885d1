"""Parameters that a change of basis replaces."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

_ROWS = 4096  # of an embedding or head, at once


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a parameter, keeping its dtype and device."""
    reference = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(reference).contiguous(), requires_grad=False))


def by_rows(table: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Returns a table `[rows, n]` with changed rows, some at a time: float64 takes four times bfloat16's memory."""
    parts = (change(rows).to(table) for rows in table.split(_ROWS))
    first = next(parts)
    changed = first.new_empty(len(table), first.shape[1])
    start = 0
    for part in chain((first,), parts):
        changed[start : start + len(part)] = part
        start += len(part)
    return changed
