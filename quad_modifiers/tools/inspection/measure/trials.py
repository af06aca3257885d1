"""Which parts of a model are quantized alone, to see where the perplexity is lost."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quad_modifiers.model.decoder import PlacedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.inspection.measure.results import Quantized

MAX_SLICES = 16  # runs of blocks that are quantized alone

Linears = list[PlacedLinear]


@dataclass(frozen=True)
class Trial:
    """One part to quantize.

    Attributes:
        part, quantized, bits: fields of the `LossRow`.
        inputs: bits of the input by linear.
        weights: linears whose weights are rounded.
    """

    part: str
    quantized: Quantized
    bits: str
    inputs: dict[QuadLinear, int]
    weights: tuple[QuadLinear, ...] = ()


def input_trials(linears: Linears) -> Iterator[Trial]:
    """Yields the inputs of all groups together, of each kind, and of each group alone."""

    def chosen(bits: int, **wanted: Any) -> dict[QuadLinear, int]:
        return {linear.module: bits for linear in linears if _is(linear, **wanted)}

    yield Trial("all", "inputs", "4", chosen(4))
    yield Trial("all", "inputs", "8", chosen(8))
    yield Trial("U-type", "inputs", "4", chosen(4, writes=False))
    yield Trial("D-type", "inputs", "4", chosen(4, writes=True))
    for group in _group_names(linears):
        yield Trial(group, "inputs", "4", chosen(4, group=group))


def _is(linear: PlacedLinear, writes: bool | None = None, group: str | None = None) -> bool:
    return writes in (None, linear.group.writes_stream) and group in (None, linear.group.name)


def _group_names(linears: Linears) -> list[str]:
    return list(dict.fromkeys(linear.group.name for linear in linears))


def weight_trials(linears: Linears) -> Iterator[Trial]:
    """Yields all weights, the weights of each role alone, and the usual whole recipes."""
    everything = tuple(linear.module for linear in linears)
    yield Trial("all", "weights", "4", {}, everything)
    for role in dict.fromkeys(linear.role for linear in linears):
        yield Trial(role, "weights", "4", {}, tuple(linear.module for linear in linears if linear.role == role))
    yield Trial("all", "inputs and weights", "4", dict.fromkeys(everything, 4), everything)
    mixed = {linear.module: 8 if linear.group.writes_stream else 4 for linear in linears}
    yield Trial("all", "inputs and weights", "U 4, D 8", mixed, everything)


def block_trials(linears: Linears) -> Iterator[Trial]:
    """Yields runs of consecutive blocks, inputs and weights together, at most `MAX_SLICES` of them."""
    for start, stop in slices(_layers(linears)):
        inside = tuple(linear.module for linear in linears if start <= linear.layer < stop)
        yield Trial(slice_name(start, stop), "inputs and weights", "4", dict.fromkeys(inside, 4), inside)


def stored_parts(linears: Linears) -> Iterator[tuple[str, set[QuadLinear]]]:
    """Yields the parts of a checkpoint whose inputs are measured alone: all, kinds, groups, runs of blocks."""

    def inside(**wanted: Any) -> set[QuadLinear]:
        return {linear.module for linear in linears if _is(linear, **wanted)}

    yield "all", inside()
    yield "U-type", inside(writes=False)
    yield "D-type", inside(writes=True)
    for group in _group_names(linears):
        yield group, inside(group=group)
    for start, stop in slices(_layers(linears)):
        yield slice_name(start, stop), {linear.module for linear in linears if start <= linear.layer < stop}


def _layers(linears: Linears) -> int:
    return max(linear.layer for linear in linears) + 1


def slices(layers: int) -> list[tuple[int, int]]:
    """Returns (first, last + 1) of runs of blocks of one length; the last may be shorter."""
    length = -(-layers // MAX_SLICES)
    return [(start, min(start + length, layers)) for start in range(0, layers, length)]


def slice_name(start: int, stop: int) -> str:
    """Returns "block 3" or "blocks 3-4"."""
    return f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"
