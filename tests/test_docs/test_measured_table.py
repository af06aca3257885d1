"""The table of docs/guide/recipes.md holds the numbers of docs/benchmarks/quality.jsonl."""

from __future__ import annotations

import json
import re
from statistics import median
from typing import Any

from quad_modifiers.recipe import list_recipes

from .pages import ROOT

PAGE = ROOT / "docs" / "guide" / "recipes.md"
RESULTS = ROOT / "docs" / "benchmarks" / "quality.jsonl"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
REFERENCE = "full_precision"


def measurements(model: str, row: str) -> list[dict[str, Any]]:
    """The latest line of each seed, of the largest calibration that this row was measured with."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if (line["model"], line["row"]) == (model, row)]
    largest = max((line["samples"] for line in found), default=0)
    return list({line["seed"]: line for line in found if line["samples"] == largest}.values())


def cells(model: str, row: str) -> tuple[str, str, str]:
    """Perplexity, ratio and size of a row; several seeds become their median."""
    found = measurements(model, row)
    if not found:
        return "not measured", "", ""
    value = median(line["perplexity"] for line in found)
    seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
    size = found[-1]["checkpoint_bytes"]
    reference = median(line["perplexity"] for line in measurements(model, REFERENCE))
    digits = 2 if value < 1000 else 0
    ratio = "" if row == REFERENCE else f"{value / reference:.{digits and digits + 1}f}"
    return f"{value:.{digits}f}{seeds}", ratio, f"{size / 1e6:.0f} MB" if size else ""


def table() -> str:
    """The table as the results have it, best recipes of the first model first."""
    rows = [REFERENCE, *list_recipes()]
    measured = [row for row in rows if any(measurements(model, row) for model in MODELS)]
    first = next(iter(MODELS))
    measured.sort(key=lambda row: median([line["perplexity"] for line in measurements(first, row)] or [float("inf")]))
    heads = [f"{title} | ratio | size" for title in MODELS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * 3 * len(MODELS)}"]
    for row in measured:
        name = "full precision (bf16)" if row == REFERENCE else f"`{row}`"
        lines.append(f"| {name} | {' | '.join(' | '.join(cells(model, row)) for model in MODELS)} |")
    return "\n".join(re.sub(r" +\|", " |", line) for line in lines)


def test_table_of_the_page_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (written,) = re.findall(r"<!-- measured: quality.jsonl -->\n(.*)\n<!-- /measured -->", page, re.S)
    wanted = table()
    assert "quad_w4a4" in wanted
    assert written == wanted, f"write this into {PAGE.name}:\n{wanted}"


def test_every_shipped_recipe_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in list_recipes() if f"`{name}`" not in page] == []
