"""Times every configuration of the kernel for few tokens, beside the kernel with tensor cores in its own choice.

PYTHONPATH=kernels python -m benchmarks.sweep_few --shapes 28672x4096 4160x14336 --tokens 1 4 --output few.jsonl

Each configuration is checked first. Then graphs of launches rotate through copies of the weight, cold as in a model;
with --quantize, the quantizer of the activations runs before each launch, as in a layer.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from quad_kernels import InputQuantization, InputSplit, LinearOperands
from quad_kernels.early_launch import VARIABLE

from benchmarks.record import Row, last_level_cache
from benchmarks.sweep import operands
from benchmarks.sweeping import add_options, compile_in_parallel, keep, median_seconds, problem_of
from benchmarks.timing import describe

SHAPES = ["28672x4096", "4160x14336", "6144x4096", "4160x4096", "1024x4096", "14336x4096", "4096x4096"]
_MOST_COPIES = 48

Shape = tuple[int, int, int, int]  # tokens, outputs, inputs, rank


def configurations(tokens: int, inputs: int, early: Sequence[bool]) -> list[Any]:
    """What fits, of the candidates."""
    from quad_kernels.integer_linear.few_tokens import CANDIDATES, fits

    return [each._replace(early=e) for each in CANDIDATES for e in early if fits(each, tokens, inputs)]


def compile_one(shape: Shape, config: Any, device: str) -> str | None:
    """Compiles one configuration into Triton's cache; returns what went wrong."""
    from quad_kernels.integer_linear.launch import Launch

    tokens, _, inputs, rank = shape
    few = partial(operands, tokens, 256, inputs, rank, "nibbles", torch.device(device))
    return problem_of(lambda: Launch(few())(config), f"{shape} {tuple(config)}")


def compiled_once(shapes: Sequence[Shape], early: Sequence[bool]) -> list[tuple[Shape, Any]]:
    """Kernels that differ: widths enter them only by what divides them and whether one step is enough."""
    work: dict[tuple[object, ...], tuple[Shape, Any]] = {}
    for shape in shapes:
        tokens, _, inputs, rank = shape
        for config in configurations(tokens, inputs, early):
            steps = -(-inputs // (8 * config.block_w))
            even = inputs // 8 % (config.block_w * (config.depth if steps > config.depth else 1)) == 0
            key = (tokens, rank, config, min(config.depth, steps), steps > config.depth, even)
            work.setdefault(key, (shape, config))
    return list(work.values())


def difference(launch: Any, exact: Any, config: Any, chosen: Any) -> str | None:
    """How the results of a configuration differ from the other kernel's; `exact` has outliers of zero."""
    wanted, got = exact(chosen).float(), exact(config).float()
    if not torch.equal(wanted, got):
        return f"integers: {int((wanted != got).sum())} of {wanted.numel()} results differ"
    wanted, got = launch(chosen).float(), launch(config).float()
    bound = 2.0**-8 * wanted.abs() + 1e-5 * wanted.abs().max()
    if not bool(((wanted - got).abs() <= 2 * bound).all()):
        return f"results differ by up to {float((wanted - got).abs().max()):.3g} of {float(wanted.abs().max()):.3g}"
    return None


def layer(each: LinearOperands, launch_of: Any) -> Callable[[Any], torch.Tensor]:
    """Quantizes activations of the right width, then runs a configuration on the result."""
    from quad_kernels.quantize_activations.kernel import quantize_activations

    rank = 0 if each.outlier is None else each.outlier.shape[1]
    split = InputSplit(each.x.shape[1] + rank, rank)
    x = torch.randn(each.x.shape[0], split.width, device=each.x.device, dtype=torch.bfloat16)

    def call(config: Any) -> torch.Tensor:
        outlier, integers, scale = quantize_activations(x, InputQuantization(4, 0.9), split, None, False)
        return launch_of(replace(each, x=integers, x_scale=scale, outlier=outlier))(config)

    return call


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One for each configuration, None for the other kernel; the four fastest of a problem are printed."""
    from quad_kernels.integer_linear.autotune import choose_config
    from quad_kernels.integer_linear.launch import Launch

    device = torch.device(options.device)
    early = (False, True) if options.early else (False,)
    sizes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    problems = [(tokens, *size, options.rank) for size, tokens in itertools.product(sizes, options.tokens)]
    work = [(*each, options.device) for each in compiled_once(problems, early)]
    compile_in_parallel(compile_one, work, options.compile_seconds)
    deadline = time.monotonic() + options.seconds
    for outputs, inputs in sizes:
        weight_bytes = outputs * inputs // 2
        copies = max(2, min(_MOST_COPIES, -(-2 * last_level_cache(device) // weight_bytes)))
        widest = [
            operands(max(options.tokens), outputs, inputs, options.rank, "nibbles", device, i) for i in range(copies)
        ]
        for tokens in options.tokens:
            name = f"{tokens}x{outputs}x{inputs}"
            some = [_first_tokens(each, tokens) for each in widest]
            launch = Launch(some[0])
            exact = launch
            if some[0].outlier is not None:
                exact = Launch(replace(some[0], outlier=torch.zeros_like(some[0].outlier)))
            calls = [layer(each, Launch) for each in some] if options.quantize else [Launch(each) for each in some]
            chosen = choose_config(launch.problem, device, launch)
            found = []
            for config in [chosen, *configurations(tokens, inputs, early)]:
                if time.monotonic() > deadline:
                    print("out of time for measuring", file=sys.stderr)
                    return
                try:
                    if problem := difference(launch, exact, config, chosen):
                        print(f"WRONG {name} {tuple(config)}: {problem}", file=sys.stderr)
                    seconds = median_seconds(partial(_launch, calls, config), copies)
                except Exception as error:
                    print(f"{name} {tuple(config)}: {describe(error)}", file=sys.stderr)
                    continue
                few = config is not chosen
                found.append((seconds, few, tuple(config)))
                yield {"tokens": tokens, "outputs": outputs, "inputs": inputs, "rank": options.rank, "few": few,
                       "quantize": options.quantize, "config": list(config), "seconds": seconds,
                       "wrong": problem}  # fmt: skip
            best = sorted(each for each in found if each[1])[:4]
            for seconds, few, config in [each for each in found if not each[1]] + best:
                kind, speed = "few" if few else "tensor cores", weight_bytes / seconds / 1e12
                print(f"{name} {kind} {config}: {seconds * 1e6:.2f} us, {speed:.2f} TB/s", flush=True)


def _launch(calls: Sequence[Callable[[Any], Any]], config: Any, copy: int) -> Any:
    return calls[copy](config)


def _first_tokens(each: LinearOperands, tokens: int) -> LinearOperands:
    outlier = None if each.outlier is None else each.outlier[:tokens]
    return replace(each, x=each.x[:tokens], x_scale=each.x_scale[:tokens], outlier=outlier)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep_few", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--quantize", action="store_true", help="with the quantizer before")
    parser.add_argument("--early", action="store_true", help="also every configuration as a dependent launch")
    add_options(parser, compile_seconds=60.0, seconds=60.0)
    options = parser.parse_args(argv)
    if options.early:
        os.environ[VARIABLE] = "1"  # for the quantizer
    torch.set_grad_enabled(False)
    found = keep(rows(options), options.output)
    return 0 if found and all(row["wrong"] is None for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
