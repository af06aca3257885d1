"""Measured results as the cells of a table, for the model card and for `quad eval`."""

from quad_modifiers.records.evaluation_record import Comparison, Interval, PerplexityResult

NO_DIFFERENCE = "no difference seen"


def score_cells(each: Comparison) -> tuple[str, ...]:
    """Returns metric, items, guessing, score; then baseline, kept, kept above guessing, difference, and a remark."""
    return (
        each.metric,
        str(each.items),
        "" if each.chance is None else f"{each.chance:.2f}",
        with_error(each.value, each.stderr),
        with_error(each.baseline, each.baseline_stderr),
        percent(each.percent),
        percent(each.percent_above_chance),
        "" if each.difference is None else f"{each.difference:+.3f}{_between(each.interval, '+.3f')}",
        "" if each.interval is None or each.distinguishable else NO_DIFFERENCE,
    )


def perplexity_cells(each: PerplexityResult) -> tuple[str, ...]:
    """Returns text, window length, predicted tokens, perplexity; then baseline, ratio, and a remark."""
    within = each.ratio_interval is not None and each.ratio_interval[0] <= 1 <= each.ratio_interval[1]
    return (
        each.text,
        str(each.window_length),
        str(each.tokens),
        with_error(each.value, each.stderr),
        with_error(each.baseline, None),
        "" if each.baseline is None else f"{each.value / each.baseline:.4f}{_between(each.ratio_interval, '.4f')}",
        NO_DIFFERENCE if within else "",
    )


def with_error(value: float | None, stderr: float | None) -> str:
    """Returns a value with its standard error, as far as they are known."""
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def percent(value: float | None) -> str:
    """Returns a percentage, empty if it is not known."""
    return "" if value is None else f"{value:.1f} %"


def _between(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
