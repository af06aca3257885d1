"""One model in one task: lm-eval's results, and the score of every item for paired comparisons."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quad_modifiers.tools.evaluation.harness import LoadedTask

# The one that counts is the first that a task has.
ACCURACIES = ("acc_norm", "acc", "exact_match")
WORD_PERPLEXITY = "word_perplexity"
BOOTSTRAP_ITERATIONS = 10_000


@dataclass(frozen=True)
class TaskRun:
    """The results of a model on one task.

    Attributes:
        results: lm-eval's `results`, by task and group.
        versions: lm-eval's `versions` of the tasks.
        n_shot: lm-eval's `n-shot`.
        metric: the metric that counts, among `ACCURACIES` or `WORD_PERPLEXITY`; None if the task has none of them.
        values: values of that metric, by item; for a perplexity the log-likelihood of each document, in nats.
        weights: words of each document for a perplexity, else empty.
        chance: accuracy of guessing: the mean of 1 / choices; 0 where the answer is free.
    """

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    n_shot: dict[str, int]
    metric: str | None = None
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    chance: float = 0.0


def run_task(lm: Any, task: LoadedTask, limit: int | None = None, seed: int = 0) -> TaskRun:
    """Runs a task on a model.

    Args:
        lm: an lm-eval model.
        task: task that `load_tasks` returned.
        limit: items of each task, the first ones; all by default.
        seed: seed that chooses few-shot examples and everything a task leaves to chance.
    """
    import numpy
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for each in task.tasks.values():
        each.set_fewshot_seed(seed=seed)
    with _one_process():
        found = evaluate(
            lm,
            {"tasks": task.tasks, "groups": task.groups},
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=True,
        )
    metric = _metric(found["samples"])
    items = [(task.tasks[name], item) for name, of_task in found["samples"].items() for item in _first_filter(of_task)]
    chances = [_chance(of_task, item) for of_task, item in items]
    measured = [] if metric is None else [item[metric] for _, item in items]
    documents = metric == WORD_PERPLEXITY  # measured by log-likelihood and words
    return TaskRun(
        results={name: _plain(metrics) for name, metrics in found["results"].items()},
        versions=found["versions"],
        n_shot=found["n-shot"],
        metric=metric,
        values=[float(each[0] if documents else each) for each in measured],
        weights=[float(each[1]) for each in measured] if documents else [],
        chance=sum(chances) / len(chances),
    )


def _metric(samples: dict[str, list[dict[str, Any]]]) -> str | None:
    """Returns the first known metric that every item of every task has."""
    items = [item for of_task in samples.values() for item in of_task]
    known = (*ACCURACIES, WORD_PERPLEXITY)
    return next((metric for metric in known if all(metric in item for item in items)), None)


def _first_filter(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the items as the task's first filter reads the answers; with several, items repeat."""
    return [item for item in items if item["filter"] == items[0]["filter"]]


def _chance(task: Any, item: dict[str, Any]) -> float:
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    asked = len(item["arguments"])
    return 2 / asked if "acc_mutual_info" in item else 1 / asked  # that metric asks for each choice twice


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's metrics of one task as JSON can hold them: Python's numbers, None for NaN and infinity."""
    return {key: _number(value) for key, value in metrics.items()}


def _number(value: Any) -> Any:
    if isinstance(value, (str, dict, bool)) or value is None:
        return value
    value = float(value)
    return value if abs(value) < float("inf") else None


@contextmanager
def _one_process() -> Iterator[None]:
    """Keeps lm-eval's bootstrap in this process: forking one that runs threads may lock up."""
    variable = "DISABLE_MULTIPROC"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
