"""The section of the model card on measured quality."""

from collections.abc import Iterator

from quad_modifiers.publishing.evaluation import Comparison, Evaluation, Interval, task_scores

_NOT_A_SHARE = ("perplexity", "bits_per_byte", "loss")  # metrics of which a share means nothing


def quality_section(evaluation: Evaluation | None) -> str:
    """Returns the section; it says so if nothing was measured."""
    if evaluation is None:
        return "## Evaluation\n\nNo measured results came with this checkpoint."
    original = evaluation.baseline or "original"
    tasks = _compared(evaluation, original) if evaluation.comparisons else _reported(evaluation, original)
    lines = ["## Evaluation", *_perplexities(evaluation, original), *tasks]
    if evaluation.limit is not None:
        lines += ["", f"Of each task only the first {evaluation.limit} items were asked."]
    measured_with = ", ".join(f"{name} {version}" for name, version in evaluation.packages.items())
    context = "; ".join(part for part in (measured_with, evaluation.machine) if part)
    return "\n".join([*lines, "", f"Measured with {context}."] if context else lines)


def _perplexities(evaluation: Evaluation, original: str) -> Iterator[str]:
    if not evaluation.perplexity:
        return
    yield from ("", f"| perplexity on | this | {original} | ratio (95 % interval) |", "|---|---|---|---|")
    for one in evaluation.perplexity:
        ratio = "" if one.baseline is None else f"{one.value / one.baseline:.3f}{_interval(one.ratio_interval, '.3f')}"
        text = f"{one.text}, windows of {one.window_length} tokens, {one.tokens} predicted"
        yield f"| {text} | {_with_error(one.value, one.stderr)} | {_number(one.baseline)} | {ratio} |"


def _compared(evaluation: Evaluation, original: str) -> Iterator[str]:
    """One line a task, by its main metric."""
    yield from (
        "",
        f"| task (lm-eval) | metric | items | guessing | this | {original} | kept | kept above guessing | "
        "difference (95 % interval) |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    average = [] if evaluation.average is None else [evaluation.average]
    for each in [*evaluation.comparisons, *average]:
        cells = (
            f"**{each.task}**" if each is evaluation.average else _task(each.task, evaluation.n_shot.get(each.task)),
            each.metric,
            str(each.items),
            "" if each.chance is None else f"{each.chance:.2f}",
            _with_error(each.value, each.stderr),
            _with_error(each.baseline, each.baseline_stderr),
            _percent(each.percent),
            _percent(each.percent_above_chance),
            _difference(each),
        )
        yield f"| {' | '.join(cells)} |"


def _reported(evaluation: Evaluation, original: str) -> Iterator[str]:
    """Every metric of lm-eval's results, for files that hold no comparison."""
    scores = list(task_scores(evaluation))
    if scores:
        yield from ("", f"| task (lm-eval) | metric | this | {original} | kept |", "|---|---|---|---|---|")
    for score in scores:
        is_share = score.baseline and not any(part in score.metric for part in _NOT_A_SHARE)
        kept = _percent(100 * score.value / score.baseline) if is_share and score.baseline else ""
        task, value = _task(score.task, score.shots), _with_error(score.value, score.stderr)
        yield f"| {task} | {score.metric} | {value} | {_number(score.baseline)} | {kept} |"


def _difference(each: Comparison) -> str:
    if each.difference is None:
        return ""
    unclear = each.interval is not None and not each.distinguishable
    return f"{each.difference:+.3f}{_interval(each.interval, '+.3f')}{', no difference seen' if unclear else ''}"


def _task(name: str, shots: int | None) -> str:
    return name if shots is None else f"{name}, {shots}-shot"


def _interval(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"


def _with_error(value: float | None, stderr: float | None) -> str:
    return _number(value) + ("" if value is None or stderr is None else f" ± {stderr:.3f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} %"
