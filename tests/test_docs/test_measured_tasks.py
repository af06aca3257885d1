"""The table of docs/guide/evaluation.md holds the numbers of docs/benchmarks/quality.jsonl."""

from __future__ import annotations

from quad_modifiers.records.evaluation_record import Comparison
from quad_modifiers.tools.bench.quality import Measurement
from quad_modifiers.tools.bench.rows import QUALITY

from .measurements import MODELS, REFERENCE, filled_in, measurements
from .pages import ROOT

PAGE = ROOT / "docs" / "guide" / "evaluation.md"
TASKS = ("quad_lastword", "quad_continuation", "quad_code")


def line(measured: Measurement) -> str:
    """Each task's score / the original's, and what is left of the average."""
    of_task = {task["task"]: Comparison(**task) for task in measured.tasks}
    average = measured.average
    assert average is not None
    assert average.percent is not None
    assert average.percent_interval is not None
    low, high = average.percent_interval
    cells = [
        f"{MODELS[measured.model]}, `{measured.row}`, seed {measured.seed}",
        str(of_task[TASKS[0]].items),
        *(f"{of_task[task].value:.3f} / {of_task[task].baseline:.3f}" for task in TASKS),
        f"{average.percent:.1f} % ({low:.1f} to {high:.1f})",
        f"{average.percent_above_chance:.1f} %",
        f"{average.difference:+.3f}" + ("" if average.distinguishable else ", not seen"),
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """One line for each checkpoint."""
    head = f"| | items | {' | '.join(f'`{task}`' for task in TASKS)} | average kept | above guessing | difference |"
    rows = [row for row in QUALITY if row != REFERENCE]
    found = [each for model in MODELS for row in rows for each in measurements(model, row) if each.tasks]
    return "\n".join([head, f"|{'---|' * 8}", *map(line, found)])


def test_table_of_the_page_is_that_of_the_results() -> None:
    wanted = table()
    assert wanted.count("\n") > 2
    written, advice = filled_in(PAGE, "tasks", wanted)
    assert written == wanted, advice
