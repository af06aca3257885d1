"""A model seen through its architecture: every walk over blocks, groups and linears goes through here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.architecture import Architecture, Group, Member, Space
from quad_modifiers.model.geometry import ModelGeometry


@dataclass(frozen=True)
class PlacedLinear:
    """A linear of a block.

    Attributes:
        group: the group that it belongs to, as data.
        member: its place in the group.
        layer: index of the block.
        name: dotted path from the model.
        parent: module that holds it.
    """

    group: Group
    member: Member
    layer: int
    name: str
    parent: nn.Module

    @property
    def role(self) -> str:
        """Name in recipes and checkpoints, alike in every block."""
        return self.member.role

    @property
    def module(self) -> Any:
        """The module at this place now."""
        return getattr(self.parent, self._attribute)

    @property
    def _attribute(self) -> str:
        return self.name.rpartition(".")[2]

    def replace(self, module: nn.Module) -> None:
        """Puts another module in this place."""
        setattr(self.parent, self._attribute, module)


@dataclass(frozen=True)
class PlacedGroup:
    """A group of a block, or one repetition of a repeated group.

    Attributes:
        group: the group as data.
        layer: index of the block.
        path: dotted path of the parent from the model; says which repetition it is.
        parent: module that holds the linears.
        norm: the norm whose output the linears read, None for groups that do not read the stream.
        linears: the members, in order.
    """

    group: Group
    layer: int
    path: str
    parent: nn.Module
    norm: nn.Module | None
    linears: tuple[PlacedLinear, ...]

    @property
    def names(self) -> str:
        """All linears in one text, for messages: "model.layers.0.self_attn.q_proj,k_proj,v_proj"."""
        return f"{self.path}." + ",".join(linear.member.name for linear in self.linears)


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Attributes:
        index: position among the blocks.
        name: dotted path from the model.
        module: the block.
        groups: its groups in run order, repeated ones once for each repetition.
        branch_factor: factor by which it multiplies what its writers add to the stream.
    """

    index: int
    name: str
    module: nn.Module
    groups: tuple[PlacedGroup, ...]
    branch_factor: float = 1.0

    def quantized_groups(self) -> tuple[PlacedGroup, ...]:
        """The groups whose linears are quantized."""
        return tuple(group for group in self.groups if group.group.quantized)

    def linears(self) -> Iterator[PlacedLinear]:
        """Yields the linears that are quantized, in run order."""
        for group in self.quantized_groups():
            yield from group.linears

    def norms(self) -> list[nn.Module]:
        """The norms that groups read, each once, in run order."""
        return list(dict.fromkeys(group.norm for group in self.groups if group.norm is not None))


class Decoder:
    """A causal LM and the names of its parts, bound together.

    Args:
        model: transformers causal LM.
        architecture: names of its parts.

    Raises:
        ValueError: naming the first part that the model does not have.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model = model
        self.architecture = architecture
        for path in (architecture.embedding, architecture.layers, architecture.final_norm, architecture.head):
            _part(model, path)
        blocks = model.get_submodule(architecture.layers).named_children()
        factor = float(getattr(model.config, architecture.branch_factor)) if architecture.branch_factor else 1.0
        self.blocks = [
            Block(index, name, block, tuple(_placed_groups(index, name, block, architecture)), factor)
            for index, (name, block) in enumerate((f"{architecture.layers}.{key}", block) for key, block in blocks)
        ]

    @cached_property
    def geometry(self) -> ModelGeometry:
        """Sizes of the model when it was first asked for them."""
        return ModelGeometry.of(self.model)

    @property
    def embedding(self) -> Any:
        """The embedding."""
        return self.model.get_submodule(self.architecture.embedding)

    @property
    def head(self) -> Any:
        """The head."""
        return self.model.get_submodule(self.architecture.head)

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding share one parameter."""
        return self.head.weight is self.embedding.weight

    @property
    def final_norm(self) -> Any:
        """The norm before the head."""
        return self.model.get_submodule(self.architecture.final_norm)

    @property
    def backbone(self) -> nn.Module:
        """The module that runs the blocks on token ids."""
        return self.model.get_submodule(self.architecture.backbone)

    def replace_embedding(self, module: nn.Module) -> None:
        """Puts another module in the place of the embedding."""
        self.model.set_submodule(self.architecture.embedding, module)

    def replace_head(self, module: nn.Module) -> None:
        """Puts another module in the place of the head."""
        self.model.set_submodule(self.architecture.head, module)

    def linears(self) -> Iterator[PlacedLinear]:
        """Yields the linears of all blocks that are quantized, in run order."""
        for block in self.blocks:
            yield from block.linears()

    def groups(self) -> Iterator[PlacedGroup]:
        """Yields the groups of all blocks that are quantized, in run order."""
        for block in self.blocks:
            yield from block.quantized_groups()

    def channels(self) -> dict[str, int]:
        """Returns the number of channels of every MLP, by the path of its parent; a shared expert may have its own."""
        return {
            group.path: group.linears[0].module.in_features
            for group in self.groups()
            if group.group.reads == "channels"
        }

    @torch.no_grad()
    def run(self, window: torch.Tensor) -> None:
        """Runs the blocks on one window of token ids, `[1, tokens]`, without the head."""
        self.backbone(input_ids=window.to(self.model.device), use_cache=False)

    def check_linears(self) -> None:
        """Checks that the linears are plain `nn.Linear` modules with the output channels that the data promises.

        Raises:
            ValueError: naming the first that is not.
        """
        sizes, channels = self.geometry.sizes(), self.channels()
        for block in self.blocks:
            for group in block.groups:
                sizes["channels"] = channels.get(group.path, self.geometry.intermediate)
                for linear in group.linears:
                    module = linear.module
                    where = f"layer {block.index} {linear.name.removeprefix(block.name + '.')}"
                    if type(module) is not nn.Linear:
                        raise ValueError(
                            f"{where} is a {type(module).__name__}, not a plain Linear: the model is already quantized "
                            "or adapted; start from the full-precision model"
                        )
                    _check_channels(where, module, linear.member.produces, sizes)


def _check_channels(where: str, linear: nn.Linear, produces: tuple[Space, ...], sizes: dict[Space, int]) -> None:
    if any(space not in sizes for space in produces):
        return
    wanted = sum(sizes[space] for space in produces)
    if linear.out_features != wanted:
        raise ValueError(
            f"{where} has {linear.out_features} output channels, but its architecture says {' + '.join(produces)}, "
            f"which are {wanted}; correct `produces`"
        )


def _placed_groups(index: int, name: str, block: nn.Module, architecture: Architecture) -> Iterator[PlacedGroup]:
    for group in architecture.block:
        norm = _part(block, group.norm, index) if group.norm else None
        for path in _expanded(block, group.parent, index):
            parent = _part(block, path, index)
            linears = []
            for member in group.members:
                _part(parent, member.name, index, path)
                holder = parent.get_submodule(member.name.rpartition(".")[0])
                linears.append(PlacedLinear(group, member, index, f"{name}.{path}.{member.name}", holder))
            yield PlacedGroup(group, index, f"{name}.{path}", parent, norm, tuple(linears))


def _expanded(block: nn.Module, pattern: str, index: int) -> list[str]:
    """The paths that a pattern stands for, in the order of the modules."""
    before, star, after = pattern.partition("*")
    if not star:
        return [pattern]
    before = before.rstrip(".")
    children = [f"{before}.{name}" for name, _ in _part(block, before, index).named_children()]
    return [path for child in children for path in _expanded(block, child + after, index)]


def _part(root: nn.Module, path: str, layer: int | None = None, below: str = "") -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        where = "" if layer is None else f"layer {layer} of "
        full = f"{below}.{path}" if below else path
        remedy = "" if layer is not None else "; a model with its head is loaded by AutoModelForCausalLM"
        raise ValueError(
            f"{where}the model has no part named {full!r}, which its architecture needs{remedy}"
        ) from error
