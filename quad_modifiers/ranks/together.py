"""The ranks of a run, and what they tell each other."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
from torch import distributed

from quad_modifiers.ranks.message import packed, unpacked
from quad_modifiers.torchrun import number_here, ranks_here, ranks_started

Item = TypeVar("Item")
Result = TypeVar("Result")
First = TypeVar("First")
Second = TypeVar("Second")

_FAILED = "failed"
_RUNS = count()  # of this process: each finds the others of its own in the store
# A rank that ends closes its connections, which the others see at once; this is for one that hangs.
_TIMEOUT = timedelta(hours=6)
_AT_ONCE = 2**28  # bytes


class RankLost(RuntimeError):
    """Another rank of the run has ended."""


class Ranks:
    """The ranks of a run, seen from one of them. What asks or tells others is called by all, unless it says else.

    Args:
        rank: number of this one.
        size: how many there are.
        group: connects them; None for a single one.
        store: says why one has failed.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._store = group, store

    @property
    def on_this_machine(self) -> int:
        """How many of them share the memory of this one."""
        return ranks_here() if self.size > 1 else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes for all."""
        return self.rank == 0

    def share(self, number: int, count: int) -> bool:
        """Returns whether the item `number` of `count` is this rank's; shares are contiguous."""
        return number * self.size // count == self.rank

    def from_rank(self, source: int, value: Any) -> Any:
        """Returns the `value` that rank `source` has. Its tensors arrive on the CPU."""
        if self.size == 1:
            return value
        ours = self.rank == source
        return self._exchange(value if ours else None, ours, lambda part: self._group.broadcast([part], _root(source)))

    def from_first(self, make: Callable[[], Result]) -> Result:
        """Returns what `make` returns on the first rank, which alone calls it."""
        found: Result = self.from_rank(0, make() if self.is_first else None)
        return found

    def to_first(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in order, on the first one; on the others an empty list."""
        if not self.is_first:
            self.sent(value, 0)
            return []
        return [value] + [self.received(source) for source in range(1, self.size)]

    def received(self, source: int) -> Any:
        """Returns what rank `source` sends to this one with `sent`; only the two call."""
        return self._exchange(None, False, lambda part: self._group.recv([part], source, 0))

    def sent(self, value: Any, target: int) -> None:
        """Sends a value to rank `target`; only the two call."""
        self._exchange(value, True, lambda part: self._group.send([part], target, 0))

    def each(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """Returns what `work` makes of every item, each done by one rank. Tensors of other ranks are on the CPU."""
        own = [work(item) for number, item in enumerate(items) if self.share(number, len(items))]
        return [result for source in range(self.size) for result in self.from_rank(source, own)]

    def in_turn(self, items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
        """Yields what `each` returns, working on one item for each rank at a time; all ask for all of it."""
        for start in range(0, len(items), self.size):
            yield from self.each(items[start : start + self.size], work)

    def both(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        """Returns what two works make, each done by one rank, one after the other by a single one; as `each`."""
        works: tuple[Callable[[], Any], ...] = (first, second)
        one, other = self.each(works, lambda work: work())
        return one, other

    def agree(self, what: str, value: Any) -> None:
        """Checks that all ranks have the same value.

        Raises:
            ValueError: naming what differs.
        """
        differing = [str(rank) for rank, other in enumerate(self.to_first(value)) if other != value]
        differing = self.from_rank(0, differing)
        if differing:
            raise ValueError(f"{what} of rank {', '.join(differing)} is not that of rank 0; give all ranks the same")

    def failed(self, error: BaseException) -> None:
        """Tells the others why this one ends."""
        if self._store is not None and not isinstance(error, RankLost):
            try:
                self._store.set(_FAILED, f"rank {self.rank}: {type(error).__name__}: {error}")
            except (RuntimeError, OSError):
                return  # the store has gone with its process: they will find out

    def _exchange(self, value: Any, is_given: bool, transfer: Callable[[torch.Tensor], Any]) -> Any:
        """Gives a value or returns the one that is given, by `transfer`, which moves a tensor of bytes."""
        try:
            return self._exchanged(value, is_given, transfer)
        except RuntimeError as error:
            raise RankLost(self._reason()) from error

    @staticmethod
    def _exchanged(value: Any, is_given: bool, transfer: Callable[[torch.Tensor], Any]) -> Any:
        parts = packed(value) if is_given else []
        sizes = torch.tensor([len(part) for part in parts])
        number = torch.tensor([len(parts)])
        transfer(number).wait()
        if not is_given:
            sizes = torch.empty(int(number), dtype=torch.int64)
        transfer(sizes).wait()
        if not is_given:
            parts = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
        for part in filter(len, parts):
            for piece in part.split(_AT_ONCE):
                transfer(piece).wait()
        return value if is_given else unpacked(parts)

    def _reason(self) -> str:
        try:
            known = self._store is not None and self._store.check([_FAILED])
            reason = self._store.get(_FAILED).decode() if known else "no reason is known; it may have been killed"
        except RuntimeError:
            reason = "no reason is known; its machine may have gone"
        return f"another rank of this run has ended ({reason})"


_ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("_current", default=_ALONE)


def ranks() -> Ranks:
    """Returns the ranks of the run that goes on; outside of `joined` a single one."""
    return _current.get()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for what is done inside; without torchrun there is one.

    Raises:
        RuntimeError: if torch.distributed has been set up in this process already.
    """
    if ranks_started() == 1:
        yield _ALONE
        return
    if distributed.is_initialized():
        raise RuntimeError(
            "torch.distributed is set up in this process already; leave init_process_group (init_dist) out: the ranks "
            "that torchrun starts find each other"
        )
    met, rank, size = _met(os.getpid())
    store = distributed.PrefixStore(f"quad_modifiers-{next(_RUNS)}", met)
    store.set_timeout(timedelta(minutes=10))
    if torch.cuda.is_available():
        torch.cuda.set_device(number_here())
    group = distributed.ProcessGroupGloo(distributed.PrefixStore("gloo", store), rank, size, _TIMEOUT)
    found = Ranks(rank, size, group, store)
    token = _current.set(found)
    try:
        yield found
    except BaseException as error:
        found.failed(error)
        group.abort()  # whoever waits for this one need not wait for the end of its process
        raise
    finally:
        _current.reset(token)


@cache
def _met(process: int) -> tuple[Any, int, int]:
    """The store in which the ranks find each other, the number of this one, and how many there are.

    Once in a process: without torchrun's agent the first rank holds the store, and a second one would have to wait for
    the end of the first, which the others do not see.
    """
    found: tuple[Any, int, int] = next(distributed.rendezvous("env://", timeout=timedelta(minutes=10)))
    return found


def _root(source: int) -> Any:
    options = distributed.BroadcastOptions()
    options.rootRank = source
    options.rootTensor = 0
    return options
