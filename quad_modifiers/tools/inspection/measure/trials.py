"""Which parts of a model are quantized alone, to see where the perplexity is lost."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quad_kernels import InputQuantization

from quad_modifiers.model.decoder import PlacedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.inspection.measure.results import Quantized

MAX_SLICES = 16  # runs of blocks that are quantized alone

Linears = list[PlacedLinear]


@dataclass(frozen=True)
class Trial:
    """One part to quantize."""

    # part, quantized, bits: fields of the `LossRow`
    part: str
    quantized: Quantized
    bits: str
    # bits of the input by linear, in the grids of the shipped recipes, or another grid
    inputs: Mapping[QuadLinear, int | InputQuantization]
    weights: tuple[QuadLinear, ...] = ()  # linears whose weights are rounded


def input_trials(linears: Linears) -> Iterator[Trial]:
    """Yields the inputs of all groups together, of each kind, and of each group alone."""
    for part, inside in _input_parts(linears):
        for bits in (4, 8) if part == "all" else (4,):
            yield Trial(part, "inputs", str(bits), dict.fromkeys(inside, bits))


def _input_parts(linears: Linears) -> Iterator[tuple[str, list[QuadLinear]]]:
    """Yields all linears, those of each kind, and those of each group."""
    yield "all", [linear.module for linear in linears]
    for kind, writes in (("U-type", False), ("D-type", True)):
        yield kind, [linear.module for linear in linears if linear.group.writes_stream == writes]
    for group in dict.fromkeys(linear.group.name for linear in linears):
        yield group, [linear.module for linear in linears if linear.group.name == group]


def _runs_of_blocks(linears: Linears) -> Iterator[tuple[str, list[QuadLinear]]]:
    for start, stop in slices(max(linear.layer for linear in linears) + 1):
        yield slice_name(start, stop), [linear.module for linear in linears if start <= linear.layer < stop]


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
    for name, inside in _runs_of_blocks(linears):
        yield Trial(name, "inputs and weights", "4", dict.fromkeys(inside, 4), tuple(inside))


def stored_parts(linears: Linears) -> Iterator[tuple[str, set[QuadLinear]]]:
    """Yields the parts of a checkpoint whose inputs are measured alone: all, kinds, groups, runs of blocks."""
    for name, inside in (*_input_parts(linears), *_runs_of_blocks(linears)):
        yield name, set(inside)


def slices(layers: int) -> list[tuple[int, int]]:
    """Returns (first, last + 1) of runs of blocks of one length; the last may be shorter."""
    length = -(-layers // MAX_SLICES)
    return [(start, min(start + length, layers)) for start in range(0, layers, length)]


def slice_name(start: int, stop: int) -> str:
    """Returns "block 3" or "blocks 3-4"."""
    return f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"
