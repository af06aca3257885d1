"""What all charts have in common: colours, size, and how a figure becomes an SVG that fits a light and a dark page."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1b2733"  # text and axes; the page replaces it by the colour of its own text
BEFORE, AFTER, OTHER = "#d5702a", "#2f86c9", "#3a9d6e"  # told apart by colour-blind readers too, on white and black
SERIES = (AFTER, BEFORE, OTHER, "#b0699f", "#c9a227", "#7d8794", "#6f5bb5")
WIDTH = 10.5  # inches, for the full width of the page

_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Chart:
    """A figure with what the page says about it."""

    name: str  # file name of the PNG, without its ending
    title: str  # heading above the chart
    caption: str  # text that says what the chart shows and what to look for
    draw: Callable[[], Figure]  # function that makes the figure


def draw(chart: Chart) -> tuple[str, bytes]:
    """Returns a chart as SVG for the page and as PNG for everything else; the same numbers give the same bytes."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = chart.draw()
        vector, pixels = io.StringIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(vector, format="svg", pad_inches=0.05, dpi=130, metadata=nothing, bbox_inches="tight")
        unnamed = {"Software": None}
        figure.savefig(pixels, format="png", dpi=160, facecolor="white", metadata=unnamed, bbox_inches="tight")
    return _inline(vector.getvalue(), chart), pixels.getvalue()


def _inline(svg: str, chart: Chart) -> str:
    """Returns an SVG that can be embedded in an HTML page: no prologue, no metadata, names of its own, no addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{chart.name}-", svg)
    return svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{chart.title}"', 1)


def new_figure(height: float, rows: int = 1, columns: int = 1, **arguments: Any) -> tuple[Figure, Any]:
    """Returns a figure of the page's width and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **arguments)


def legend_below(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """Puts one legend for all axes under them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
