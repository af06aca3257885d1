"""The charts of an inspection, drawn from its numbers alone."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quad_modifiers.tools.inspection.figures import AFTER, BEFORE, INK, OTHER, WIDTH, legend_below, new_figure
from quad_modifiers.tools.inspection.measure.results import Inspection, LossRow, Surface

PART_TITLES = {"qkv": "q, k, v", "o": "o_proj", "gate_up": "gate, up", "down": "down_proj"}  # others by their names
_STAGE_COLOURS = {"before": BEFORE, "after": AFTER}


def draw_surfaces(found: Inspection, layer: int) -> Figure:
    """Draws magnitudes of the inputs of one block, before and after."""
    chosen = [surface for surface in found.surfaces if surface.layer == layer]
    groups = list(dict.fromkeys(surface.group for surface in chosen))
    stages = [stage for stage in ("before", "after") if any(surface.stage == stage for surface in chosen)]
    figure = Figure(figsize=(WIDTH, 3.4 * len(groups)))
    for row, group in enumerate(groups):
        inside = [surface for surface in chosen if surface.group == group]
        top = max(max(map(max, surface.values)) for surface in inside)
        for column, stage in enumerate(stages):
            surface = next((each for each in inside if each.stage == stage), None)
            if surface is not None:
                axes = figure.add_subplot(len(groups), len(stages), row * len(stages) + column + 1, projection="3d")
                _surface(axes, surface, top)
    figure.subplots_adjust(left=0.02, right=0.95, bottom=0.04, top=0.96, wspace=0.06, hspace=0.04)
    return figure


def _surface(axes: Any, surface: Surface, top: float) -> None:
    values = np.asarray(surface.values)
    rows, columns = values.shape
    channel, token = np.meshgrid(
        np.arange(columns) * surface.channels / columns, np.arange(rows) * surface.tokens / rows
    )
    colours = colormaps["Blues"](0.35 + 0.6 * values / top)
    colours[:, : surface.outliers] = colormaps["Oranges"](0.35 + 0.6 * values[:, : surface.outliers] / top)
    drawn = axes.plot_surface(
        channel,
        token,
        values,
        facecolors=colours,
        rcount=rows,
        ccount=columns,
        linewidth=0,
        antialiased=False,
        shade=False,
    )
    drawn.set_rasterized(True)
    axes.set_zlim(0, top)
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((1.6, 1.1, 0.8), zoom=0.98)
    title = _title(surface.group)
    axes.set_title(f"{title}, {surface.stage}", y=0.98)
    axes.set_xlabel("channel")
    axes.set_ylabel("token")
    axes.set_zlabel("magnitude")
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_pane_color((0, 0, 0, 0))
        axis.line.set_color(INK)
        axis._axinfo["grid"].update(color=(0.5, 0.5, 0.5, 0.25), linewidth=0.6)


def draw_spectrum(found: Inspection) -> Figure:
    """Draws the spectrum, energy against rank, error against rank."""
    spectrum, rank = found.spectrum, found.subject.rank
    figure, (left, middle, right) = new_figure(3.3, 1, 3)
    energy = np.asarray(spectrum.energy)
    index = np.arange(1, len(energy) + 1)
    left.plot(index, np.clip(energy, energy[energy > 0].min(), None), color=AFTER)
    left.set(xscale="log", yscale="log", xlabel="direction", ylabel="share of the energy", title="Spectrum")
    middle.plot([0, *index], [0, *np.cumsum(energy)], color=AFTER)
    middle.set(xlabel="rank", ylabel="share held by the first directions", title="Energy against rank", ylim=(0, 1.02))
    ranks, errors = zip(*spectrum.errors, strict=True)
    right.plot(ranks, errors, color=AFTER, marker="o", markersize=4)
    right.set(xlabel="rank", ylabel="relative squared error", title="4-bit U-type inputs")
    right.set_xscale("symlog", linthresh=8)
    right.set_xticks(ranks, labels=[str(each) for each in ranks])
    right.minorticks_off()
    right.set_ylim(0, 1.06 * max(errors))
    for axes in (left, middle, right):
        if rank:
            axes.axvline(rank, color=BEFORE, linewidth=1.3, linestyle="--")
    if rank:
        held = spectrum.held_by(rank)
        middle.plot([rank], [held], color=BEFORE, marker="o")
        middle.annotate(f"rank {rank}: {held:.0%}", (rank, held), (8, -14), textcoords="offset points")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _title(group: str, kind: str = "") -> str:
    return f"Input of {PART_TITLES.get(group, group)}{kind}"


def _by_group(found: Inspection, height: float, ylabel: str) -> tuple[Figure, Iterable[tuple[str, Axes]]]:
    groups = found.subject.groups
    rows = -(-len(groups) // 2)
    figure, grid = new_figure(height * rows / 2, rows, 2, sharex=True, sharey=True, squeeze=False)
    axes = list(zip(groups, grid.flat, strict=False))
    for empty in grid.flat[len(groups) :]:
        empty.set_axis_off()
    for group, each in axes:
        each.set_title(_title(group, " (D-type)" if groups[group] else " (U-type)"))
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in grid:
        row[0].set_ylabel(ylabel)
    for each in grid[-1]:
        each.set_xlabel("block")
    return figure, axes


def draw_input_error(found: Inspection) -> Figure:
    """Draws input errors by block, one panel a group."""
    figure, grid = _by_group(found, 5.2, "relative squared error")
    for group, axes in grid:
        axes.set_yscale("log")
        for stage, colour in _STAGE_COLOURS.items():
            rows = [row for row in found.inputs if row.stage == stage and row.group == group]
            if rows:
                layers = [row.layer for row in rows]
                axes.plot(layers, [row.error_4bit for row in rows], color=colour, label=f"{stage}, 4 bits")
                axes.plot(
                    layers, [row.error_8bit for row in rows], color=colour, linestyle=":", label=f"{stage}, 8 bits"
                )
    legend_below(figure, axes)
    return figure


def draw_grid_ratio(found: Inspection) -> Figure:
    """Draws step over standard deviation by block, one panel a group."""
    figure, grid = _by_group(found, 4.8, "step / standard deviation")
    for group, axes in grid:
        for stage, colour in _STAGE_COLOURS.items():
            rows = [row for row in found.inputs if row.stage == stage and row.group == group]
            if rows:
                axes.plot([row.layer for row in rows], [row.step_to_std for row in rows], color=colour, label=stage)
    axes.set_ylim(bottom=0)  # shared by all, and known only now
    legend_below(figure, axes)
    return figure


def draw_weight_error(found: Inspection) -> Figure:
    """Draws output errors of the weights, block by role."""
    stages = [stage for stage in ("before", "after") if any(row.stage == stage for row in found.weights)]
    roles = list(dict.fromkeys(row.role for row in found.weights))
    low, high = np.percentile([_decibels(row.output_error) for row in found.weights], (2, 98))
    figure, grid = new_figure(2.4 * len(stages), len(stages), 1, sharex=True, squeeze=False)
    for stage, axes in zip(stages, grid[:, 0], strict=True):
        image = np.full((len(roles), found.subject.layers), np.nan)
        for row in found.weights:
            if row.stage == stage:
                image[roles.index(row.role), row.layer] = _decibels(row.output_error)
        drawn = axes.imshow(image, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set(title=f"{stage} the projection", yticks=range(len(roles)), yticklabels=roles)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    figure.colorbar(drawn, ax=list(grid[:, 0]), label="signal / error, dB", extend="both", shrink=0.9)
    return figure


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-12))


def _part_rows(found: Inspection) -> list[tuple[str, list[LossRow]]]:
    """Returns (label, rows of both sides) for every part that is neither a run of blocks nor empty."""
    labelled: dict[str, list[LossRow]] = {}
    for row in found.losses:
        if row.part != "nothing" and not row.part.startswith("block"):
            bits = {"4": "", "as stored": "", "8": ", 8 bits"}.get(row.bits, f", {row.bits}")
            labelled.setdefault(f"{row.quantized}: {PART_TITLES.get(row.part, row.part)}{bits}", []).append(row)
    return list(labelled.items())


def draw_loss_parts(found: Inspection) -> Figure:
    """Draws the divergence of every part."""
    rows = _part_rows(found)
    figure, axes = new_figure(0.7 + 0.27 * len(rows))
    positions = range(len(rows))
    floor = [row.divergence for row in found.losses if row.part == "nothing" and row.stage == "after"]
    for stage, colour in _STAGE_COLOURS.items():
        points = [
            (max(row.divergence, 1e-6), position)
            for position, (_, both) in enumerate(rows)
            for row in both
            if row.stage == stage
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, s=38, label=f"{stage} the projection", zorder=3)
            for value, position in points:
                axes.annotate(f"{value:.3f}", (value, position), (7, -3), textcoords="offset points", fontsize=8)
    for value in floor:
        axes.axvline(value, color=INK, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="divergence, nats per token (KL)", yticks=positions)
    axes.set_yticklabels([label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if found.subject.kind == "model":
        axes.legend(loc="lower right")
    return figure


def draw_loss_blocks(found: Inspection) -> Figure:
    """Draws the divergence of every run of blocks."""
    rows = [row for row in found.losses if row.part.startswith("block")]
    figure, axes = new_figure(2.9)
    axes.bar(range(len(rows)), [row.divergence for row in rows], color=AFTER, width=0.72)
    for row in found.losses:
        if row.part == "nothing" and row.stage == "after":
            axes.axhline(row.divergence, color=INK, linestyle=":", linewidth=1)
    axes.set(ylabel="divergence, nats per token", xticks=range(len(rows)), xlabel="blocks")
    axes.set_xticklabels([row.part.partition(" ")[2] for row in rows])
    axes.grid(axis="x", visible=False)
    return figure


def draw_block_error(found: Inspection) -> Figure:
    """Draws errors of the stream by block."""
    figure, axes = new_figure(3.2)
    layers = [row.layer for row in found.blocks]
    axes.plot(layers, [row.accumulated for row in found.blocks], color=AFTER, label="accumulated, of the stream")
    axes.plot(layers, [row.alone for row in found.blocks], color=BEFORE, label="this block alone, of what it adds")
    axes.plot(
        layers,
        [row.alone_weights for row in found.blocks],
        color=OTHER,
        linestyle="--",
        label="this block alone, inputs unquantized",
    )
    axes.set(yscale="log", xlabel="block", ylabel="relative squared error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, axes)
    return figure
