"""A recipe's projection alone, applied to a model in memory by the recipe's own modifier."""

from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.projection.apply import apply_projection

if TYPE_CHECKING:
    from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

_NAME = "SVDOutlierProjection"


def projection_of(recipe: str, rank: int | None) -> "SVDOutlierProjection":
    """Returns the projection of a recipe, with another rank if one is given.

    Raises:
        RecipeError: if the recipe cannot be used.
        FileNotFoundError: if there is no such recipe.
        ValueError: if it has no projection, or the rank is negative.
    """
    from llmcompressor.recipe import Recipe

    from quad_modifiers.recipe import check_recipe, resolve_recipe

    check_recipe(recipe)
    modifiers = Recipe.create_instance(str(resolve_recipe(recipe))).modifiers
    found = [modifier for modifier in modifiers if type(modifier).__name__ == _NAME]
    if not found:
        names = ", ".join(type(modifier).__name__ for modifier in modifiers)
        raise ValueError(f"the recipe {recipe} has no {_NAME}, only {names}; choose one with it, such as quad_w4a4")
    first, kind = found[0], type(found[0])
    if rank is None:
        return first
    return kind(**{**first.model_dump(include=set(kind.model_fields)), "rank": rank})


def project(model: Any, projection: "SVDOutlierProjection", windows: list[torch.Tensor]) -> None:
    """Projects a model in place; its function stays the same. Refuses a rank that does not fit the model."""
    from quad_modifiers.modifiers.base import prepared_decoder

    decoder = prepared_decoder(model)
    projection.check(decoder)
    for linear in decoder.linears():
        linear.module.take_bias()
    apply_projection(decoder, projection.plan(decoder, lambda: [{"input_ids": window} for window in windows]))
