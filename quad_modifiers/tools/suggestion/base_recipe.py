"""The recipe whose bits are raised, and which recipes can be one."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quad_kernels import IntegerGrid

from quad_modifiers.recipe.layer_bits import overrides_of
from quad_modifiers.tools.suggestion.sensitivities import WIDE


@dataclass(frozen=True)
class BaseRecipe:
    """A recipe whose bits may be raised.

    Attributes:
        name: as it was given.
        text: its text.
        weights: the modifier that quantizes the weights.
        inputs: the one that quantizes the inputs, if there is one.
        projection: the one that projects, if there is one.
        rotations: those that refine its rotation.
    """

    name: str
    text: str
    weights: Any
    inputs: Any
    projection: Any
    rotations: list[Any]

    @classmethod
    def read(cls, name: str | Path) -> "BaseRecipe":
        """Reads a recipe by its name or path.

        Raises:
            RecipeError, FileNotFoundError: if it cannot be used.
            ValueError: if bits of its linears cannot be raised, or not measured here.
        """
        from llmcompressor.recipe import Recipe

        from quad_modifiers.recipe import check_recipe, resolve_recipe
        from quad_modifiers.recipe.resolve import read_recipe

        check_recipe(name)
        path = resolve_recipe(name)
        by_kind: dict[str, list[Any]] = {}
        for modifier in Recipe.create_instance(str(path)).modifiers:
            by_kind.setdefault(type(modifier).__name__, []).append(modifier)

        def one(kind: str) -> Any:
            return by_kind.get(kind, [None])[0]

        weights, inputs = one("OutlierSplitGPTQ"), one("DynamicActQuant")
        problem = _problem(weights, inputs, by_kind)
        if problem:
            raise ValueError(f"the recipe {name} {problem}; choose one such as quad_w4a4 or quad_w4a4a8")
        rotations = by_kind.get("FlattenedRotation", [])
        return cls(str(name), read_recipe(path), weights, inputs, one("SVDOutlierProjection"), rotations)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def grid(self, bits: int) -> IntegerGrid:
        """Returns the grid of the weights at some bits."""
        return IntegerGrid(bits, self.weights.group_size, self.weights.symmetric)


def _problem(weights: Any, inputs: Any, by_kind: dict[str, list[Any]]) -> str:
    if weights is None:
        return f"quantizes no weights with OutlierSplitGPTQ (it has {', '.join(by_kind)})"
    if weights.bits >= WIDE:
        return f"gives the weights {weights.bits} bits already"
    for each in (weights, inputs):
        if each is not None and overrides_of(each):
            return "has overrides already"
        if each is not None and each.number_format != "int":
            return f"has numbers of {each.number_format} (number_format), which have 4 bits"
        if each is not None and each.sub_scale_bits is not None:
            return "has integers of two levels (sub_scale_bits), which take at most 4 bits"
    if inputs is not None and not inputs.symmetric:
        return "has inputs with zero points (symmetric: false), which take at most 7 bits"
    if "LowRankBranch" in by_kind:
        return "has a LowRankBranch, which is not measured here"
    return ""
