"""`evaluation.json`: measured quality, kept beside the checkpoint that it belongs to.

Whoever measures writes it, the model card reads it. It holds results only, never estimates, and says what they were
measured on. Task results keep lm-eval's own form, so that its output can be copied in unchanged.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

EVALUATION_NAME = "evaluation.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerplexityResult(_Strict):
    """One perplexity.

    Attributes:
        text: what was measured on, for people: "WikiText-2 test", "held-out Wikipedia articles of gensim".
        window_length: tokens in a window.
        tokens: predicted tokens.
        value: exp of the mean negative log-likelihood.
        stderr: standard error of `value`, if known.
        baseline: the original model on the same windows, if measured.
    """

    text: str = Field(min_length=1)
    window_length: int = Field(ge=2)
    tokens: int = Field(ge=1)
    value: float = Field(gt=0)
    stderr: float | None = Field(default=None, ge=0)
    baseline: float | None = Field(default=None, gt=0)


TaskResults = dict[str, dict[str, float | str | None]]
"""lm-eval's `results`: by task, then by "metric,filter", with "metric_stderr,filter" beside it and an "alias"."""


class Evaluation(_Strict):
    """The whole file.

    Attributes:
        format_version: 1; a reader refuses any other.
        baseline: Hub id or name of the original model that the baseline numbers belong to.
        perplexity: perplexities.
        results: lm-eval's `results` of this checkpoint.
        baseline_results: lm-eval's `results` of the original.
        n_shot: lm-eval's `n-shot`: examples in the prompt, by task.
        packages: versions of what measured, by package.
        machine: what it was measured on.
    """

    format_version: Literal[1]
    baseline: str | None = None
    perplexity: list[PerplexityResult] = []
    results: TaskResults = {}
    baseline_results: TaskResults = {}
    n_shot: dict[str, int] = {}
    packages: dict[str, str] = {}
    machine: str | None = None


class TaskScore(NamedTuple):
    """One metric of one task; `stderr` and `baseline` are None where they were not measured."""

    task: str
    metric: str
    value: float
    stderr: float | None
    baseline: float | None
    shots: int | None


def read_evaluation(folder: Path) -> Evaluation | None:
    """Returns the evaluation in a folder, None if there is none.

    Raises:
        ValueError: naming the field that is wrong.
    """
    file = folder / EVALUATION_NAME
    if not file.is_file():
        return None
    try:
        return Evaluation.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ValueError(f"{file}: {where}: {first['msg']}; correct it, or remove the file") from error


def task_scores(evaluation: Evaluation) -> Iterator[TaskScore]:
    """Yields every number among the task results that is no standard error."""
    for task, metrics in evaluation.results.items():
        for key, value in metrics.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{rule}")
            baseline = evaluation.baseline_results.get(task, {}).get(key)
            yield TaskScore(
                task,
                metric,
                value,
                stderr if isinstance(stderr, float) else None,
                baseline if isinstance(baseline, float) else None,
                evaluation.n_shot.get(task),
            )
