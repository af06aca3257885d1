"""What must hold between a model and the one that it is compared with, as far as their configs tell."""

from quad_modifiers.checkpoint.opened import Opened


def need_same_type(candidate: Opened, original: Opened) -> None:
    """Refuses models of two types: one cannot be made of the other."""
    mine, theirs = candidate.architecture.model_type, original.architecture.model_type
    if mine != theirs:
        raise ValueError(f"{candidate.name} is made of a {mine} model, but the baseline is a {theirs} model")


def need_unquantized(candidate: Opened, what: str) -> None:
    """Refuses a quantized model, naming the method."""
    if candidate.quantized is not None:
        raise ValueError(
            f"{candidate.name} is quantized ({candidate.quantized}), but {what} must be the unquantized original"
        )
