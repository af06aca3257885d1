"""The tables of README.md and docs/guide/recipes.md hold the numbers of docs/benchmarks/quality.jsonl."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest

from quad_modifiers.recipe import list_recipes
from quad_modifiers.tools.bench.rows import CODE, NEWS, QUALITY

from .measurements import MODELS, REFERENCE, filled_in, measurements, number, perplexity
from .pages import ROOT

RECIPES = ROOT / "docs" / "guide" / "recipes.md"
README = ROOT / "README.md"
HEADLINE = ("quad_w4a4a8", "quad_w4a4", "quarot_w4a4")  # what README.md shows
SAMPLES = 64  # windows of calibration text, as the pages say above the tables


def cells(model: str, row: str) -> list[str]:
    """Perplexity, ratios on Wikipedia, news and code, and size of a row; several seeds become median and range."""
    found = measurements(model, row)
    values = [each.perplexity for each in found]
    note = f" ({number(min(values))} to {number(max(values))}, {len(found)} seeds)" if len(found) > 1 else ""
    if row != REFERENCE and found[0].samples != SAMPLES:
        note += f" ({found[0].samples} windows)"
    size = found[-1].checkpoint_bytes
    ratios = ["", "", ""]
    if row != REFERENCE:
        (original,) = measurements(model, REFERENCE)
        ratios = [f"{perplexity(model, row) / original.perplexity:.3f}"]
        for text in (NEWS, CODE):
            ratio = median(each.other_perplexities[text] for each in found) / original.other_perplexities[text]
            ratios.append(f"{ratio:.3f}")
        ratios = [ratio if float(ratio) < 100 else f"{float(ratio):.0f}" for ratio in ratios]
    return [number(perplexity(model, row)) + note, *ratios, f"{size / 1e6:.0f} MB" if size else ""]


def table(rows: Sequence[str]) -> str:
    """The rows that were measured, best of the first model first, one block of rows for each model."""
    lines = ["| | perplexity | ratio | news | code | size |", f"|{'---|' * 6}"]
    for model, title in MODELS.items():
        measured = [row for row in rows if measurements(model, row)]
        for row in sorted(measured, key=lambda row: (row != REFERENCE, perplexity(model, row))):
            lines.append(f"| {title}, {name(row)} | {' | '.join(cells(model, row))} |")
    return "\n".join(lines)


def name(row: str) -> str:
    """A recipe's name as code, in words what is not a recipe of its own."""
    return f"`{row}`" if row in list_recipes() else QUALITY[row].title


@pytest.mark.parametrize(
    ("page", "rows"),
    [(RECIPES, tuple(dict.fromkeys((*QUALITY, *list_recipes())))), (README, HEADLINE)],
    ids=["recipes", "readme"],
)
def test_table_of_the_page_is_that_of_the_results(page: Path, rows: Sequence[str]) -> None:
    wanted = table(rows)
    assert "`quad_w4a4`" in wanted
    written, advice = filled_in(page, "quality.jsonl", wanted)
    assert written == wanted, advice


def test_speed_of_one_layer_is_that_of_the_table_of_shapes() -> None:
    shapes = (ROOT / "docs" / "benchmarks" / "kernels-cpu.md").read_text(encoding="utf-8")
    ratios = dict(re.findall(r"^\| 4096x4096/linear \| (\d+) \| \d+ \| \d+ \| ([\d.]+) \|", shapes, re.M))
    page = (ROOT / "docs" / "benchmarks" / "speed.md").read_text(encoding="utf-8")
    (tokens,), (shown,) = (
        re.findall(rf"^\| {start} \| (.*) \|$", page, re.M) for start in ("tokens", "times.*model\\)")
    )
    assert [ratios[each] for each in tokens.split(" | ")] == shown.split(" | ")


def test_every_shipped_recipe_is_on_the_page() -> None:
    page = RECIPES.read_text(encoding="utf-8")
    assert [name for name in list_recipes() if f"`{name}`" not in page] == []
