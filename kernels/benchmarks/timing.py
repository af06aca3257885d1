"""Interleaved timing: every round samples every method of a row, in random order: all of them see the same machine."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

_CPU_SAMPLE_SECONDS = 2e-2  # consecutive calls, as in a model: the first one after another method is slow
_GPU_SAMPLE_SECONDS = 4e-3
_GPU_LEAST_CALLS = 2
_GPU_MOST_CALLS = 64

Mode = Literal["wall clock", "cuda graph", "cuda eager"]


@dataclass(frozen=True)
class Method:
    """Something to time.

    Attributes:
        name: name in the table.
        call: runs it once on one of the copies of its weights, given by number.
        copies: number of copies of its weights. Calls rotate through them, so that weights come from memory as in a
            model, where the other layers have displaced them from the caches.
    """

    name: str
    call: Callable[[int], Any]
    copies: int


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the samples."""

    median: float
    low: float
    high: float
    samples: int
    mode: Mode


class Sampler(Protocol):
    """Times one method."""

    mode: Mode

    def sample(self) -> float:
        """Runs some calls; returns seconds per call."""


class WallClock:
    """Consecutive calls on the CPU."""

    mode: Mode = "wall clock"

    def __init__(self, method: Method) -> None:
        self._method = method
        self._order = random.Random(method.name)
        self._calls = 1
        self.sample()
        self._calls = max(1, round(_CPU_SAMPLE_SECONDS / self.sample()))

    def sample(self) -> float:
        """See `Sampler`."""
        call, copies = self._method.call, self._method.copies
        first = self._order.randrange(copies)
        start = time.perf_counter()
        for i in range(first, first + self._calls):
            call(i % copies)
        return (time.perf_counter() - start) / self._calls


class CudaEager:
    """Consecutive calls from Python: what the host takes to launch kernels is part of the time where it is longer."""

    mode: Mode = "cuda eager"

    def __init__(self, method: Method, cuda: Any = torch.cuda) -> None:
        self._method, self._cuda = method, cuda
        self._calls = _GPU_LEAST_CALLS
        self.sample()
        self._calls = _calls(method, self.sample())

    def sample(self) -> float:
        """See `Sampler`."""
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        start.record()
        for i in range(self._calls):
            self._method.call(i % self._method.copies)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls


class CudaGraph:
    """Replays of one graph of consecutive calls: the time on the GPU, without the host's launches."""

    mode: Mode = "cuda graph"

    def __init__(self, method: Method, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._calls = _calls(method, CudaEager(method, cuda).sample())
        self._graph = cuda.CUDAGraph()
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for i in range(min(self._calls, method.copies)):  # allocations and compilation, which a capture refuses
                method.call(i)
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        with cuda.graph(self._graph):
            for i in range(self._calls):
                method.call(i % method.copies)
        self.sample()

    def sample(self) -> float:
        """See `Sampler`."""
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._calls


def _calls(method: Method, seconds: float) -> int:
    """Calls per sample: enough to hide the edges and to visit every copy, unless that takes too long."""
    wanted = max(method.copies, round(_GPU_SAMPLE_SECONDS / max(seconds, 1e-9)))
    longest = max(_GPU_LEAST_CALLS, round(5 * _GPU_SAMPLE_SECONDS / max(seconds, 1e-9)))
    return max(_GPU_LEAST_CALLS, min(wanted, longest, _GPU_MOST_CALLS))


def measure(
    methods: Sequence[Method],
    make: Callable[[Method], Sampler],
    repeats: int,
    seconds: float = 1e9,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times methods side by side.

    Args:
        methods: with distinct names.
        make: the sampler for a method; it warms up.
        repeats: samples of each method.
        seconds: no further round of samples is started after this time; there are at least three.

    Returns:
        Timings by name, and for methods that failed the reason by name.
    """
    samplers: dict[str, Sampler] = {}
    failed: dict[str, str] = {}
    for method in methods:
        try:
            samplers[method.name] = make(method)
        except Exception as error:  # a peer that cannot run must not cost the others their row
            failed[method.name] = describe(error)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    order = random.Random(0)  # a method must not always follow the same other one, whose data it finds in the caches
    start = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= 3 and time.perf_counter() - start > seconds:
            break
        for name in order.sample(list(samplers), len(samplers)):
            times[name].append(samplers[name].sample())
    return {name: _summary(values, samplers[name].mode) for name, values in times.items()}, failed


def describe(error: Exception) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _summary(values: list[float], mode: Mode) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values), mode)
