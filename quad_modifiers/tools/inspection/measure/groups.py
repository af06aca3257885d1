"""The linears of a block by the input that they share."""

from collections.abc import Iterator
from typing import NamedTuple

from quad_kernels import InputQuantization, InputSplit
from torch import nn

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.nn.quad_linear import QuadLinear

# The clip ratios of the shipped recipes: a 4-bit grid that clips a little has less error, an 8-bit one is fine enough.
INPUT_GRIDS = {4: InputQuantization(4, clip_ratio=0.86), 8: InputQuantization(8, clip_ratio=1.0)}

U_TYPE = ("qkv", "gate_up")
D_TYPE = ("o", "down")


class Group(NamedTuple):
    """Linears that share an input; `paths` are relative to the block."""

    name: str
    paths: tuple[str, ...]


def groups_of(architecture: Architecture) -> tuple[Group, ...]:
    """Returns the four groups of a block, in the order in which they run."""
    a = architecture
    return (
        Group("qkv", tuple(f"{a.attention}.{name}" for name in a.attention_inputs)),
        Group("o", (f"{a.attention}.{a.attention_output}",)),
        Group("gate_up", tuple(f"{a.mlp}.{name}" for name in a.mlp_inputs)),
        Group("down", (f"{a.mlp}.{a.mlp_output}",)),
    )


def blocks_of(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """Returns the decoder blocks."""
    return list(model.get_submodule(architecture.layers).children())


def all_linears(model: nn.Module, architecture: Architecture) -> Iterator[tuple[int, str, str, nn.Module]]:
    """Yields (layer, group, role, linear) for every linear of the decoder blocks."""
    for layer, block in enumerate(blocks_of(model, architecture)):
        for group in groups_of(architecture):
            for path in group.paths:
                yield layer, group.name, path.rpartition(".")[2], block.get_submodule(path)


def split_of(linear: nn.Module) -> InputSplit:
    """Returns how a linear divides its input; a stock one does not."""
    return linear.split if isinstance(linear, QuadLinear) else InputSplit(linear.in_features)
