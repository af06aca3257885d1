"""Times every configuration of the fused Hadamard kernel: what `hadamard.launch.configuration` is made from.

PYTHONPATH=kernels python -m benchmarks.sweep_hadamard --sizes 14336 4096 --tokens 1 2048 --output sweep.jsonl

Compiles in parallel, compares every configuration with the reference, then times graphs of launches that rotate through
copies of the input.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from quad_kernels import InputQuantization, InputSplit, quantize_activations
from quad_kernels.hadamard import plan_hadamard
from quad_kernels.hadamard.launch import Configuration, hadamard_quantize
from quad_kernels.hadamard.tiling import tiling

from benchmarks.record import Row, last_level_cache
from benchmarks.sweeping import add_options, compile_in_parallel, keep, median_seconds, problem_of
from benchmarks.timing import describe

_QUANTIZATION = InputQuantization(4, 0.9)
_MOST_MULTIPROCESSORS = 132  # beyond so many tokens programs may take turns


def split_of(size: int) -> InputSplit:
    """The split of an o_proj up to 4096 coordinates, of a down_proj beyond."""
    return InputSplit(size, *((8, 128) if size <= 4096 else (64, 0)), keep_width=True, hadamard=True)


def configurations(size: int, tokens: int) -> list[Configuration]:
    """Every factorisation, with one token a program and with programs that take turns."""
    found: dict[object, Configuration] = {}
    for rows, right in itertools.product((64, 128), (32, 64)):
        tiles = tiling(plan_hadamard(size), rows, right)
        if tiles is None:
            continue
        if tiles.tiles > 1:
            choices = [Configuration(rows, right, stages=stages) for stages in (1, 2, 3)]
        else:
            choices = [Configuration(rows, right)]
        for programs in (1, 2, 3, 4, 6, 8) if tokens > _MOST_MULTIPROCESSORS and tiles.tiles == 1 else ():
            if 16384 <= programs * tiles.elements <= 32768:
                config = Configuration(rows, right, programs=programs, stages=2, joined=64)
                choices += [config, config._replace(stages=1), config._replace(joined=256)]
                if programs * tiles.elements == 32768:
                    choices += [config._replace(registers=128), config._replace(stages=1, registers=128)]
        for config in choices:
            found.setdefault((tiles, config[2:]), config)
    return list(found.values())


def inputs(size: int, tokens: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Random activations, `[tokens, size]`, bfloat16."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, size, generator=generator, device=device).to(torch.bfloat16)


def compile_one(size: int, config: Configuration, device: str) -> str | None:
    """Compiles one configuration into Triton's cache; returns what went wrong."""
    few = partial(inputs, size, 3, torch.device(device))
    return problem_of(
        lambda: hadamard_quantize(few(), _QUANTIZATION, split_of(size), config), f"{size} {tuple(config)}"
    )


def difference(x: torch.Tensor, config: Configuration, wanted: Sequence[torch.Tensor | None]) -> str | None:
    """What differs from the reference by more than sums beside a rounding boundary do."""
    outlier, integers, scale = hadamard_quantize(x, _QUANTIZATION, split_of(x.shape[1]), config)
    if outlier is None or wanted[0] is None or not torch.equal(outlier, wanted[0]):
        return "outliers"
    assert wanted[1] is not None
    assert wanted[2] is not None
    if not torch.allclose(scale, wanted[2], rtol=2 * torch.finfo(x.dtype).eps, atol=0):
        return "scales"
    steps = (integers.int() - wanted[1].int()).abs()
    share = float(steps.count_nonzero()) / steps.numel()
    return f"integers: {int(steps.max())}, {share:.2%}" if int(steps.max()) > 1 or share > 0.01 else None


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One for each configuration; the fastest of a problem are printed."""
    device = torch.device(options.device)
    problems = {each: configurations(*each) for each in itertools.product(options.sizes, options.tokens)}
    work = {(size, config, options.device): None for (size, _), configs in problems.items() for config in configs}
    compile_in_parallel(compile_one, list(work), options.compile_seconds)
    deadline = time.monotonic() + options.seconds
    for (size, tokens), configs in problems.items():
        split = split_of(size)
        copies = max(2, min(8, -(-2 * last_level_cache(device) // (3 * size * tokens))))
        x = [inputs(size, tokens, device, seed) for seed in range(copies)]
        kept: list[object] = [None] * copies  # outputs that stay in memory are not written over in the caches
        reference = quantize_activations(x[0], _QUANTIZATION, split, backend="reference")
        wanted = (reference.outlier, reference.integers, reference.scale)
        found = []
        for config in configs:
            if time.monotonic() > deadline:
                print("out of time for measuring", file=sys.stderr)
                break

            def call(i: int, config: Configuration = config) -> None:
                kept[i] = hadamard_quantize(x[i], _QUANTIZATION, split, config)  # noqa: B023

            try:
                if wrong := difference(x[0], config, wanted):
                    print(f"{size} {tokens} {tuple(config)} differs: {wrong}", file=sys.stderr)
                    continue
                seconds = median_seconds(call, copies)
            except Exception as error:
                print(f"{size} {tokens} {tuple(config)}: {describe(error)}", file=sys.stderr)
                continue
            found.append((seconds, config))
            yield {"size": size, "tokens": tokens, "config": config._asdict(), "seconds": seconds}
        for seconds, config in sorted(found)[:4]:
            speed = 3 * size * tokens / seconds / 1e12
            print(f"{tokens}x{size} {config}: {seconds * 1e6:.2f} us, {speed:.2f} TB/s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep_hadamard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[14336, 4096, 8192, 18944])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 2048])
    add_options(parser, compile_seconds=25.0, seconds=15.0)
    options = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    return 0 if keep(rows(options), options.output) else 1


if __name__ == "__main__":
    sys.exit(main())
