"""Which parts of a model are quantized alone, to see where the perplexity is lost."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.inspection.measure.groups import D_TYPE, U_TYPE, all_linears, groups_of
from quad_modifiers.tools.inspection.measure.results import Quantized

MAX_SLICES = 16  # runs of blocks that are quantized alone

Linears = list[tuple[int, str, str, QuadLinear]]  # layer, group, role, linear


@dataclass(frozen=True)
class Trial:
    """One part to quantize.

    Attributes:
        part, quantized, bits: as in `LossRow`.
        inputs: bits of the input by linear.
        weights: linears whose weights are rounded.
    """

    part: str
    quantized: Quantized
    bits: str
    inputs: dict[QuadLinear, int]
    weights: tuple[QuadLinear, ...] = ()


def input_trials(linears: Linears, architecture: Architecture) -> Iterator[Trial]:
    """Yields the inputs of all groups together, of each kind, and of each group alone."""

    def chosen(groups: Iterable[str], bits: int) -> dict[QuadLinear, int]:
        return {linear: bits for _, group, _, linear in linears if group in groups}

    everything = (*U_TYPE, *D_TYPE)
    yield Trial("all", "inputs", "4", chosen(everything, 4))
    yield Trial("all", "inputs", "8", chosen(everything, 8))
    yield Trial("U-type", "inputs", "4", chosen(U_TYPE, 4))
    yield Trial("D-type", "inputs", "4", chosen(D_TYPE, 4))
    for group in groups_of(architecture):
        yield Trial(group.name, "inputs", "4", chosen((group.name,), 4))


def weight_trials(linears: Linears) -> Iterator[Trial]:
    """Yields all weights, the weights of each role alone, and the usual whole recipes."""
    yield Trial("all", "weights", "4", {}, tuple(linear for *_, linear in linears))
    for role in dict.fromkeys(role for _, _, role, _ in linears):
        yield Trial(role, "weights", "4", {}, tuple(linear for _, _, other, linear in linears if other == role))
    everything = tuple(linear for *_, linear in linears)
    yield Trial("all", "inputs and weights", "4", dict.fromkeys(everything, 4), everything)
    mixed = {linear: 8 if group in D_TYPE else 4 for _, group, _, linear in linears}
    yield Trial("all", "inputs and weights", "U 4, D 8", mixed, everything)


def block_trials(linears: Linears) -> Iterator[Trial]:
    """Yields runs of consecutive blocks, inputs and weights together, at most `MAX_SLICES` of them."""
    layers = max(layer for layer, *_ in linears) + 1
    for start, stop in slices(layers):
        inside = tuple(linear for layer, _, _, linear in linears if start <= layer < stop)
        yield Trial(slice_name(start, stop), "inputs and weights", "4", dict.fromkeys(inside, 4), inside)


def stored_parts(linears: Linears) -> Iterator[tuple[str, set[QuadLinear]]]:
    """Yields the parts of a checkpoint whose inputs are measured alone: all, kinds, groups, runs of blocks."""

    def inside(groups: Iterable[str]) -> set[QuadLinear]:
        return {linear for _, group, _, linear in linears if group in groups}

    yield "all", inside((*U_TYPE, *D_TYPE))
    yield "U-type", inside(U_TYPE)
    yield "D-type", inside(D_TYPE)
    for group in dict.fromkeys(group for _, group, _, _ in linears):
        yield group, inside((group,))
    for start, stop in slices(max(layer for layer, *_ in linears) + 1):
        yield slice_name(start, stop), {linear for layer, _, _, linear in linears if start <= layer < stop}


def slices(layers: int) -> list[tuple[int, int]]:
    """Returns (first, behind the last) of runs of blocks of one length; the last may be shorter."""
    length = -(-layers // MAX_SLICES)
    return [(start, min(start + length, layers)) for start in range(0, layers, length)]


def slice_name(start: int, stop: int) -> str:
    """Returns "block 3" or "blocks 3-4"."""
    return f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"


def quad_linears(model: nn.Module, architecture: Architecture) -> Linears:
    """Returns (layer, group, role, linear) of all linears."""
    return list(all_linears(model, architecture))
