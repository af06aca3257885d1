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
    """The results of a model on one task."""

    results: dict[str, dict[str, Any]]  # lm-eval's `results`, by task and group
    versions: dict[str, Any]  # lm-eval's `versions` of the tasks
    n_shot: dict[str, int]  # lm-eval's `n-shot`
    # the metric that counts, among `ACCURACIES` or `WORD_PERPLEXITY`; None if the task has none of them
    metric: str | None = None
    # values of that metric, by item; for a perplexity the log-likelihood of each document, in nats
    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # words of each document for a perplexity, else empty
    chance: float = 0.0  # accuracy of guessing: the mean of 1 / choices; 0 where the answer is free


def run_task(lm: Any, task: LoadedTask, limit: int | None = None, seed: int = 0) -> TaskRun:
    """Runs a task on an lm-eval model.

    `limit` takes the first items of each task. `seed` chooses few-shot examples and all that a task leaves to chance.
    """
    import numpy
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for each in task.tasks.values():
        each.set_fewshot_seed(seed=seed)
    asked = {"tasks": task.tasks, "groups": task.groups}
    with _one_process():
        found = evaluate(lm, asked, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True)
    metric = _metric(found["samples"])
    items = [  # as the task's first filter reads the answers; with several, items repeat
        (task.tasks[name], item)
        for name, of_task in found["samples"].items()
        for item in of_task
        if item["filter"] == of_task[0]["filter"]
    ]
    chances = [_chance(of_task, item) for of_task, item in items]
    measured = [] if metric is None else [item[metric] for _, item in items]
    documents = metric == WORD_PERPLEXITY  # measured by log-likelihood and words
    return TaskRun(
        results={
            name: {key: _number(value) for key, value in metrics.items()} for name, metrics in found["results"].items()
        },
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


def _chance(task: Any, item: dict[str, Any]) -> float:
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    asked = len(item["arguments"])
    return 2 / asked if "acc_mutual_info" in item else 1 / asked  # that metric asks for each choice twice


def _number(value: Any) -> Any:
    """Returns a metric as JSON can hold it: Python's number, None for NaN and infinity."""
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
