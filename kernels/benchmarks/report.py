"""Markdown tables of results.

python -m benchmarks.report docs/benchmarks/kernels-cpu.jsonl > docs/benchmarks/kernels-cpu.md
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.record import Row, read_rows

_ORIGIN = ("machine", "backend", "torch", "triton", "driver", "humming-kernels")
_BESIDE = ("bf16", "fp16", "fp32", "int8", "humming_w4a4", "humming_w4a8", "humming_w4a16")
_EXPLANATION = """\
The complete QUAD layer (W4A4, quantization and outlier product included) beside what it replaces. A ratio is the time
of the method before it over QUAD's: above 1, QUAD is faster. `int8` is a product alone. What is measured, and how:
kernels/benchmarks/README.md."""


def table(rows: Sequence[Row]) -> str:
    """One table for each machine and set of versions, in the order of the rows."""
    parts = []
    for origin, group in groupby(rows, key=lambda row: tuple(row.get(name) for name in _ORIGIN)):
        parts += [_heading(origin, group_rows := list(group)), *_lines(group_rows), ""]
    return "\n".join(parts)


def _heading(origin: tuple[str | None, ...], rows: Sequence[Row]) -> str:
    machine, backend, *versions = origin
    named = [f"{name} {version}" for name, version in zip(_ORIGIN[2:], versions, strict=True) if version]
    commits = sorted({f"{row['commit']} ({row['date']})" for row in rows})
    heading = f"{machine}; backend {backend}; {', '.join(named)}; commit {', '.join(commits)}.\n"
    ceiling = next((row["ceiling"] for row in reversed(rows) if "ceiling" in row), None)
    if ceiling is None:
        return heading
    return (
        f"{heading}Measured: copy {ceiling['copy_bytes'] / 1e9:.1f} GB/s, read {ceiling['read_bytes'] / 1e9:.1f} GB/s, "
        f"int8 {ceiling['int8_operations'] / 1e12:.2f} TOP/s, "
        f"{rows[-1]['dtype']} {ceiling['float_operations'] / 1e12:.2f} TFLOP/s.\n"
    )


def _lines(rows: Sequence[Row]) -> list[str]:
    beside = [name for name in _BESIDE if any(name in row["methods"] for row in rows)]
    eager = any("quad" in row.get("eager", {}) for row in rows)
    head = ["case", "M", "quad µs"]
    for name in beside:
        head += [f"{name} µs", "ratio"]
    head += ["of ceiling", "quantization", "outliers"]
    if eager:
        head += ["eager: quad µs", "ratio to 16 bit"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in rows:
        lines.append(_row(_cells(row, beside, eager)))
    return lines


def _cells(row: Row, beside: Sequence[str], eager: bool) -> list[str]:
    cells = [row["case"], str(row["tokens"])]
    quad = row["methods"].get("quad")
    if quad is None:
        reason = row["failed"].get("quad") or row["failed"].get("gate") or "not measured"
        return [*cells, f"FAILED: {reason}"]
    cells.append(_microseconds(quad["median"]))
    for name in beside:
        other = row["methods"].get(name)
        cells += (
            [_microseconds(other["median"]), f"{other['median'] / quad['median']:.2f}"]
            if other is not None
            else ["", ""]
        )
    shares = [row.get("share_quantization"), row.get("share_outliers")]
    cells += [f"{row['fraction']:.2f}", *("" if share is None else f"{share:.0%}" for share in shares)]
    if eager:
        seen = row.get("eager", {})  # of few tokens alone
        own, other = seen.get("quad"), seen.get("bf16") or seen.get("fp16")
        cells += [
            _microseconds(own["median"]) if own else "",
            f"{other['median'] / own['median']:.2f}" if own and other else "",
        ]
    return cells


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of files; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    rows = [row for path in parser.parse_args(argv).results for row in read_rows(path)]
    if not rows:
        print("no results")
        return 1
    print(f"# Speed of the kernels\n\n{_EXPLANATION}\n\n{table(rows)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
