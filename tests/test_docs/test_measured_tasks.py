"""The table of docs/guide/evaluation.md holds the numbers of docs/benchmarks/tasks/."""

from __future__ import annotations

import re

from quad_modifiers.publishing.evaluation import Comparison, read_evaluation_file

from .pages import ROOT

PAGE = ROOT / "docs" / "guide" / "evaluation.md"
RESULTS = ROOT / "docs" / "benchmarks" / "tasks"
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
TASKS = ("quad_lastword", "quad_continuation", "quad_code")


def cell(each: Comparison) -> str:
    return f"{each.value:.3f} / {each.baseline:.3f}"


def table() -> str:
    lines = [
        f"| | items | {' | '.join(f'`{task}`' for task in TASKS)} | average kept | above guessing | difference |",
        f"|{'---|' * 8}",
    ]
    for file in sorted(RESULTS.glob("*.json"), key=lambda file: (list(MODELS).index(file.stem.split("-")[0]), file)):
        model, _, recipe = file.stem.partition("-")
        found = read_evaluation_file(file)
        assert found is not None
        assert found.average is not None
        of_task = {each.task: each for each in found.comparisons}
        average = found.average
        assert average.percent is not None
        assert average.percent_interval is not None
        assert average.interval is not None
        low, high = average.percent_interval
        cells = [
            f"{MODELS[model]}, `{recipe}`",
            str(of_task[TASKS[0]].items),
            *(cell(of_task[task]) for task in TASKS),
            f"{average.percent:.1f} % ({low:.1f} to {high:.1f})",
            f"{average.percent_above_chance:.1f} %",
            f"{average.difference:+.3f}" + ("" if average.distinguishable else ", not seen"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_table_of_the_page_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    (written,) = re.findall(r"<!-- measured: tasks -->\n(.*)\n<!-- /measured -->", page, re.S)
    wanted = table()
    assert wanted.count("\n") > 2
    assert written == wanted, f"write this into {PAGE.name}:\n{wanted}"
