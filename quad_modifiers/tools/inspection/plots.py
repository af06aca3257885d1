"""The charts of an inspection, drawn from its numbers alone: which there are, what the page says, how they look."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quad_modifiers.tools.inspection.figures import AFTER, BEFORE, INK, OTHER, WIDTH, Chart, legend_below, new_figure
from quad_modifiers.tools.inspection.measure.results import Inspection, LossRow, Surface, WeightRow

PART_TITLES = {"qkv": "q, k, v", "o": "o_proj", "gate_up": "gate, up", "down": "down_proj"}  # others by their names
_STAGE_COLOURS = {"before": BEFORE, "after": AFTER}


def charts(found: Inspection) -> Iterator[Chart]:
    """Yields the charts that there are numbers for, in the order of the page."""
    both = any(row.stage == "before" for row in found.inputs)
    sides = "before (orange) and after (blue) the projection" if both else "in the checkpoint"
    for layer in sorted({surface.layer for surface in found.surfaces}):
        yield Chart(
            f"surface-block-{layer}",
            f"Activations of block {layer}",
            "Magnitude by token and channel. Left: the model's own inputs; a few channels or tokens tower over the "
            "rest and set the grid for all. Right: the same inputs as the quantizer sees them; the towers should have "
            "gone into the outlier coordinates (orange), which stay in full precision, and what is quantized (blue) "
            "should be flat."
            if both
            else "Magnitude by token and channel, as the quantizer sees it: outlier coordinates (orange) stay in full "
            "precision; what is quantized (blue) should be flat.",
            partial(draw_surfaces, found, layer),
        )
    yield Chart(
        "spectrum",
        "Spectrum of the residual stream",
        "Energy of each direction of the normalized stream (left), held by the first directions together (middle), "
        "and the error of 4-bit U-type inputs if that many directions stay in full precision (right). A steep "
        "beginning means that few directions do most of the good; a straight tail, that more rank buys little.",
        partial(draw_spectrum, found),
    )
    yield Chart(
        "input-error",
        "Error of quantized inputs, by block",
        f"Squared error of each token's input over its energy, {sides}, at 4 and at 8 bits. Lower is better; a "
        "factor of 256 separates 4 and 8 bits where no outlier stretches the grid. Blocks that stick out are "
        "the ones to look at.",
        partial(draw_input_error, found),
    )
    yield Chart(
        "grid-ratio",
        "Step of the 4-bit grid over the standard deviation",
        "How many standard deviations of the quantized coordinates one step of the grid spans. Gaussian data of "
        "this width has about 0.4; above 1, most coordinates round to zero.",
        partial(draw_grid_ratio, found),
    )
    if found.weights:
        yield Chart(
            "weight-error",
            "Error of 4-bit weights, by block and role",
            "Signal over error of each linear's output, in dB, with its residual weight rounded to nearest and its "
            "input unquantized. Higher is better. GPTQ, which the recipes use, does better than this; the pattern "
            "stays.",
            partial(draw_weight_error, found),
        )
        yield Chart(
            "weight-grid-ratio",
            "Step of the weights' 4-bit grid over the standard deviation",
            "The same ratio as above for the rows of each residual weight, mean over rows, with the scale that has the "
            "least squared error. Lower is better.",
            partial(draw_weight_ratio, found),
        )
    if found.subject.kind == "model":
        loss = (
            "Divergence from full precision (KL, nats per token) with one part quantized to 4 bits and everything else "
            "as it was. Small values are the relative increase of the perplexity: 0.05 is 5 %. Mind the logarithmic "
            "axis. The dotted line is the rounding of the model's own dtype, below which nothing can be told."
        )
        blocks = "The same for runs of blocks: inputs and weights of these blocks at 4 bits, all others unquantized."
    else:
        loss = (
            f"Divergence (KL, nats per token). Weights, and inputs and weights: from {found.reference}. Inputs: from "
            "the checkpoint with unquantized inputs, one part quantized as stored. The axis is logarithmic."
        )
        blocks = "The same for runs of blocks: only the inputs of these blocks are quantized."
    yield Chart("loss-parts", "Where the perplexity is lost: parts", loss, partial(draw_loss_parts, found))
    yield Chart("loss-blocks", "Where the perplexity is lost: depth", blocks, partial(draw_loss_blocks, found))
    if found.blocks:
        yield Chart(
            "block-error",
            "Each block against the original's",
            "Error of the residual stream after each block (accumulated), and of what the block itself adds when "
            "it is given the original's stream, with its inputs quantized and without: the distance between the "
            "last two is due to the inputs, the rest to the weights.",
            partial(draw_block_error, found),
        )


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
    channels, tokens = np.arange(columns) * surface.channels / columns, np.arange(rows) * surface.tokens / rows
    colours = colormaps["Blues"](0.35 + 0.6 * values / top)
    colours[:, : surface.outliers] = colormaps["Oranges"](0.35 + 0.6 * values[:, : surface.outliers] / top)
    flat = {"linewidth": 0, "antialiased": False, "shade": False}
    grid = np.meshgrid(channels, tokens)
    axes.plot_surface(*grid, values, facecolors=colours, rcount=rows, ccount=columns, **flat).set_rasterized(True)
    axes.set(zlim=(0, top), xlabel="channel", ylabel="token", zlabel="magnitude")
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((1.6, 1.1, 0.8), zoom=0.98)
    axes.set_title(f"{_title(surface.group)}, {surface.stage}", y=0.98)
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


def _title(group: str) -> str:
    return f"Input of {PART_TITLES.get(group, group)}"


def _by_group(
    found: Inspection, height: float, ylabel: str, lines: Mapping[str, tuple[str, str]], **limits: Any
) -> Figure:
    """Draws fields of the inputs by block, one panel a group; `lines` are (end of the label, style) by field."""
    groups = found.subject.groups
    panels = -(-len(groups) // 2)
    figure, grid = new_figure(height * panels / 2, panels, 2, sharex=True, sharey=True, squeeze=False)
    for empty in grid.flat[len(groups) :]:
        empty.set_axis_off()
    for (group, writes), axes in zip(groups.items(), grid.flat, strict=False):
        axes.set_title(f"{_title(group)} ({'D' if writes else 'U'}-type)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for stage, colour in _STAGE_COLOURS.items():
            rows = [row for row in found.inputs if row.stage == stage and row.group == group]
            for field, (label, style) in lines.items() if rows else ():
                values = [getattr(row, field) for row in rows]
                axes.plot([row.layer for row in rows], values, color=colour, label=stage + label, linestyle=style)
    for row in grid:
        row[0].set_ylabel(ylabel)
    for bottom in grid[-1]:
        bottom.set_xlabel("block")
    axes.set(**limits)  # shared by all
    legend_below(figure, axes)
    return figure


def draw_input_error(found: Inspection) -> Figure:
    """Draws input errors by block, one panel a group."""
    lines = {"error_4bit": (", 4 bits", "-"), "error_8bit": (", 8 bits", ":")}
    return _by_group(found, 5.2, "relative squared error", lines, yscale="log")


def draw_grid_ratio(found: Inspection) -> Figure:
    """Draws step over standard deviation by block, one panel a group."""
    return _by_group(found, 4.8, "step / standard deviation", {"step_to_std": ("", "-")}, ylim=(0, None))


def draw_weight_error(found: Inspection) -> Figure:
    """Draws output errors of the weights, block by role."""
    return _by_role(found, lambda row: _decibels(row.output_error), "signal / error, dB")


def draw_weight_ratio(found: Inspection) -> Figure:
    """Draws step over standard deviation of the weights, block by role."""
    return _by_role(found, lambda row: row.step_to_std, "step / standard deviation")


def _by_role(found: Inspection, value: Callable[[WeightRow], float], label: str) -> Figure:
    stages = [stage for stage in ("before", "after") if any(row.stage == stage for row in found.weights)]
    roles = list(dict.fromkeys(row.role for row in found.weights))
    low, high = np.percentile([value(row) for row in found.weights], (2, 98))
    figure, grid = new_figure(2.4 * len(stages), len(stages), 1, sharex=True, squeeze=False)
    for stage, axes in zip(stages, grid[:, 0], strict=True):
        image = np.full((len(roles), found.subject.layers), np.nan)
        for row in found.weights:
            if row.stage == stage:
                image[roles.index(row.role), row.layer] = value(row)
        drawn = axes.imshow(image, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set(title=f"{stage} the projection", yticks=range(len(roles)), yticklabels=roles)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    figure.colorbar(drawn, ax=list(grid[:, 0]), label=label, extend="both", shrink=0.9)
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


def _floor(found: Inspection) -> list[float]:
    """Returns the loss with nothing quantized: the rounding of the model's own dtype."""
    return [row.divergence for row in found.losses if row.part == "nothing" and row.stage == "after"]


def draw_loss_parts(found: Inspection) -> Figure:
    """Draws the divergence of every part."""
    rows = _part_rows(found)
    figure, axes = new_figure(0.7 + 0.27 * len(rows))
    positions = range(len(rows))
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
    for value in _floor(found):
        axes.axvline(value, color=INK, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="divergence, nats per token (KL)")
    axes.set_yticks(positions, labels=[label for label, _ in rows])
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
    for value in _floor(found):
        axes.axhline(value, color=INK, linestyle=":", linewidth=1)
    axes.set(ylabel="divergence, nats per token", xlabel="blocks")
    axes.set_xticks(range(len(rows)), labels=[row.part.partition(" ")[2] for row in rows])
    axes.grid(axis="x", visible=False)
    return figure


def draw_block_error(found: Inspection) -> Figure:
    """Draws errors of the stream by block."""
    figure, axes = new_figure(3.2)
    layers = [row.layer for row in found.blocks]
    for field, colour, style, label in (
        ("accumulated", AFTER, "-", "accumulated, of the stream"),
        ("alone", BEFORE, "-", "this block alone, of what it adds"),
        ("alone_weights", OTHER, "--", "this block alone, inputs unquantized"),
    ):
        errors = [getattr(row, field) for row in found.blocks]
        axes.plot(layers, errors, color=colour, linestyle=style, label=label)
    axes.set(yscale="log", xlabel="block", ylabel="relative squared error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, axes)
    return figure
