"""Changes single fields of a recipe: "Modifier.field=value", as `quad compress --set` takes them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from quad_modifiers.plugins.modifier_classes import near_names
from quad_modifiers.recipe.document import GROUP_SUFFIX, STAGE_SUFFIX
from quad_modifiers.recipe.problems import Problem, RecipeError
from quad_modifiers.recipe.resolve import read_recipe, resolve_recipe
from quad_modifiers.recipe.validate import TEXT_SOURCE, is_recipe_text, validate_recipe

_FORM = "write Modifier.field=value"


def overridden(recipe: Any, overrides: Sequence[str]) -> str:
    """Returns the text of a recipe with some fields changed.

    Args:
        recipe: path or name of a recipe, or its text.
        overrides: "Modifier.field=value" each; the value is YAML, and a longer path goes into a field that is a
            mapping.

    Raises:
        TypeError: if the recipe is given as modifiers.
        ValueError: if an override is not of that form, or names a modifier that the recipe has not, or twice.
        RecipeError: for an error of the recipe itself, with its line; or of an override, with all of them named.
    """
    if not isinstance(recipe, (str, Path)):
        raise TypeError(
            "overrides change a recipe that is a file, a name or text; set the fields of modifiers directly"
        )
    text = recipe if is_recipe_text(recipe) else read_recipe(resolve_recipe(recipe))
    source = TEXT_SOURCE if text is recipe else str(recipe)
    errors = _errors(str(text))
    if errors:
        raise RecipeError(source, errors)
    content = yaml.safe_load(str(text))
    for override in overrides:
        _apply(override, content)
    changed = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    errors = _errors(changed)
    if errors:
        unnumbered = [replace(each, line=None) for each in errors]  # the lines are those of no file
        raise RecipeError(f"{source} with {', '.join(overrides)}", unnumbered)
    return changed


def _errors(text: str) -> list[Problem]:
    return [each for each in validate_recipe(text) if each.severity == "error"]


def _apply(override: str, content: dict[str, Any]) -> None:
    path, equals, value = override.partition("=")
    name, *steps = path.strip().split(".")
    if not equals or not name or not all(steps) or not steps:
        raise ValueError(f"the override {override!r} names no field; {_FORM}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is not YAML; quote it, or write a list as [a, b]") from error
    fields = _fields_of(name, content, override)
    for step in steps[:-1]:
        fields = fields.setdefault(step, {})
        if not isinstance(fields, dict):
            raise ValueError(f"the override {override!r} goes into {step!r}, which is no mapping; {_FORM}")
    fields[steps[-1]] = parsed


def _fields_of(name: str, content: dict[str, Any], override: str) -> dict[str, Any]:
    """Returns the fields of the one modifier of a name."""
    stages = [stage for key, stage in content.items() if key.endswith(STAGE_SUFFIX)]
    groups = [group for stage in stages for key, group in stage.items() if key.endswith(GROUP_SUFFIX)]
    found: list[dict[str, Any]] = [group[name] for group in groups if name in group]
    if not found:
        known = [each for group in groups for each in group]
        raise ValueError(f"the override {override!r}: the recipe has no {name}; {near_names(name, known)}")
    if len(found) > 1:
        raise ValueError(f"the override {override!r}: the recipe has {len(found)} {name}; change its file")
    return found[0]
