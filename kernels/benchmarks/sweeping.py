"""What every sweep over configurations does: compile in parallel, time a graph of launches, keep a row of each."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Row
from benchmarks.timing import CudaGraph, Method, describe

_SAMPLES = 5


def compile_in_parallel(
    compile_one: Callable[..., str | None], work: Sequence[tuple[Any, ...]], seconds: float, jobs: int | None = None
) -> None:
    """Compiles into Triton's cache, in processes of their own, for at most about `seconds`.

    Args:
        compile_one: a function of a module; called with the parts of a piece of work, returns what went wrong.
        work: what to compile.
        seconds: after which nothing further is begun.
        jobs: processes; as many as processors by default.
    """
    start, done = time.monotonic(), 0
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, *each) for each in work]
        try:
            for future in as_completed(futures, timeout=seconds):
                done += 1
                if problem := future.result():
                    print(problem, file=sys.stderr)
        except TimeoutError:
            print("out of time for compiling", file=sys.stderr)
        pool.shutdown(wait=True, cancel_futures=True)
    print(f"compiled {done} of {len(work)} in {time.monotonic() - start:.0f} s", file=sys.stderr)


def problem_of(launch: Callable[[], Any], name: str) -> str | None:
    """Launches on the GPU once; returns what went wrong."""
    try:
        launch()
        torch.cuda.synchronize()
    except Exception as error:  # of one configuration; the others are compiled all the same
        return f"{name}: {describe(error)}"
    return None


def median_seconds(call: Callable[[int], Any], copies: int) -> float:
    """Seconds of a call as it is replayed in a graph, median over samples; `call` is given the number of a copy."""
    graph = CudaGraph(Method("", call, copies))
    return sorted(graph.sample() for _ in range(_SAMPLES))[_SAMPLES // 2]


def add_options(parser: argparse.ArgumentParser, compile_seconds: float, seconds: float) -> None:
    """Those that all sweeps have."""
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--compile-seconds", type=float, default=compile_seconds)
    parser.add_argument("--seconds", type=float, default=seconds, help="for measuring")
    parser.add_argument("--output", type=Path, help="a file of JSON lines")


def keep(rows: Iterable[Row], output: Path | None) -> list[Row]:
    """Returns the rows; writes those that there are, also of a sweep that is broken off."""
    kept: list[Row] = []
    try:
        kept.extend(rows)
    finally:
        if output is not None:
            output.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept
