"""`quad recipes suggest`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

SHORT = ("--samples", 4, "--eval-windows", 1, "--seq-length", 32)


def test_suggest_a_recipe(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    model, mine, kept = toy_checkpoint("llama"), tmp_path / "mine.yaml", tmp_path / "kept.json"
    done = quad("recipes", "suggest", model, "--bits", 3, "--recipe", recipe, "--dataset", text, "-o", mine, *SHORT)
    assert done.code == 2
    assert "error: 3 bits per weight cannot be had" in done.err
    bits = float(done.err.split("choose ")[1].split()[0]) + 1
    done = quad(
        *("recipes", "suggest", model, "--bits", bits, "--recipe", recipe, "--dataset", text),
        *("-o", mine, "--save", kept, *SHORT),
    )
    assert done.code == 0, done.err
    header, row, last = (line for line in done.out.splitlines() if line.strip() and not set(line) <= set("─━ "))
    assert " ".join(header.split()) == "bits wanted bits before bits divergence before divergence predicted"
    assert row.split()[:2] == ["weights", f"{bits:g}"]
    assert last == str(mine)
    assert quad("recipes", "validate", mine).code == 0

    again = quad("recipes", "suggest", model, "--bits", bits, "--recipe", recipe, "--from", kept)
    assert again.out == mine.read_text()
    told = json.loads(
        quad("recipes", "suggest", model, "--bits", bits, "--recipe", recipe, "--from", kept, "--json").out
    )
    assert told["recipe"] == mine.read_text()
    assert told["budgets"][0]["average"] <= bits
    assert quad("recipes", "suggest", model, "--bits", bits, "--recipe", recipe, "-o", mine).code == 2
