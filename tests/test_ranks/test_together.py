"""What ranks tell each other, and how one hears of the end of another."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from quad_modifiers.ranks import OrderedSum, is_own_part, joined, part_of, ranks
from quad_modifiers.ranks.message import packed, unpacked

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_a_message_brings_back_what_was_sent(dtype: torch.dtype) -> None:
    value = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": [torch.tensor(1.5), torch.empty(0, 4)],
        "c": ("text", None),
    }
    parts = packed(value)
    found = unpacked([part.clone() for part in parts])
    assert torch.equal(found["a"], value["a"])
    assert found["a"].dtype == dtype
    assert float(found["b"][0]) == 1.5
    assert found["b"][1].shape == (0, 4)
    assert found["c"] == ("text", None)
    assert len(parts[0]) < 600, "tensors are beside the pickle"


def test_alone_nothing_is_sent() -> None:
    with joined() as group:
        assert (group.size, group.is_first, group.on_this_machine) == (1, True, 1)
        assert group.from_rank(0, "x") == "x"
        assert group.each([1, 2, 3], lambda item: item * 2) == [2, 4, 6]
        done: list[int] = []
        turns = group.in_turn([1, 2, 3], lambda item: (done.append(item), item * 2)[1])
        assert (next(turns), done) == (2, [1]), "an item is worked on when it is asked for"
        assert list(turns) == [4, 6]
        assert group.both(lambda: "a", lambda: 1) == ("a", 1)
        group.agree("the weather", "rain")
        assert ranks() is group


def test_what_three_ranks_tell_each_other(in_ranks) -> None:
    def work(rank: int) -> Any:
        with joined() as group:
            return [
                group.from_rank(1, rank),
                group.from_first(lambda: f"made by {rank}"),
                group.to_first(rank * 10),
                group.each(list("abcd"), lambda item: f"{item}{rank}"),
                list(group.in_turn(list("abcd"), lambda item: f"{item}{rank}")),
                group.both(lambda: f"a{rank}", lambda: f"b{rank}"),
                float(group.from_rank(2, torch.tensor([1.5 + rank]))[0]),
            ]

    found = in_ranks(3, work)
    shared = [1, "made by 0", ["a0", "b0", "c1", "d2"], ["a0", "b1", "c2", "d0"], ("a0", "b1"), 3.5]
    assert [each[:2] + each[3:] for each in found] == [shared] * 3
    assert [each[2] for each in found] == [[0, 10, 20], [], []]


def test_a_sum_does_not_depend_on_the_number_of_ranks(in_ranks) -> None:
    """To the last bit: with these numbers any other order gives another sum."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(50, generator=generator, dtype=torch.float64) * 10.0**power for power in range(13)]

    def work(rank: int) -> Any:
        with joined():
            total, part = OrderedSum(), -1
            sums: dict[int, torch.Tensor] = {}
            for number, batch in enumerate(batches):
                part = part_of(number, len(batches))
                if is_own_part(part):
                    sums[part] = sums[part] + batch if part in sums else batch.clone()
            for part, found in sums.items():
                total.add({"sum": found} | ({"last": torch.ones(2)} if part == 7 else {}))
            return {name: each.tolist() for name, each in total.total().items()}

    alone = work(0)
    assert alone["last"] == [1.0, 1.0]
    assert alone["sum"] != sum(reversed(batches)).tolist()
    for count in (2, 3):
        assert in_ranks(count, work) == [alone] * count


def test_ranks_that_differ_are_refused(in_ranks) -> None:
    def work(rank: int) -> Any:
        with joined() as group:
            group.agree("the model", "A" if rank < 2 else "B")

    assert in_ranks(3, work) == ["ValueError: the model of rank 2 is not that of rank 0; give all ranks the same"] * 3


def test_the_others_hear_why_one_has_failed(in_ranks) -> None:
    def work(rank: int) -> Any:
        with joined() as group:
            if rank == 1:
                raise ValueError("the disk is full")
            group.to_first(rank)
            return group.from_rank(1, None)

    found = in_ranks(2, work)
    assert found[1] == "ValueError: the disk is full"
    assert found[0] == "RankLost: another rank of this run has ended (rank 1: ValueError: the disk is full)"


def test_the_others_hear_that_one_was_killed(in_ranks) -> None:
    def work(rank: int) -> Any:
        with joined() as group:
            group.agree("all", "here")
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return group.from_rank(1, None)

    found = in_ranks(2, work)
    assert found[1] == signal.SIGKILL
    assert found[0].startswith("RankLost: another rank of this run has ended (no reason is known")
