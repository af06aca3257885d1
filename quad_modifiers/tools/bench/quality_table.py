"""The quality table, from the JSON lines of measured rows."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from quad_modifiers.tools.bench.quality import Measurement
from quad_modifiers.tools.bench.rows import CODE, NEWS, ROWS
from quad_modifiers.tools.publishing.markdown import markdown_table

_REFERENCE = "full_precision"


def read_measurements(results: Path) -> list[Measurement]:
    """Returns the latest measurement of each row, model, seed and number of calibration windows."""
    fields = Measurement.__dataclass_fields__
    latest: dict[tuple[str, str, int, int], Measurement] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        found = Measurement(**{key: value for key, value in json.loads(line).items() if key in fields})
        latest[found.model, found.row, found.seed, found.samples] = found
    return list(latest.values())


def of_row(found: Sequence[Measurement], model: str, row: str) -> list[Measurement]:
    """Returns a row's measurements by seed, of several numbers of calibration windows those with most."""
    group = [each for each in found if (each.model, each.row) == (model, row)]
    most = max((each.samples for each in group), default=0)
    return sorted((each for each in group if each.samples == most), key=lambda each: each.seed)


def render(found: Sequence[Measurement]) -> str:
    """Returns a Markdown table; several seeds of a row become median and range.

    Perplexity is on Wikipedia; of news and code it shows the ratio to full precision, of the offline tasks what is left
    of the original's mean accuracy, and of its part above guessing.
    """
    rows = []
    for model in dict.fromkeys(each.model for each in found):
        reference = next(iter(of_row(found, model, _REFERENCE)), None)
        for key, row in ROWS.items():
            group = of_row(found, model, key)
            if group:
                rows.append((model, row.title, *_cells(group, reference)))
    measures = ("perplexity", "/ original", "news", "code", "tasks", "above chance", "size", "time", "memory")
    return markdown_table(("model", "recipe", *measures), rows)


def _cells(group: list[Measurement], reference: Measurement | None) -> list[str]:
    perplexities = [each.perplexity for each in group]
    averages = [each.average for each in group if each.average is not None]
    size, seconds = group[0].checkpoint_bytes, statistics.median(each.seconds for each in group)
    return [
        _middle(perplexities, "{:.2f}"),
        "" if reference is None else f"{statistics.median(perplexities) / reference.perplexity:.3f}",
        *(_other_ratio(group, reference, text) for text in (NEWS, CODE)),
        _middle([each.percent for each in averages if each.percent is not None], "{:.1f} %"),
        _middle([each.percent_above_chance for each in averages if each.percent_above_chance is not None], "{:.1f} %"),
        f"{size / 1e6:.0f} MB" if size else "",
        f"{seconds:.0f} s" if seconds else "",
        f"{statistics.median(each.peak_bytes for each in group) / 1e9:.1f} GB",
    ]


def _other_ratio(group: list[Measurement], reference: Measurement | None, text: str) -> str:
    if reference is None or text not in reference.other_perplexities:
        return ""
    original = reference.other_perplexities[text]
    found = [each.other_perplexities[text] / original for each in group if text in each.other_perplexities]
    return f"{statistics.median(found):.3f}" if found else ""


def _middle(values: Sequence[float], form: str) -> str:
    """Returns the median, with the range if there are several."""
    if not values:
        return ""
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))}, {len(values)} seeds)"
