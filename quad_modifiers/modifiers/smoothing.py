"""What SmoothQuant cannot smooth: it divides the rows of one linear by factors of the inputs of the next."""

import re
from collections.abc import Iterable
from typing import Any

from quad_modifiers.model.architecture import Architecture

_REGEX = "re:"


def check_smoothing(modifiers: Iterable[Any], architecture: Architecture) -> None:
    """Checks that no modifier smooths a fused linear, of whose rows only a part meets the inputs that are scaled.

    Args:
        modifiers: of a recipe; those without `mappings`, or with none yet, are passed over.
        architecture: names of the model's parts.

    Raises:
        ValueError: naming the modifier, the linear and the remedy.
    """
    fused = [member.role for _, member in architecture.quantized_members() if len(member.produces) > 1]
    for modifier in modifiers:
        if type(modifier).__name__ != "SmoothQuantModifier":
            continue
        for _, smoothed in getattr(modifier, "mappings", None) or ():
            for pattern in [smoothed] if isinstance(smoothed, str) else smoothed:
                for role in fused:
                    if _matches(pattern, role):
                        raise ValueError(
                            f"SmoothQuantModifier smooths {pattern!r}, but the {role} of {architecture.model_type} is "
                            "several linears in one, which it cannot smooth; take a recipe without it, such as "
                            "quad_w4a4"
                        )


def _matches(pattern: str, role: str) -> bool:
    """As compressed-tensors matches names, for any module that ends with the role."""
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), f"layers.0.{role}") is not None
    return pattern.rpartition(".")[2] == role
