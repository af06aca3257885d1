"""Times complete QUAD layers beside what they replace.

PYTHONPATH=kernels python -m benchmarks.run --quick
PYTHONPATH=kernels python -m benchmarks.run --models 4096x4096 --tokens 1 16 128 --output results.jsonl
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from quad_kernels import choose_backend

from benchmarks import gate
from benchmarks.ceiling import Ceiling, least_seconds, measure_ceiling
from benchmarks.humming_peer import ARITHMETICS, HummingBudget, HummingLayer
from benchmarks.methods import FloatLayer, Int8Layer, Layer, QuadLayer, Setting, case_method
from benchmarks.record import Row, add_row, environment, last_level_cache
from benchmarks.report import table
from benchmarks.shapes import MODELS, REAL_MODELS, SQUARE, Case, Linear, cases
from benchmarks.timing import CudaEager, CudaGraph, Method, Sampler, Timing, WallClock, describe, measure
from benchmarks.tune import tune_shape

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
QUICK_TOKENS = [1, 16, 512]
MOST_CPU_TOKENS = 512
MOST_DECODE_TOKENS = 16  # up to here eager times are reported as well
_CACHES = 4  # rotated weights are this many times the last-level cache
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Bench:
    """One device, one dtype, one set of methods."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        self.options = options
        self.setting = Setting(device, getattr(torch, options.dtype), _CACHES * last_level_cache(device), options.warm)
        self.graphs = device.type == "cuda" and not options.eager
        self.origin = environment(device, choose_backend(device).name, self.setting.dtype, options.commit)
        self.ceiling: Ceiling | None = None
        self.budget = HummingBudget(options.peer_seconds)

    def rows(self, case: Case, tokens: Sequence[int]) -> Iterator[Row]:
        """Measures a case; a row for each number of tokens."""
        generator = torch.Generator(self.setting.device).manual_seed(0)
        quad = [QuadLayer(linear, self.setting, generator) for linear in case.linears]
        layers, missing = self._layers_beside(case, tokens, generator)
        for count in tokens:
            row: Row = {**self.origin, "case": str(case), "tokens": count, "failed": dict(missing), "methods": {}}
            row |= {
                "widths": [
                    [layer.split.width, linear.quad_outputs, layer.split.rank]
                    for layer, linear in zip(quad, case.linears, strict=True)
                ]
            }
            problem = self._gate(quad, count, generator)
            if problem is not None:
                row["failed"]["gate"] = problem
            elif self.options.gate_only:
                self._compile(quad, count, generator)
            else:
                self._time(row, case, quad, layers, count, generator)
            yield row

    def _gate(self, quad: Sequence[QuadLayer], tokens: int, generator: torch.Generator) -> str | None:
        exact = self.options.gate_only or self.setting.device.type == "cpu"
        for layer in quad:
            try:
                problem = gate.check(layer, layer.make_input(tokens, generator), exact)
            except Exception as error:  # of a kernel; the row reports it and the next row is measured
                problem = describe(error)
            if problem is not None:
                return problem
        return None

    def _is_tuned(self, linear: Linear, tokens: int) -> bool:
        from quad_kernels.integer_linear.autotune import measured

        problem = tune_shape(linear, tokens).problem(self.setting.dtype)
        device = self.setting.device
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return problem in measured(device)

    def _compile(self, quad: Sequence[QuadLayer], tokens: int, generator: torch.Generator) -> None:
        """Runs what a benchmark will run, for Triton's cache."""
        for layer in quad:
            for method in layer.parts(layer.make_input(tokens, generator)):
                method.call(0)

    def _layers_beside(
        self, case: Case, tokens: Sequence[int], generator: torch.Generator
    ) -> tuple[dict[str, list[Layer]], dict[str, str]]:
        """Layers of what is timed beside QUAD, and why some are missing."""
        setting = self.setting
        wide = Setting(setting.device, torch.float32, setting.rotated_bytes, setting.warm)
        makers: dict[str, Callable[[Linear], Layer]] = {
            _SHORT[setting.dtype]: lambda linear: FloatLayer(linear, setting, generator)
        }
        if setting.device.type == "cpu":
            makers["fp32"] = lambda linear: FloatLayer(linear, wide, generator)
        if case.kind == "linear":
            makers["int8"] = lambda linear: Int8Layer(linear, setting, generator)
        if self.options.peers:
            for arithmetic in ARITHMETICS:
                makers[arithmetic] = lambda linear, arithmetic=arithmetic: HummingLayer(
                    linear, setting, generator, arithmetic, tokens, self.budget
                )
        layers: dict[str, list[Layer]] = {}
        missing: dict[str, str] = {}
        if self.options.gate_only:
            return layers, missing
        for name, make in makers.items():
            try:
                layers[name] = [make(linear) for linear in case.linears]
            except Exception as error:  # a peer that does not install, compile or take a shape
                missing[name] = describe(error)
                print(f"{case}: without {name}: {missing[name]}", file=sys.stderr)
        return layers, missing

    def _time(
        self,
        row: Row,
        case: Case,
        quad: Sequence[QuadLayer],
        beside: dict[str, list[Layer]],
        tokens: int,
        generator: torch.Generator,
    ) -> None:
        if self.ceiling is None:
            self.ceiling = self._measure_ceiling()
        methods = [case_method("quad", case, list(quad), tokens, generator)]
        methods += [case_method(name, case, layers, tokens, generator) for name, layers in beside.items()]
        if case.kind == "linear":
            methods += quad[0].parts(quad[0].make_input(tokens, generator))
        timings, failed = measure(methods, self._sampler, self.options.repeats, self.options.row_seconds)
        row["failed"] |= failed
        row["methods"] = {name: asdict(timing) for name, timing in timings.items()}
        if self.graphs and tokens <= MOST_DECODE_TOKENS:
            whole = [method for method in methods if not method.name.startswith("quad:")]
            eager, _ = measure(whole, CudaEager, self.options.repeats, self.options.row_seconds)
            row["eager"] = {name: asdict(timing) for name, timing in eager.items()}
        row["ceiling"] = self.ceiling.record()
        least = least_seconds(case, tokens, self.setting.dtype, self.ceiling)
        row["least_seconds"] = least
        if "quad" in timings:
            row["fraction"] = least / timings["quad"].median
            row |= _shares(timings)

    def _sampler(self, method: Method) -> Sampler:
        if self.graphs:
            return CudaGraph(method)
        return CudaEager(method) if self.setting.device.type == "cuda" else WallClock(method)

    def _measure_ceiling(self) -> Ceiling:
        size, bandwidth = self.options.ceiling_size, self.setting.rotated_bytes
        if size is None:
            size = 8192 if self.setting.device.type == "cuda" else 2048
        if self.setting.device.type == "cuda":
            bandwidth = max(bandwidth, 2**30)
        ceiling = measure_ceiling(self.setting.device, self.setting.dtype, size, bandwidth)
        print(f"measured ceiling: {ceiling}", file=sys.stderr)
        return ceiling


def _shares(timings: dict[str, Timing]) -> Row:
    """Shares of the complete layer's time, from what leaving a part out saves."""
    linear, product = timings.get("quad: without quantization"), timings.get("quad: integer product only")
    if linear is None or product is None:
        return {}
    complete = timings["quad"].median
    return {
        "share_quantization": (complete - linear.median) / complete,
        "share_outliers": (linear.median - product.median) / complete,
    }


def _summary(row: Row) -> str:
    label = f"{row['case']} M={row['tokens']}"
    if "gate" in row["failed"]:
        return f"{label}: WRONG, not timed: {row['failed']['gate']}"
    if not row["methods"]:
        return f"{label}: correct"
    times = ", ".join(f"{name} {timing['median'] * 1e6:.1f}" for name, timing in row["methods"].items())
    return f"{label} [µs]: {times}; {row.get('fraction', 0.0):.2f} of the ceiling"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS, SQUARE], help="default: all")
    parser.add_argument("--cases", nargs="+", help="names such as qkv, mlp; default: all of each model")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"default: {TOKENS[0]} to {TOKENS[-1]}")
    parser.add_argument("--quick", action="store_true", help="one model and the square layer, few numbers of tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--warm", action="store_true", help="one copy of the weights, which the caches may hold")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each method")
    parser.add_argument("--row-seconds", type=float, default=8.0, help="after which a row starts no further round")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further row is started")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--gate-only", action="store_true", help="correctness alone, with exact integer sums")
    parser.add_argument("--peers", action="store_true", help="also humming-kernels, if it is installed")
    parser.add_argument("--peer-seconds", type=float, default=120.0, help="for compiling it, in all")
    parser.add_argument("--ceiling-size", type=int, help="of the square products that measure the machine")
    parser.add_argument("--output", type=Path, help="a file of JSON lines; rows of the same case are replaced")
    parser.add_argument("--commit", help="to record; default: that of the working tree")
    options = parser.parse_args(argv)
    if options.warm and options.output:
        parser.error("--warm rows do not belong into a file of cold ones; leave --output out")
    if options.peers and torch.device(options.device).type != "cuda":
        parser.error("--peers needs a CUDA device")
    if options.tokens is None:
        options.tokens = QUICK_TOKENS if options.quick else TOKENS
        if torch.device(options.device).type == "cpu":
            options.tokens = [count for count in options.tokens if count <= MOST_CPU_TOKENS]
    if options.models is None:
        options.models = ["llama-3.2-1b", SQUARE] if options.quick else [*REAL_MODELS, SQUARE]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns 1 if a result is wrong, 2 if nothing was measured."""
    options = parse(argv)
    start = time.perf_counter()
    rows: list[Row] = []
    torch.set_grad_enabled(False)
    bench = Bench(options)
    print(", ".join(f"{key} {value}" for key, value in bench.origin.items() if value), file=sys.stderr)
    wanted = [case for model in options.models for case in cases(model)]
    for case in wanted:
        if options.cases and case.name not in options.cases:
            continue
        if time.perf_counter() - start > options.seconds:
            print(f"out of time before {case}", file=sys.stderr)
            break
        for row in _within(bench.rows(case, options.tokens), start + options.seconds):
            rows.append(row)
            print(_summary(row), file=sys.stderr, flush=True)
            if options.output is not None and not options.gate_only:
                add_row(options.output, row)
    if not rows:
        print("nothing was measured", file=sys.stderr)
        return 2
    if any(row["methods"] for row in rows):
        print(table([row for row in rows if "ceiling" in row or "gate" in row["failed"]]))
    wrong = [row for row in rows if "gate" in row["failed"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} rows are correct")
    return 1 if wrong else 0


def _within(rows: Iterator[Row], deadline: float) -> Iterator[Row]:
    """Rows until the deadline; the one that crosses it is the last."""
    for row in rows:
        yield row
        if time.perf_counter() > deadline:
            return


if __name__ == "__main__":
    sys.exit(main())
