"""What is left of the original's score, and how sure that is."""

from __future__ import annotations

import math

import pytest

from quad_modifiers.tools.evaluation.comparison import average, compare, ratio_interval
from quad_modifiers.tools.evaluation.task_run import TaskRun


def accuracy(right: int, of: int, chance: float = 0.25, metric: str = "acc") -> TaskRun:
    values = [1.0] * right + [0.0] * (of - right)
    return TaskRun(results={}, versions={}, n_shot={}, metric=metric, values=values, chance=chance)


def documents(likelihoods: list[float], words: list[float]) -> TaskRun:
    return TaskRun({}, {}, {}, metric="word_perplexity", values=likelihoods, weights=words)


def test_percentages() -> None:
    found = compare("a", accuracy(55, 100), accuracy(65, 100))
    assert found.value == pytest.approx(0.55)
    assert found.stderr == pytest.approx(math.sqrt(0.55 * 0.45 / 99))
    assert found.percent == pytest.approx(100 * 55 / 65)
    assert found.percent_above_chance == pytest.approx(100 * 30 / 40)
    assert found.difference == pytest.approx(-0.10)


def test_interval_is_paired_and_has_the_width_of_the_differences() -> None:
    found = compare("a", accuracy(55, 100), accuracy(65, 100))
    half_width = 1.96 * math.sqrt(0.1 * 0.9 / 100)  # 10 of 100 items differ, all in one direction
    assert found.interval == pytest.approx((-0.1 - half_width, -0.1 + half_width), abs=0.015)
    assert found.distinguishable
    unpaired = 1.96 * math.hypot(found.stderr, found.baseline_stderr)
    assert (found.interval[1] - found.interval[0]) / 2 < 0.6 * unpaired
    low, high = found.percent_interval
    assert low < found.percent < high < 100


def test_equal_models_are_not_told_apart() -> None:
    found = compare("a", accuracy(55, 100), accuracy(55, 100))
    assert (found.percent, found.interval, found.distinguishable) == (100, (0, 0), False)


def test_small_differences_are_not_told_apart() -> None:
    ours, theirs = accuracy(50, 100), accuracy(50, 100)
    ours.values[0], ours.values[-1], ours.values[-2] = 0, 1, 1  # one lost, two won
    found = compare("a", ours, theirs)
    assert found.difference == pytest.approx(0.01)
    assert not found.distinguishable


def test_a_baseline_that_guesses_has_no_percentage_above_chance() -> None:
    assert compare("a", accuracy(30, 100), accuracy(25, 100)).percent_above_chance is None
    assert compare("a", accuracy(3, 100, chance=0), accuracy(0, 100, chance=0)).percent is None


def test_one_item_has_no_interval() -> None:
    found = compare("a", accuracy(1, 1), accuracy(0, 1))
    assert (found.stderr, found.interval, found.difference) == (None, None, 1)


def test_word_perplexity() -> None:
    ours, theirs = documents([-40.0, -66.0], [10, 20]), documents([-30.0, -60.0], [10, 20])
    found = compare("a", ours, theirs)
    assert found.value == pytest.approx(math.exp(106 / 30))
    assert found.baseline == pytest.approx(math.exp(90 / 30))
    assert (found.chance, found.percent, found.percent_above_chance) == (None, None, None)
    assert found.distinguishable
    assert found.interval[0] < found.difference < found.interval[1]


def test_without_baseline() -> None:
    found = compare("a", accuracy(55, 100), None)
    assert (found.value, found.baseline, found.percent, found.interval) == (0.55, None, None, None)


def test_a_task_without_known_metric_is_left_out() -> None:
    assert compare("a", TaskRun({"a": {"bleu,none": 3.0}}, {}, {}), None) is None


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a was run on 5 items by acc, on the baseline on 6 by acc"):
        compare("a", accuracy(1, 5), accuracy(1, 6))


def test_average_counts_tasks_alike_and_leaves_perplexities_out() -> None:
    ours = [accuracy(60, 100), documents([-3.0, -4.0], [1, 1]), accuracy(200, 1000, chance=0)]
    theirs = [accuracy(80, 100), documents([-2.0, -3.0], [1, 1]), accuracy(400, 1000, chance=0)]
    found = average(ours, theirs)
    assert (found.task, found.items) == ("average", 1100)
    assert found.value == pytest.approx(0.4)
    assert found.percent == pytest.approx(100 * 0.4 / 0.6)
    assert found.chance == pytest.approx(0.125)
    assert found.percent_above_chance == pytest.approx(100 * 0.275 / 0.475)
    expected = math.hypot(compare("a", ours[0], None).stderr, compare("b", ours[2], None).stderr) / 2
    assert found.stderr == pytest.approx(expected, rel=0.05)
    assert found.distinguishable


def test_average_of_one_is_none() -> None:
    assert average([accuracy(1, 5), documents([-3.0, -4.0], [1, 1])], None) is None


def test_ratio_of_perplexities() -> None:
    theirs = [3.0, 3.5, 2.5, 3.2]
    low, high = ratio_interval([each + 0.1 for each in theirs], theirs)
    assert low == pytest.approx(math.exp(0.1)) == high
    assert ratio_interval([3.0], [3.0]) is None


def test_infinite_word_perplexity_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    lost, kept = documents([-1e6, -10.0], [1.0, 10.0]), documents([-20.0, -10.0], [10.0, 10.0])
    assert compare("a", lost, kept) is None
    assert compare("a", kept, lost).baseline is None
    assert "a: the word_perplexity is not finite" in caplog.text
    rare = compare("a", documents([-1e5, -1.0], [1.0, 1e4]), kept)  # finite, but not where it drew the first one twice
    assert rare.interval is None
    assert rare.stderr is None
