"""The rows of docs/benchmarks/quality.jsonl, as the tables of the pages show them."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

from quad_modifiers.tools.bench.quality import Measurement
from quad_modifiers.tools.bench.quality_table import of_row, read_measurements

from .pages import ROOT

RESULTS = ROOT / "docs" / "benchmarks" / "quality.jsonl"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
REFERENCE = "full_precision"


def measurements(model: str, row: str) -> list[Measurement]:
    """The latest line of each seed, of the largest calibration that this row was measured with."""
    return of_row(read_measurements(RESULTS), model, row)


def perplexity(model: str, row: str) -> float:
    """The median over the seeds; infinite where nothing was measured, for sorting."""
    return median([each.perplexity for each in measurements(model, row)] or [float("inf")])


def number(value: float) -> str:
    """Two digits after the point, none where it is absurdly large."""
    return f"{value:.{2 if value < 1000 else 0}f}"


def filled_in(page: Path, kind: str, wanted: str) -> tuple[str, str]:
    """The table that stands on the page between its marks, and what a failure says."""
    pattern = rf"<!-- measured: {kind} -->\n(.*)\n<!-- /measured -->"
    (written,) = re.findall(pattern, page.read_text(encoding="utf-8"), re.S)
    return written, f"write this into {page.name}:\n{wanted}"
