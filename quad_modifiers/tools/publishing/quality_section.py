"""The section of the model card on measured quality."""

from collections.abc import Iterator

from quad_modifiers.records.evaluation_record import Evaluation, task_scores
from quad_modifiers.records.score_cells import percent, perplexity_cells, score_cells, with_error

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
    if evaluation.perplexity:
        header = f"| perplexity on | window | tokens | this | {original} | ratio, 95 % interval | |"
        yield from ("", header, f"|{'---|' * 7}")
    for one in evaluation.perplexity:
        yield f"| {' | '.join(perplexity_cells(one))} |"


def _compared(evaluation: Evaluation, original: str) -> Iterator[str]:
    """Returns one line a task, by its main metric."""
    header = "| task (lm-eval) | metric | items | guessing | this "
    yield from ("", f"{header}| {original} | kept | above guessing | difference, 95 % interval | |", f"|{'---|' * 10}")
    for each in evaluation.comparisons:
        task = _task(each.task, evaluation.n_shot.get(each.task))
        yield f"| {task} | {' | '.join(score_cells(each))} |"
    if evaluation.average is not None:
        yield f"| **average** | {' | '.join(score_cells(evaluation.average))} |"


def _reported(evaluation: Evaluation, original: str) -> Iterator[str]:
    """Returns every metric of lm-eval's results, for files without a comparison."""
    scores = list(task_scores(evaluation))
    if scores:
        yield from ("", f"| task (lm-eval) | metric | this | {original} | kept |", "|---|---|---|---|---|")
    for score in scores:
        is_share = score.baseline and not any(part in score.metric for part in _NOT_A_SHARE)
        kept = percent(100 * score.value / score.baseline) if is_share and score.baseline else ""
        task, value = _task(score.task, score.shots), with_error(score.value, score.stderr)
        yield f"| {task} | {score.metric} | {value} | {with_error(score.baseline, None)} | {kept} |"


def _task(name: str, shots: int | None) -> str:
    return name if shots is None else f"{name}, {shots}-shot"
