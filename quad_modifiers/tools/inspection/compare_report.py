"""The table, the charts and the page of a comparison."""

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quad_modifiers.records.inventory import KIND_NAMES
from quad_modifiers.tools.inspection.compared import Comparison, comparison_rows
from quad_modifiers.tools.inspection.figures import INK, SERIES, Chart, legend_below, new_figure
from quad_modifiers.tools.inspection.page import Section, folded, page, preformatted, table


def charts(found: Comparison) -> Iterator[Chart]:
    """Yields the charts that there are numbers for."""
    yield Chart(
        "size",
        "Size of the tensors",
        "What the bytes are spent on. Where embedding and head are a large share, EmbeddingHeadQuant shrinks them.",
        partial(_size, found),
    )
    for lower_is_better, name, title in ((True, "perplexity", "Perplexity"), (False, "tasks", "Tasks")):
        if any(score.is_perplexity == lower_is_better for entry in found.entries for score in entry.scores):
            caption = (
                "From evaluation.json, with one standard error where it is known. "
                f"{'Lower' if lower_is_better else 'Higher'} is better; the dotted mark is the original."
            )
            yield Chart(name, title, caption, partial(_scores, found, lower_is_better))
    if found.baseline is not None:
        yield Chart(
            "block-error",
            "Error of the residual stream, by block",
            "Squared error of the stream after each block, against the original's on the same text and in its "
            "basis, mean over tokens; everything before the block is quantized as well. Lower is better.",
            partial(_blocks, found, "accumulated"),
        )
        yield Chart(
            "block-alone",
            "Error of each block alone",
            "Error of what a block adds to the stream when it is given the original's stream. Peaks are the blocks "
            "to treat differently.",
            partial(_blocks, found, "alone"),
        )


def comparison_page(found: Comparison, charts: Sequence[Section]) -> str:
    """Returns the page of a comparison."""
    header, rows = comparison_rows(found)
    caption = "Read from the files of each checkpoint."
    if found.settings is not None:
        measured = found.settings
        caption += (
            f" The rows against the original: {measured.text}, {measured.measured_windows} windows of "
            f"{measured.window_length} tokens, seed {measured.seed}, on {measured.machine}."
        )
    texts = [(entry.name, entry.recipe) for entry in found.entries if entry.recipe is not None]
    recipes = "".join(folded(name, preformatted(recipe)) for name, recipe in texts)
    sections = [Section("table", "Side by side", caption, table(header, rows)), *charts]
    if recipes:
        sections.append(Section("recipes", "Recipes", "As the checkpoints hold them.", recipes))
    smallest = min(found.entries, key=lambda entry: entry.total)
    cards = [(f"{smallest.total / 1e6:.1f} MB", f"smallest: {smallest.name}")]
    divergences = [(entry.loss.divergence, entry.name) for entry in found.entries if entry.loss is not None]
    if divergences:
        nearest, name = min(divergences, key=itemgetter(0))
        cards.append((f"{nearest:.3f} nats", f"nearest to the original: {name}"))
    subtitle = "without a baseline" if found.baseline is None else f"original: {found.baseline}"
    return page(f"Comparison of {len(found.entries)} checkpoints", subtitle, cards, sections)


def _colour(index: int) -> str:
    return SERIES[index % len(SERIES)]


def _size(found: Comparison) -> Figure:
    figure, axes = new_figure(0.9 + 0.42 * len(found.entries))
    start = np.zeros(len(found.entries))
    for index, (kind, title) in enumerate(KIND_NAMES.items()):
        sizes = np.array([entry.bytes_of.get(kind, 0) / 1e6 for entry in found.entries])
        if sizes.any():
            axes.barh(range(len(sizes)), sizes, left=start, height=0.6, color=_colour(index), label=title)
            start += sizes
    for position, total in enumerate(start):
        axes.annotate(f"{total:.1f}", (total, position), (5, -3), textcoords="offset points")
    axes.set_yticks(range(len(start)), labels=[entry.name for entry in found.entries])
    axes.set_ylim(len(start) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set(xlabel="MB")
    legend_below(figure, axes, columns=4)
    return figure


def _scores(found: Comparison, lower_is_better: bool) -> Figure:
    every = [score for entry in found.entries for score in entry.scores]
    names = list(dict.fromkeys(score.what for score in every if score.is_perplexity == lower_is_better))
    figure, axes = new_figure(1.0 + 0.2 * len(names) * (len(found.entries) + 1))
    height = 0.8 / len(found.entries)
    for index, entry in enumerate(found.entries):
        scores = {score.what: score for score in entry.scores}
        shown = [(position, scores[name]) for position, name in enumerate(names) if name in scores]
        places = [position + (index - (len(found.entries) - 1) / 2) * height for position, _ in shown]
        axes.barh(places, [s.value for _, s in shown], height=0.85 * height, color=_colour(index), label=entry.name)
        for place, (_, score) in zip(places, shown, strict=True):
            if score.stderr:
                axes.errorbar(score.value, place, xerr=score.stderr, color=INK, linewidth=1, capsize=2)
            if score.baseline is not None:
                ends = (place - height / 2, place + height / 2)
                axes.plot([score.baseline] * 2, ends, color=INK, linestyle=":", linewidth=1.6)
    axes.set_yticks(range(len(names)), labels=names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("perplexity" if lower_is_better else "score")
    legend_below(figure, axes, columns=3)
    return figure


def _blocks(found: Comparison, field: str) -> Figure:
    figure, axes = new_figure(3.4)
    for index, entry in enumerate(found.entries):
        layers = [row.layer for row in entry.blocks]
        errors = [getattr(row, field) for row in entry.blocks]
        axes.plot(layers, errors, color=_colour(index), label=entry.name)
    axes.set(yscale="log", xlabel="block", ylabel="relative squared error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, axes, columns=3)
    return figure
