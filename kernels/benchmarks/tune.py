"""Tunes the Triton kernel for the layers that are measured: compiles the candidates in parallel, then measures them.

python -m benchmarks.tune --models llama-3-8b --tokens 1 16 2048
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from quad_kernels import LinearOperands, QuantizedWeight
from quad_kernels.integer_linear.config import Config, Problem, candidates, token_bucket
from quad_kernels.packing import nibble_bytes

from benchmarks.shapes import MODELS, SQUARE, WEIGHT_BITS, Linear, cases
from benchmarks.sweeping import compile_in_parallel
from benchmarks.timing import describe


@dataclass(frozen=True)
class Shape:
    """A problem of the tuner; `tokens` is one of the numbers that it distinguishes."""

    tokens: int
    outputs: int
    inputs: int
    rank: int

    def problem(self, dtype: torch.dtype) -> Problem:
        """As the kernel sees it."""
        wide = dtype == torch.float32
        return Problem(self.tokens, self.outputs, self.inputs, self.inputs, self.rank, True, False, False, wide)


def tune_shape(linear: Linear, tokens: int) -> Shape:
    """The problem of a linear."""
    return Shape(token_bucket(tokens), linear.quad_outputs, linear.split.residual_width, linear.split.rank)


def shapes(models: Sequence[str], tokens: Sequence[int]) -> list[Shape]:
    """The distinct problems of the models' linears; those of one number of tokens together, in the order given."""
    linears = [linear for model in models for case in cases(model) for linear in case.linears]
    return list(dict.fromkeys(tune_shape(linear, count) for count in tokens for linear in linears))


def compile_one(shape: Shape, config: Config, device: str, dtype: torch.dtype) -> str | None:
    """Compiles a candidate into Triton's cache and runs it once; returns what went wrong."""
    from quad_kernels.integer_linear.launch import Launch

    where = torch.device(device)
    packed = torch.zeros(shape.outputs, nibble_bytes(shape.inputs), dtype=torch.uint8, device=where)
    scale = torch.ones(shape.outputs, 1, dtype=dtype, device=where)
    operands = LinearOperands(
        x=torch.zeros(shape.tokens, shape.inputs, dtype=torch.int8, device=where),
        x_scale=torch.ones(shape.tokens, 1, device=where),
        weight=QuantizedWeight(packed, scale, None, shape.inputs, shape.outputs, WEIGHT_BITS, "nibbles"),
        outlier=torch.zeros(shape.tokens, shape.rank, dtype=dtype, device=where),
        outlier_weight=torch.zeros(shape.outputs, shape.rank, dtype=dtype, device=where),
        bias=None,
        out_dtype=dtype,
    )
    launch = Launch(operands)
    try:
        launch(config)
        if where.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit is no reason to stop; the tuner leaves it out as well
        return f"{shape}, {config}: {describe(error)}"
    return None


def candidates_to_compile(wanted: Sequence[Shape], device: str, dtype: torch.dtype) -> list[tuple[Shape, Config]]:
    """The candidates of all problems, each compiled kernel once: widths enter it only by what divides them."""
    from quad_kernels.integer_linear import autotune

    where = autotune.describe(torch.device(device))
    kernels: dict[tuple[object, ...], tuple[Shape, Config]] = {}
    for shape in wanted:
        for config in candidates(shape.problem(dtype), where)[: autotune.MOST_CONFIGS]:
            key = (config, shape.inputs % config.block_k == 0, shape.inputs % 16, shape.outputs % 16, shape.rank % 16)
            kernels.setdefault(key, (shape, config))
    return list(kernels.values())


def compile_ahead(wanted: Sequence[Shape], device: str, dtype: torch.dtype, jobs: int, seconds: float) -> None:
    """Compiles the candidates of all problems in `jobs` processes, for at most about `seconds`."""
    work = [(shape, config, device, dtype) for shape, config in candidates_to_compile(wanted, device, dtype)]
    compile_in_parallel(compile_one, work, seconds, jobs)


def tune_all(wanted: Sequence[Shape], device: str, dtype: torch.dtype, seconds: float) -> Iterator[str]:
    """Measures problem after problem for at most about `seconds`; a line for each."""
    from quad_kernels.integer_linear.tune import tune

    start = time.monotonic()
    for number, shape in enumerate(wanted):
        left = seconds - (time.monotonic() - start)
        if left <= 0:
            yield f"out of time for measuring: {number} of {len(wanted)} problems"
            return
        try:
            found = tune(
                [(shape.tokens, shape.outputs, shape.inputs)],
                rank=shape.rank,
                weight_bits=WEIGHT_BITS,
                dtype=dtype,
                device=device,
                seconds=min(left, 20.0),
            )
        except Exception as error:  # the others are tuned all the same
            yield f"{shape}: {describe(error)}"
            continue
        for problem, config in found.items():
            yield f"{tuple(problem)}: {tuple(config)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["llama-3-8b"], choices=[*MODELS, SQUARE])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 2048, 8192])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--compile-seconds", type=float, default=90.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="for measuring")
    parser.add_argument("--copy-to", type=Path, help="folder for a copy of the file of measurements")
    options = parser.parse_args(argv)
    from quad_kernels.integer_linear.autotune import cache_file

    dtype, wanted = getattr(torch, options.dtype), shapes(options.models, options.tokens)
    if torch.device(options.device).type == "cpu":
        _time_without_a_gpu()
    if options.jobs > 0:
        compile_ahead(wanted, options.device, dtype, options.jobs, options.compile_seconds)
    for line in tune_all(wanted, options.device, dtype, options.seconds):
        print(line, flush=True)
    file = cache_file(torch.device(options.device))
    if not file.exists():
        print("nothing was tuned", file=sys.stderr)
        return 1
    if options.copy_to is not None:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, options.copy_to)
    return 0


def _time_without_a_gpu() -> None:
    """For a trial in Triton's interpreter, whose times mean nothing: Triton's timer needs a GPU."""
    import triton.testing
    from quad_kernels.integer_linear import autotune

    def run_once(call, *_, **__):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    triton.testing.do_bench = run_once
    autotune.MOST_CONFIGS = 2


if __name__ == "__main__":
    sys.exit(main())
