"""Processes of one run, forked, with what torchrun would tell them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_SECONDS = 300


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Lets this process have as many threads as each of `in_ranks`, which its sums depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Returns `in_ranks(count, work)`: what `work(rank)` returns or raises in each of `count` processes."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("needs fork")

    def run(count: int, work: Callable[[int], Any]) -> list[Any]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        children = [_start(rank, count, port, tmp_path / f"rank-{rank}", work) for rank in range(count)]
        ended = [os.waitpid(child, 0)[1] for child in children]
        return [
            pickle.loads((tmp_path / f"rank-{rank}").read_bytes()) if code == 0 else signal.Signals(code)
            for rank, code in enumerate(ended)
        ]

    return run


def _start(rank: int, count: int, port: int, result: Path, work: Callable[[int], Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(_SECONDS)  # one that waits for ever is a failure, and no hang of the tests
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            found = work(rank)
        except BaseException as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        result.write_bytes(pickle.dumps(found))
    finally:
        os._exit(0)
