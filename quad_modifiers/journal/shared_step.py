"""A step of a run of several ranks: the first one keeps it, and all go on from what it kept."""

from typing import Any

import torch

from quad_modifiers.journal.step import Step, Tensors
from quad_modifiers.ranks import ranks


class SharedStep(Step):
    """Has the methods of `Step`, which all ranks call together.

    Args:
        own: the step of the first rank; None on the others.
    """

    def __init__(self, own: Step | None) -> None:
        self._own = own
        self.done, self._keeps = ranks().from_rank(0, None if own is None else (own.done, own.keeps))

    @property
    def keeps(self) -> bool:
        """See `Step.keeps`; the same on every rank."""
        return self._keeps

    def result(self, index: int) -> tuple[dict[str, torch.Tensor], Any]:
        """See `Step.result`."""
        found: tuple[dict[str, torch.Tensor], Any]
        found = ranks().from_rank(0, None if self._own is None else self._own.result(index))
        return found

    def carried(self) -> dict[str, torch.Tensor]:
        """See `Step.carried`; what all ranks left, for each may have another share of it than before."""
        found: dict[str, torch.Tensor] = ranks().from_rank(0, None if self._own is None else self._own.carried())
        return found

    def finish(self, tensors: Tensors, facts: Any = None, carried: Tensors | None = None) -> None:
        """See `Step.finish`. The result is the same on every rank; what is carried may be each one's share."""
        if not self._keeps:
            return
        shares = ranks().to_first(dict(carried or {}))
        if self._own is not None:
            whole: dict[str, torch.Tensor] = {}
            for share in reversed(shares):
                whole |= share
            self._own.finish(tensors, facts, whole)
