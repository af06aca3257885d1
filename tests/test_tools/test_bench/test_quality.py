"""The quality table: measured rows on a toy, and what is made of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("llmcompressor")
pytest.importorskip("gensim")

from quad_modifiers.records.evaluation_record import Comparison, Evaluation
from quad_modifiers.records.tuning_record import read_tuning
from quad_modifiers.tools.bench import quality as measuring
from quad_modifiers.tools.bench.__main__ import main
from quad_modifiers.tools.bench.quality import Measurement, measure_here
from quad_modifiers.tools.bench.quality_table import read_measurements, render
from quad_modifiers.tools.bench.rows import CODE, NEWS, Row
from quad_peft.training import checkpoint

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 4}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {}
"""


def measured(row: str, seed: int = 0, perplexity: float = 20.0, *others_and_tasks) -> Measurement:
    return Measurement(row, "smollm2", seed, 64, perplexity, 0.1, 100, 60.0, 10**9, 2 * 10**8, *others_and_tasks)


def average(percent: float, above: float) -> Comparison:
    mean = {"metric": "acc", "items": 4, "value": 0.5}
    return Comparison(task="average", **mean, percent=percent, percent_above_chance=above)


def test_several_seeds_become_median_and_range() -> None:
    rows = [measured("full_precision", 0, 16.0, {CODE: 8.0})]
    rows += [
        measured("quad_w4a4", seed, value, {CODE: 9.0 + seed}, [average(97.0 + seed, 96.0).model_dump()])
        for seed, value in enumerate((20.0, 18.0, 25.0))
    ]
    (line,) = [line for line in render(rows).splitlines() if "| quad_w4a4 |" in line]
    perplexities, tasks = "20.00 (18.00 to 25.00, 3 seeds)", "98.0 % (97.0 % to 99.0 %, 3 seeds)"
    assert f"| {perplexities} | 1.250 |  | 1.250 | {tasks} | 96.0 % (96.0 % to 96.0 %, 3 seeds) |" in line


def test_a_row_is_shown_with_its_largest_calibration() -> None:
    few, many = measured("quad_w4a4", 0, 30.0), measured("quad_w4a4", 1, 20.0)
    line = render([replace(few, samples=32), many]).splitlines()[-1]
    assert "| quad_w4a4 | 20.00 |" in line


def test_rows_on_a_toy(toy_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LENGTH", 48)
    monkeypatch.setattr(measuring, "TUNING_SAMPLES", 8)
    asked = []

    def evaluate(model: object, *, baseline: Path, limit: int | None, **_: object) -> Evaluation:
        asked.append((baseline, limit))
        task = average(91.0, 81.0).model_copy(update={"task": "a"})
        return Evaluation(format_version=1, comparisons=[task], average=average(90.0, 80.0))

    monkeypatch.setattr("quad_modifiers.tools.evaluation.evaluator.evaluate", evaluate)
    merged = []

    def merge(quad: Path, adapter: Path, output: Path) -> None:
        """Not a merged checkpoint but the original, which is told from the others."""
        merged.append((read_tuning(adapter).original, (quad / "config.json").is_file()))
        shutil.copytree(toy_checkpoint(), output)

    monkeypatch.setattr(checkpoint, "merge", merge)
    rows = {"whole": Row("", None), "plain": Row("", RECIPE), "tuned": Row("", RECIPE, tuned=True)}
    monkeypatch.setattr(measuring, "ROWS", rows)
    items = {"whole": 7, "plain": 0, "tuned": 0}
    found = {name: measure_here(name, "smollm2", toy_checkpoint(), 0, 8, items[name], windows=4) for name in rows}
    assert found["whole"].checkpoint_bytes == 0
    assert found["tuned"].checkpoint_bytes > found["plain"].checkpoint_bytes > 0
    assert merged == [(toy_checkpoint().name, True)]
    assert set(found["plain"].other_perplexities) == {NEWS, CODE}
    assert found["tuned"].perplexity == found["whole"].perplexity != found["plain"].perplexity
    assert asked == [(toy_checkpoint(), 7)]
    assert (found["plain"].tasks, found["plain"].average) == ([], None)
    assert [task["task"] for task in found["whole"].tasks] == ["a", "average"]
    assert found["whole"].average == average(90.0, 80.0)


def test_headline_rows_are_measured_with_every_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(row: str, model: str, folder: Path, seed: int, samples: int, items: int | None) -> Measurement:
        asked.append((row, seed))
        return measured(row, seed)

    monkeypatch.setattr("quad_modifiers.tools.bench.__main__.measure", measure)
    results = tmp_path / "new" / "quality.jsonl"
    arguments = ["--models", "smollm2", "--rows", "full_precision", "quad_w4a4", "--results", str(results)]
    assert main(["quality", *arguments]) == 0
    assert asked == [("full_precision", 0), *(("quad_w4a4", seed) for seed in (0, 1, 2))]
    assert len(read_measurements(results)) == 4
    printed = capsys.readouterr().out
    assert "2 of 4: smollm2 quad_w4a4, seed 0" in printed
    assert "3 seeds" in printed


def test_an_interrupted_table_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(row: str, model: str, folder: Path, seed: int, samples: int, items: int | None) -> Measurement:
        if seed == 1 and not asked:
            raise KeyboardInterrupt
        asked.append(seed)
        return measured(row, seed)

    monkeypatch.setattr("quad_modifiers.tools.bench.__main__.measure", measure)
    results = tmp_path / "quality.jsonl"
    arguments = ["quality", "--models", "smollm2", "--rows", "quad_w4a4", "--results", str(results), "--missing"]
    assert main([*arguments, "--seeds", "0"]) == 0
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    asked.append(-1)
    assert main(arguments) == 0
    assert asked == [-1, 1, 2]
    assert main([*arguments, "--samples", "32", "--seeds", "0"]) == 0
    assert asked[-1] == 0, "another number of windows is another measurement"


def test_a_failed_row_says_so_and_leaves_its_messages(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_row on smollm2 failed with exit status 1"):
        measuring.measure("no_such_row", "smollm2", tmp_path / "smollm2", 0, 8)
    assert "KeyError: 'no_such_row'" in capfd.readouterr().err
