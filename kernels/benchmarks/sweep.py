"""Times every configuration of the Triton kernel for chosen problems: what `integer_linear.config` is made from.

PYTHONPATH=kernels python -m benchmarks.sweep --shapes 28672x4096 4160x14336 --tokens 1 2048 --output sweep.jsonl

Compiles in parallel, then times graphs of launches that rotate through copies of the weight, cold as in a model.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from quad_kernels import LinearOperands, QuantizedWeight
from quad_kernels.integer_linear.config import SPLITS, TILES, Config, fits

from benchmarks.record import Row, last_level_cache
from benchmarks.shapes import WEIGHT_BITS
from benchmarks.sweeping import add_options, compile_in_parallel, keep, median_seconds, problem_of
from benchmarks.timing import describe

LAYOUTS = ("nibbles", "int8")
_MOST_SPLIT_TOKENS = 512  # beyond, there are enough tiles


def operands(
    tokens: int, outputs: int, inputs: int, rank: int, layout: str, device: torch.device, seed: int = 0
) -> LinearOperands:
    """Operands of random integers, scales and outliers."""
    generator = torch.Generator(device).manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 8, shape, generator=generator, device=device, dtype=torch.int8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

    scale = torch.full((outputs, 1), 0.01, device=device, dtype=torch.bfloat16)
    weight = QuantizedWeight(integers(outputs, inputs), scale, None, inputs, outputs, WEIGHT_BITS)
    return LinearOperands(
        x=integers(tokens, inputs),
        x_scale=torch.full((tokens, 1), 0.01, device=device),
        weight=weight.to_layout(layout),
        outlier=normal(tokens, rank) if rank else None,
        outlier_weight=normal(outputs, rank) if rank else None,
        bias=None,
        out_dtype=torch.bfloat16,
    )


def configurations(launch: Any, device: torch.device, extra: Sequence[Config]) -> list[Config]:
    """Every tile with every split that fits, and more."""
    from quad_kernels.integer_linear.autotune import describe as describe_gpu

    gpu = describe_gpu(device)
    splits = SPLITS if launch.problem.tokens <= _MOST_SPLIT_TOKENS else (1,)
    every = [
        Config(m, n, k, split, warps, stages) for (m, n, k, warps, stages), split in itertools.product(TILES, splits)
    ]
    return [config for config in dict.fromkeys([*every, *extra]) if fits(config, launch.problem, gpu)]


def compile_one(shape: tuple[int, int, int, int], layout: str, config: Config, device: str) -> str | None:
    """Compiles one configuration into Triton's cache; returns what went wrong."""
    from quad_kernels.integer_linear.launch import Launch

    tokens, outputs, inputs, rank = shape
    few = partial(operands, min(tokens, 64), outputs, inputs, rank, layout, torch.device(device))
    return problem_of(lambda: Launch(few())(config), f"{shape} {layout} {tuple(config)}")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One for each configuration; the fastest of a problem is printed."""
    from quad_kernels.integer_linear.launch import Launch

    device = torch.device(options.device)
    problems = [
        ((tokens, *map(int, shape.split("x")), options.rank), layout)
        for tokens, shape, layout in itertools.product(options.tokens, options.shapes, options.layouts)
    ]
    extra = [Config(*map(int, each.split(","))) for each in options.extra]
    work, per_problem = {}, {}
    for shape, layout in problems:
        launch = Launch(operands(*shape, layout, device))
        per_problem[shape, layout] = configurations(launch, device, extra)
        for config in per_problem[shape, layout]:
            # Widths enter a compiled kernel only by what divides them; one launch for few tokens stands for all.
            work.setdefault((shape[2] % config.block_k == 0, shape[3], layout, config), (shape, layout, config))
    del launch
    compile_in_parallel(compile_one, [(*each, options.device) for each in work.values()], options.compile_seconds)
    deadline = time.monotonic() + options.seconds
    for (shape, layout), configs in per_problem.items():
        tokens, outputs, inputs, _ = shape
        weight_bytes = outputs * inputs // (2 if layout == "nibbles" else 1)
        copies = max(2, min(24, -(-2 * last_level_cache(device) // weight_bytes)))
        launches = [Launch(operands(*shape, layout, device, seed)) for seed in range(copies)]
        found = []
        for config in configs:
            if time.monotonic() > deadline:
                print("out of time for measuring", file=sys.stderr)
                return
            try:
                seconds = median_seconds(partial(_launch, launches, config), copies)
            except Exception as error:
                print(f"{shape} {layout} {tuple(config)}: {describe(error)}", file=sys.stderr)
                continue
            found.append((seconds, config))
            yield {"tokens": tokens, "outputs": outputs, "inputs": inputs, "rank": shape[3], "layout": layout,
                   "config": list(config), "seconds": seconds}  # fmt: skip
        for seconds, config in sorted(found)[:4]:
            rate, speed = 2 * tokens * outputs * inputs / seconds / 1e12, weight_bytes / seconds / 1e12
            print(f"{tokens}x{outputs}x{inputs} {layout} {tuple(config)}: ", end="")
            print(f"{seconds * 1e6:.1f} us, {rate:.0f} TOP/s, {speed:.2f} TB/s", flush=True)


def _launch(launches: Sequence[Any], config: Config, copy: int) -> torch.Tensor:
    y: torch.Tensor = launches[copy](config)
    return y


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["28672x4096", "4160x14336"], help="outputs x inputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2048])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["nibbles"])
    parser.add_argument("--extra", nargs="*", default=[], help="further configurations, six numbers with commas each")
    add_options(parser, compile_seconds=90.0, seconds=60.0)
    options = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    return 0 if keep(rows(options), options.output) else 1


if __name__ == "__main__":
    sys.exit(main())
