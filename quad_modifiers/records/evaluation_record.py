"""`evaluation.json`: measured quality, kept beside the checkpoint that it belongs to.

Whoever measures writes it (`quad eval` does), the model card reads it. It holds results only, never estimates, and says
what they were measured on. Task results keep lm-eval's own form, so that its output can be copied in unchanged.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.output_folder import replace_file
from quad_modifiers.records.json_record import read_record

EVALUATION_NAME = "evaluation.json"
Interval = tuple[float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerplexityResult(_Strict):
    """One perplexity.

    Attributes:
        text: name of the text for readers: "WikiText-2 test", "held-out Wikipedia articles of gensim".
        window_length: tokens in a window.
        tokens: predicted tokens.
        value: exp of the mean negative log-likelihood.
        stderr: standard error of `value`, if known.
        baseline: the original model on the same windows, if measured.
        ratio_interval: 95 % interval of value / baseline, paired over the windows.
    """

    text: str = Field(min_length=1)
    window_length: int = Field(ge=2)
    tokens: int = Field(ge=1)
    value: float = Field(gt=0)
    stderr: float | None = Field(default=None, ge=0)
    baseline: float | None = Field(default=None, gt=0)
    ratio_interval: Interval | None = None


class Comparison(_Strict):
    """A task's score beside that of the original, over the same items.

    Attributes:
        task: lm-eval's name of a task or group; "average" for the mean over several.
        metric: the metric that is compared: an accuracy, or "word_perplexity".
        items: number of items asked.
        value: the score.
        stderr: standard error of `value` over items.
        chance: score of guessing; null for a perplexity.
        baseline: the original's score.
        baseline_stderr: standard error of `baseline`.
        percent: 100 value / baseline, for an accuracy.
        percent_above_chance: 100 (value - chance) / (baseline - chance); null if the original is no better than chance.
        difference: value - baseline.
        interval: 95 % interval of the difference, by a bootstrap over the items, paired.
        percent_interval: the same of `percent`.
    """

    task: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    items: int = Field(ge=1)
    value: float
    stderr: float | None = Field(default=None, ge=0)
    chance: float | None = Field(default=None, ge=0, le=1)
    baseline: float | None = None
    baseline_stderr: float | None = Field(default=None, ge=0)
    percent: float | None = None
    percent_above_chance: float | None = None
    difference: float | None = None
    interval: Interval | None = None
    percent_interval: Interval | None = None

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is larger than its interval allows for chance."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


TaskResults = dict[str, dict[str, float | str | dict[str, float] | None]]
"""lm-eval's `results`: by task, then by "metric,filter", with "metric_stderr,filter" beside it. Keys without a comma,
such as "alias" and "sample_len", are not metrics."""


class Evaluation(_Strict):
    """The content of evaluation.json.

    Attributes:
        format_version: 1; a reader refuses any other.
        baseline: Hub id or name of the original model that the baseline numbers belong to.
        perplexity: perplexities.
        results: lm-eval's `results` of this checkpoint.
        baseline_results: lm-eval's `results` of the original.
        tasks: names of the tasks, groups and tags that were asked for.
        comparisons: one for each task, or group with a score, that has an accuracy or a word perplexity.
        average: the mean over the accuracies among them, each task counting alike.
        n_shot: lm-eval's `n-shot`: examples in the prompt, by task.
        versions: lm-eval's `versions` of the tasks.
        limit: items asked of each task, if not all.
        seed: seed of few-shot examples, windows and bootstrap.
        packages: versions of the packages that measured.
        machine: name of the machine that measured.
    """

    format_version: Literal[1]
    baseline: str | None = None
    perplexity: list[PerplexityResult] = []
    results: TaskResults = {}
    baseline_results: TaskResults = {}
    tasks: list[str] = []
    comparisons: list[Comparison] = []
    average: Comparison | None = None
    n_shot: dict[str, int] = {}
    versions: dict[str, float | str | None] = {}
    limit: int | None = Field(default=None, ge=1)
    seed: int | None = None
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
    return read_record(Evaluation, folder / EVALUATION_NAME)


def write_evaluation(evaluation: Evaluation, file: Path) -> None:
    """Writes an evaluation; what stood there before is replaced."""
    replace_file(file, evaluation.model_dump_json(indent=2, exclude_defaults=True) + "\n")


def check_replaceable(
    file: Path, tasks: Collection[str], limit: int | None, text: tuple[str, int] | None, baseline: str | None
) -> None:
    """Refuses to replace results by others that would not cover them, before these are measured.

    Args:
        file: file that the new results will replace.
        tasks: names of the tasks that will be measured.
        limit: items of each task, None for all.
        text: name of the text and tokens of a window that a perplexity will be measured on, if any.
        baseline: name of the model that will be measured beside, if any.

    Raises:
        FileExistsError: naming what would be lost.
    """
    old = read_record(Evaluation, file)
    if old is None:
        return
    lost = [task for task in old.tasks or old.results if task not in tasks]
    for each in old.perplexity:
        if (each.text, each.window_length) != text:
            lost.append(f"the perplexity on {each.text} in windows of {each.window_length}")
    if old.baseline is not None and old.baseline != baseline:
        lost.append(f"the baseline {old.baseline}")
    if limit is not None and (old.limit is None or old.limit > limit):
        lost.append(f"{'all' if old.limit is None else old.limit} items of each task instead of {limit}")
    if lost:
        raise FileExistsError(
            f"{file} holds results that this run does not measure: {', '.join(lost)}; measure these as well, choose "
            "another file with --output, or replace it with --overwrite"
        )


def task_scores(evaluation: Evaluation) -> Iterator[TaskScore]:
    """Yields every number among the task results that is not a standard error."""
    for task, metrics in evaluation.results.items():
        for key, value in metrics.items():
            metric, comma, rule = key.partition(",")
            if not comma or not isinstance(value, float) or metric.endswith("_stderr"):
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
