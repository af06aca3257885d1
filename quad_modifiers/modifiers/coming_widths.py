"""The widths that linears will have when they are quantized, told before a projection changes them."""

from collections.abc import Iterator, Sequence
from typing import Any

from llmcompressor.modifiers import Modifier

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.recipe import coverage
from quad_modifiers.recipe.order import QUANTIZE_ACTIVATIONS, PlacedModifier


def check_group_sizes(decoder: Decoder, modifiers: Sequence[Modifier]) -> None:
    """Checks that the groups of every quantizer of a recipe divide the widths that they will find.

    A projection says what it does to widths by a method `residual_width`; one that does not is taken to change none.

    Raises:
        ValueError: naming the first linear that they do not divide.
    """
    projections = [each for each in modifiers if hasattr(type(each), "residual_width")]
    for modifier in modifiers:
        for linear in decoder.linears():
            width = linear.module.in_features
            for projection in projections:
                width = projection.residual_width(linear.group.reads, width)
            for size in _group_sizes(modifier, linear.name):
                if width % size:
                    raise ValueError(_refusal(modifier, linear.name, size, width))


def _refusal(modifier: Any, name: str, size: int, width: int) -> str:
    if QUANTIZE_ACTIVATIONS in PlacedModifier(modifier).roles and not coverage.stock_schemes(modifier):
        return f"group_size ({size}) must divide the residual width ({width}) of {name}; choose a divisor"
    return (
        f"{name}: group_size ({size}) must divide the input width ({width}) that {type(modifier).__name__} will find; "
        "choose a divisor"
    )


def _group_sizes(modifier: Any, name: str) -> Iterator[int]:
    """Yields the group sizes that a modifier has for a linear."""
    forms = (name, f"{name}.residual")
    own = getattr(modifier, "group_size", None)
    if isinstance(own, int) and own > 0 and coverage.covered(modifier, "weights", forms):
        yield own
    for scheme in coverage.stock_schemes(modifier):
        if coverage.matching(forms, scheme.targets, getattr(modifier, "ignore", None) or []):
            for part in (scheme.weights, scheme.input_activations):
                if part is not None and part.group_size is not None and part.group_size > 0:
                    yield part.group_size
