"""`resolve_recipe` and `validate_recipe`: finding and checking recipes, before anything is loaded."""

from quad_modifiers.recipe.fresh import fresh_recipe
from quad_modifiers.recipe.problems import Problem, RecipeError
from quad_modifiers.recipe.resolve import builtin_recipe_folder, list_recipes, resolve_recipe
from quad_modifiers.recipe.validate import check_recipe, is_recipe_text, validate_modifiers, validate_recipe

__all__ = [
    "Problem",
    "RecipeError",
    "builtin_recipe_folder",
    "check_recipe",
    "fresh_recipe",
    "is_recipe_text",
    "list_recipes",
    "resolve_recipe",
    "validate_modifiers",
    "validate_recipe",
]
