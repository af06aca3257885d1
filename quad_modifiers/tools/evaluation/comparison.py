"""How much of the original's score is left, and how sure that is: paired bootstrap over items.

Both models answer the same items, so their errors go together: intervals come from resampling the *items*, with both
models' values of each, and are narrower than the standard errors of the two scores suggest.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quad_modifiers.records.evaluation_record import Comparison, Interval
from quad_modifiers.tools.evaluation.task_run import WORD_PERPLEXITY, TaskRun

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

REPLICATES = 10_000
AVERAGE = "average"
_CONFIDENCE = (2.5, 97.5)  # percentiles
_BLOCK = 2**22  # numbers in memory at a time


class _Score(NamedTuple):
    """A score, its standard error, and the scores of the resamples; None for a single item, or if some are infinite."""

    value: float
    stderr: float | None
    replicates: Floats | None


def compare(task: str, run: TaskRun, baseline: TaskRun | None, seed: int = 0) -> Comparison | None:
    """Returns a task's score and, if the original was measured over the same items, what is left of its score.

    None if the task has no metric that can be compared, or its value is infinite.

    Raises:
        ValueError: if the two runs are not over the same items.
    """
    if run.metric is None or not run.values:
        return None
    if baseline is not None and (baseline.metric, len(baseline.values)) != (run.metric, len(run.values)):
        raise ValueError(
            f"{task} was run on {len(run.values)} items by {run.metric}, on the baseline on {len(baseline.values)} by "
            f"{baseline.metric}; they cannot be compared"
        )
    chance = None if run.metric == WORD_PERPLEXITY else run.chance
    ours, theirs = _score(run, seed), None if baseline is None else _score(baseline, seed)
    if not np.isfinite(ours.value):
        logger.warning("%s: the %s is not finite; it is left out", task, run.metric)
        return None
    if theirs is not None and not np.isfinite(theirs.value):
        logger.warning("%s: the baseline's %s is not finite; it is left out", task, run.metric)
        theirs = None
    return _comparison(task, run.metric, len(run.values), chance, ours, theirs)


def average(runs: Sequence[TaskRun], baselines: Sequence[TaskRun] | None, seed: int = 0) -> Comparison | None:
    """Returns the mean over the accuracies among some tasks, each task counting alike for any number of items.

    The percentages are those of the mean score, (mean of s) / (mean of b), and not means of percentages, which a task
    would dominate on which the original is close to guessing.

    `baselines` are the runs of the original, in the same order, over the same items. None if there are fewer than two
    accuracies.
    """
    chosen = [index for index, run in enumerate(runs) if run.values and run.metric not in (None, WORD_PERPLEXITY)]
    if len(chosen) < 2:
        return None
    ours = [runs[index] for index in chosen]
    theirs = None if baselines is None else _mean_score([baselines[index] for index in chosen], seed)
    items = sum(len(run.values) for run in ours)
    chance = float(np.mean([run.chance for run in ours]))
    return _comparison(AVERAGE, "accuracy", items, chance, _mean_score(ours, seed), theirs)


def ratio_interval(nll: Sequence[float], baseline_nll: Sequence[float], seed: int = 0) -> Interval | None:
    """Returns the 95 % interval of a ratio of perplexities; None for a single window.

    `nll` and `baseline_nll` are the mean negative log-likelihoods of the windows, in nats.
    """
    if len(nll) < 2:
        return None
    difference = np.asarray(nll) - np.asarray(baseline_nll)
    return _interval(np.exp(np.concatenate([shares @ difference for shares in _resamples(len(nll), seed)])))


def _comparison(
    task: str, metric: str, items: int, chance: float | None, ours: _Score, theirs: _Score | None
) -> Comparison:
    found = Comparison(task=task, metric=metric, items=items, value=ours.value, stderr=ours.stderr, chance=chance)
    if theirs is None:
        return found
    paired = None if ours.replicates is None or theirs.replicates is None else (ours.replicates, theirs.replicates)
    update: dict[str, float | Interval | None] = {
        "baseline": theirs.value,
        "baseline_stderr": theirs.stderr,
        "difference": ours.value - theirs.value,
        "interval": None if paired is None else _interval(paired[0] - paired[1]),
    }
    if chance is not None and theirs.value:
        above = theirs.value - chance
        update["percent"] = 100 * ours.value / theirs.value
        update["percent_above_chance"] = 100 * (ours.value - chance) / above if above > 0 else None
        if paired is not None and paired[1].all():
            update["percent_interval"] = _interval(100 * paired[0] / paired[1])
    return found.model_copy(update=update)


@np.errstate(over="ignore")
def _score(run: TaskRun, seed: int) -> _Score:
    values, weights = np.asarray(run.values), np.asarray(run.weights)

    def score(shares: Floats) -> Floats:
        return np.exp(-(shares @ values) / (shares @ weights)) if run.weights else shares @ values

    value = float(np.exp(-values.sum() / weights.sum()) if run.weights else values.mean())
    if len(values) < 2:
        return _Score(value, None, None)
    replicates = np.concatenate([score(shares) for shares in _resamples(len(values), seed)])
    if not np.isfinite(replicates).all():
        return _Score(value, None, None)
    stderr = replicates.std() if run.weights else values.std(ddof=1) / len(values) ** 0.5
    return _Score(value, float(stderr), replicates)


def _mean_score(runs: Sequence[TaskRun], seed: int) -> _Score:
    # Tasks are independent of each other, so each has resamples of its own.
    scores = [_score(run, seed + index) for index, run in enumerate(runs)]
    value = float(np.mean([score.value for score in scores]))
    replicates = [score.replicates for score in scores if score.replicates is not None]
    if len(replicates) < len(scores):
        return _Score(value, None, None)
    mean = np.mean(replicates, axis=0)
    return _Score(value, float(mean.std()), mean)


def _resamples(items: int, seed: int) -> Iterator[Floats]:
    """Yields blocks of [resamples, items]: each item's share in resamples with replacement, the same for a seed."""
    generator = np.random.default_rng(seed)
    left = REPLICATES
    while left:
        block = min(left, max(1, _BLOCK // items))
        yield generator.multinomial(items, np.full(items, 1 / items), size=block) / items
        left -= block


def _interval(replicates: Floats) -> Interval:
    low, high = np.percentile(replicates, _CONFIDENCE)
    return float(low), float(high)
