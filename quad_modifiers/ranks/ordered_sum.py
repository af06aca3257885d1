"""Sums over calibration batches in an order that does not depend on how many ranks share the batches."""

import torch

from quad_modifiers.ranks.together import ranks

_PARTS = 8  # into which the batches of a run are divided, for up to as many ranks


def part_of(number: int, count: int) -> int:
    """Returns the part that batch `number` of `count` is in."""
    return number * _parts() // count


def is_own_part(part: int) -> bool:
    """Returns whether this rank computes the batches of a part."""
    return ranks().share(part, _parts())


def _parts() -> int:
    return max(_PARTS, ranks().size)


class OrderedSum:
    """Adds up tensors by name: what each part of the batches came to, the parts in order.

    A rank adds what its own parts came to; `total` is that of all ranks. A name may be missing in some parts.
    """

    def __init__(self) -> None:
        self._total: dict[str, torch.Tensor] = {}
        self._held: list[dict[str, torch.Tensor]] = []  # what the first rank will add, once it gets it

    def add(self, part: dict[str, torch.Tensor]) -> None:
        """Adds what a part came to; the tensors may be changed afterwards by their sum."""
        if ranks().is_first:
            self._add(part)
        else:
            self._held.append({name: tensor.cpu() for name, tensor in part.items()})

    def total(self) -> dict[str, torch.Tensor]:
        """Returns the sums over all ranks, on every rank; on the CPU, but for those that the first rank adds up."""
        group = ranks()
        if group.size == 1:
            return self._total
        if group.is_first:
            for source in range(1, group.size):
                for _ in range(group.received(source)):
                    self._add(group.received(source))
        else:
            group.sent(len(self._held), 0)
            while self._held:
                group.sent(self._held.pop(0), 0)
        total: dict[str, torch.Tensor] = group.from_rank(0, self._total)
        return total

    def _add(self, part: dict[str, torch.Tensor]) -> None:
        for name, tensor in part.items():
            if name in self._total:
                self._total[name] += tensor.to(self._total[name].device)
            else:
                self._total[name] = tensor
