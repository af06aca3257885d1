"""GSR in short: the step of the 4-bit grid over the standard deviation, mean over the blocks, on both sides."""

from statistics import fmean

from quad_modifiers.tools.inspection.measure.results import InputRow, Inspection, WeightRow

HEADER = ("step / standard deviation, 4 bits", "before", "after")


def mean_grid_ratios(found: Inspection) -> list[tuple[str, str, str]]:
    """Returns a row of text for each group's inputs and each role's weights; "-" where a side was not measured."""
    inputs = [(f"inputs: {row.group}", row) for row in found.inputs]
    weights = [(f"weights: {row.role}", row) for row in found.weights]
    parts: list[tuple[str, InputRow | WeightRow]] = [*inputs, *weights]
    sides: dict[str, dict[str, list[float]]] = {}
    for part, row in parts:
        sides.setdefault(part, {}).setdefault(row.stage, []).append(row.step_to_std)
    return [(part, _mean(side.get("before")), _mean(side.get("after"))) for part, side in sides.items()]


def _mean(values: list[float] | None) -> str:
    return "-" if not values else f"{fmean(values):.3f}"
