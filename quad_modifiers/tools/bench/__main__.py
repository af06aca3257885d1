"""Command line of the measurements; run it with --help."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quad_modifiers.tools.bench.quality import environment, measure
from quad_modifiers.tools.bench.quality_table import read_measurements, render
from quad_modifiers.tools.bench.rows import GPTQ_SPEED, HEADLINE, QUALITY, ROWS, SEEDS, TEXTS
from quad_modifiers.tools.bench.runtime import compare_runtime
from quad_modifiers.tools.bench.tuning_benchmark import compare_training_cost, measure_tuning
from quad_modifiers.tools.bench.tuning_peers import compare_tuning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen rows, appends each to a JSON-lines file, and prints the table of that file."""
    parser = argparse.ArgumentParser(prog="python -m quad_modifiers.bench", description=__doc__)
    parser.add_argument("what", choices=("quality", "gptq-speed", "table", *_PAIRS))
    parser.add_argument(
        "checkpoints", nargs="*", help="runtime, tuning...: the folders of the original and of its checkpoint"
    )
    parser.add_argument("--adapter", help="tuning: folder of the adapter; without one, the checkpoint alone")
    parser.add_argument("--windows", type=int, default=40, help="tuning: of held-out Wikipedia; half as many of others")
    parser.add_argument("--models", nargs="+", default=["smollm2", "qwen"], choices=("smollm2", "qwen"))
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), help="default: all of the table")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0, 1 and 2 for the headline rows, 0 for others")
    parser.add_argument("--items", type=int, help="quality: of each offline task; 0 leaves them out; default: all")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where the original models are kept")
    parser.add_argument("--results", type=Path, help="default: docs/benchmarks/, by what is measured")
    missing = "only rows and seeds that the results do not hold yet, with or without tasks"
    parser.add_argument("--missing", action="store_true", help=missing)
    parser.add_argument("--steps", type=int, default=40, help="tuning-peers: of 4 windows of 256 tokens")
    options = parser.parse_args(arguments)
    if options.results is None:
        name = "quality" if options.what == "table" else options.what
        options.results = Path("docs", "benchmarks", f"{name}.jsonl")
    if options.what in _PAIRS:
        if len(options.checkpoints) != 2:
            parser.error(f"{options.what} needs two folders: the original and its QUAD checkpoint")
        original, checkpoint = options.checkpoints
        _PAIRS[options.what](original, checkpoint, options)
        return 0
    if options.what != "table":
        _measure_rows(options)
    print(render(read_measurements(options.results)))
    return 0


def _measure_rows(options: argparse.Namespace) -> None:
    """Appends each measured row to the results; after an interruption, `--missing` continues with the next."""
    speed = options.what == "gptq-speed"
    items = 0 if speed else options.items
    wanted = [
        (model, row, seed)
        for model in options.models
        for row in options.rows or (GPTQ_SPEED if speed else QUALITY)
        for seed in options.seeds or (SEEDS if row in HEADLINE else SEEDS[:1])
    ]
    if options.missing and options.results.exists():
        held = {(each.model, each.row, each.seed, each.samples) for each in read_measurements(options.results)}
        wanted = [each for each in wanted if (*each, options.samples) not in held]
    for number, (model, row, seed) in enumerate(wanted, start=1):
        print(f"{number} of {len(wanted)}: {model} {row}, seed {seed}", flush=True)
        found = measure(row, model, options.folder / model, seed, options.samples, items)
        _append(options.results, asdict(found))
        print(f"perplexity {found.perplexity:.3f}, {found.seconds:.0f} s", flush=True)


def _tuning(original: str, checkpoint: str, options: argparse.Namespace) -> None:
    count = options.windows
    windows = {text: count if index == 0 else max(count // 2, 1) for index, text in enumerate(TEXTS)}
    for row in measure_tuning(original, checkpoint, windows, options.adapter):
        _append(options.results, row)
        print(
            f"{row['text']}: perplexity {row['perplexity']:.3f}, / original {row['ratio']:.4f}, "
            f"KL {row['divergence']:.4f}",
            flush=True,
        )


def _tuning_peers(original: str, checkpoint: str, options: argparse.Namespace) -> None:
    for row in compare_tuning(original, checkpoint, options.steps):
        _append(options.results, row)
        divergence = "" if row["divergence_after"] is None else f", KL {row['divergence_after']:.4f}"
        print(
            f"{row['peer']}, {row['parameters'] / 1e6:.2f} M, learning rate {row['learning_rate']:g}: loss "
            f"{row['loss_before']:.4f} to {row['loss_after']:.4f}{divergence}",
            flush=True,
        )


_PAIRS: dict[str, Callable[[str, str, argparse.Namespace], None]] = {
    "runtime": lambda original, checkpoint, _: print(compare_runtime(original, checkpoint)),
    "tuning": _tuning,
    "tuning-cost": lambda original, checkpoint, _: print(compare_training_cost(original, checkpoint)),
    "tuning-peers": _tuning_peers,
}


def _append(results: Path, row: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps({**row, **environment()}) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
