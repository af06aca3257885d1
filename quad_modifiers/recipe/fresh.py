"""Copies of the modifiers of a recipe, for one run: a modifier object remembers the model that it has worked on."""

import copy
from typing import Any

_STATE = frozenset({"initialized_", "finalized_", "started_", "ended_"})


def fresh_recipe(recipe: Any) -> Any:
    """Returns a recipe whose modifier objects are new ones with the same settings; text and paths stay as they are."""
    from llmcompressor.modifiers import Modifier
    from llmcompressor.recipe import Recipe

    if isinstance(recipe, Modifier):
        return _fresh(recipe)
    if isinstance(recipe, (list, tuple)):
        return [fresh_recipe(each) for each in recipe]
    if isinstance(recipe, Recipe):
        return recipe.model_copy(update={"modifiers": fresh_recipe(recipe.modifiers)})
    return recipe


def _fresh(modifier: Any) -> Any:
    settings = modifier.model_fields_set & set(type(modifier).model_fields) - _STATE
    return type(modifier)(**{name: copy.deepcopy(getattr(modifier, name)) for name in settings})
