"""The loss over the steps, as numbers and as a picture."""

import json
from pathlib import Path
from typing import Any

CURVE_NUMBERS, CURVE_PICTURE = "loss_curve.json", "loss_curve.png"


def write_curve(history: list[dict[str, Any]], folder: Path, loss: str) -> None:
    """Writes `loss_curve.json` and, where matplotlib is installed, `loss_curve.png`; `loss` names the axis."""
    training = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    validation = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    numbers = {"loss": loss, "training": training, "validation": validation}
    (folder / CURVE_NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot: no display, no global state
    axes = figure.add_subplot()
    for points, label, style in ((training, "training", "-"), (validation, "validation", "o-")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel(loss)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / CURVE_PICTURE, dpi=150)
