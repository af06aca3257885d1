"""The two phases of a run that trains integers: first they move, then they stay and the rest is trained.

Rounding makes the loss a function of steps: near the end of a run, weights that lie between two integers go back and
forth. So their learning rate falls to zero by the last phase, where they are whole numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from quad_peft.integer_change import fix_integers, integer_changes


class FixIntegers(TrainerCallback):
    """Fixes the integers at the first step of the last phase.

    Args:
        share: share of the steps that the last phase has.
        freeze: False leaves them among the trained parameters, with a learning rate of zero: processes that train
            together wait for the gradient of each.
    """

    def __init__(self, share: float, freeze: bool = True) -> None:
        self._share, self._freeze = share, freeze

    def on_step_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Looks whether the last phase has begun."""
        if state.global_step < first_fixed_step(state.max_steps, self._share):
            return
        model = context["model"]
        if any(change.requires_grad for change in integer_changes(model)):
            fix_integers(model)
            for change in integer_changes(model):
                change.requires_grad_(not self._freeze)


def first_fixed_step(steps: int, share: float) -> int:
    """Returns the number of the first step of the last phase; `steps` if there is none."""
    return min(steps, math.ceil(round(steps * (1 - share), 6)))


def integers_schedule(warmup: int, fixed_from: int) -> Callable[[int], float]:
    """Returns the factor of the integers' learning rate by step: it rises, and falls to zero by a cosine."""

    def factor(step: int) -> float:
        if step >= fixed_from:
            return 0.0
        if step < warmup:
            return step / max(1, warmup)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, fixed_from - warmup))

    return factor


def usual_schedule(warmup: int, steps: int) -> Callable[[int], float]:
    """Returns the factor of all other learning rates by step, a cosine over the whole run."""
    return integers_schedule(warmup, steps)


def with_two_phases(
    optimizer: torch.optim.Optimizer, warmup: int, steps: int, fixed_from: int, is_integers: list[bool]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a schedule for an optimizer, `is_integers` telling which of its groups hold changes of integers."""
    both = usual_schedule(warmup, steps), integers_schedule(warmup, fixed_from)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [both[each] for each in is_integers])
