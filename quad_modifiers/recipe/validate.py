"""Checks a recipe before a model is loaded: structure, fields, order and company of the modifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quad_modifiers.plugins.contributions import modifier_paths
from quad_modifiers.plugins.manager import PluginError, QuadPluginManager, get_plugin_manager
from quad_modifiers.plugins.modifier_classes import (
    directly_registered_modifiers,
    load_modifier,
    near_names,
    stock_modifiers,
    unknown_modifier_message,
)
from quad_modifiers.recipe.document import ModifierEntry, parse_recipe
from quad_modifiers.recipe.order import PlacedModifier, company_problems, nothing_quantized, order_problems
from quad_modifiers.recipe.problems import Problem, RecipeError
from quad_modifiers.recipe.resolve import read_recipe, resolve_recipe
from quad_modifiers.recipe.storable import Place, storage_problems

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from llmcompressor.recipe import Recipe
    from pydantic_core import ErrorDetails

TEXT_SOURCE = "<recipe>"
_LIFECYCLE_FIELDS = frozenset(("index", "group", "start", "end", "update", "requires_calibration_data"))


def validate_recipe(text_or_path: str | Path, manager: QuadPluginManager | None = None) -> list[Problem]:
    """Returns every problem of a recipe, by line; none if it is sound.

    `text_or_path` is a path, a recipe name or YAML text.

    No model is loaded. llm-compressor is imported, because its modifier classes say which fields exist.

    Raises:
        FileNotFoundError: if there is neither such a file nor a recipe of that name.
        ValueError: if the file is not UTF-8 text.
        PluginError: if an installed plugin is not valid.
    """
    manager = manager or get_plugin_manager()
    document = parse_recipe(_read(text_or_path, manager)[0])
    problems = list(document.problems)
    placed: list[PlacedModifier] = []
    for entry in document.entries:
        found = _instantiate(entry, manager)
        if isinstance(found, list):
            problems += found
        else:
            placed.append(PlacedModifier(found, entry.line))
    problems += order_problems(placed) or company_problems(placed) or storage_problems(placed)
    if not problems:
        problems += _refused_by_llmcompressor(placed) or nothing_quantized(placed)
    return sorted(problems, key=lambda problem: problem.line or 0)


def validate_modifiers(modifiers: "Sequence[Modifier]", places: Sequence[Place] | None = None) -> list[Problem]:
    """Returns what is wrong with the order and the company of modifiers built in Python; without line numbers.

    Args:
        modifiers: in order.
        places: linears of the model they are for; by default those of the known architectures.

    Raises:
        TypeError: if an element is not a modifier.
    """
    from llmcompressor.modifiers import Modifier

    for position, each in enumerate(modifiers):
        if not isinstance(each, Modifier):
            raise TypeError(
                f"element {position} of the recipe is a {type(each).__name__}, but must be a Modifier; to use a recipe "
                "file, give its path alone, not in a list"
            )
    if not modifiers:
        return [Problem(None, "the recipe contains no modifier", "Give at least one modifier")]
    placed = [PlacedModifier(each) for each in modifiers]
    return (
        order_problems(placed)
        or company_problems(placed)
        or storage_problems(placed, places)
        or _refused_by_llmcompressor(placed)
        or nothing_quantized(placed)
    )


def check_recipe(
    recipe: "str | Path | Modifier | Sequence[Modifier] | Recipe", manager: QuadPluginManager | None = None
) -> list[Problem]:
    """Refuses a recipe with errors, and returns its warnings.

    `recipe` is a path, a recipe name, YAML text, a modifier, a (nested) list of them, or llm-compressor's
    `Recipe`.

    Raises:
        RecipeError: if the recipe has an error; lists every problem as "file:line: message. remedy".
        FileNotFoundError: if there is neither such a file nor a recipe of that name.
        TypeError: if `recipe` is of no such type.
        PluginError: if an installed plugin is not valid.
    """
    if isinstance(recipe, (str, Path)):
        manager = manager or get_plugin_manager()
        source = _read(recipe, manager)[1]
        problems = validate_recipe(recipe, manager)
    else:
        source = TEXT_SOURCE
        problems = validate_modifiers(_modifiers_of(recipe))
    if any(problem.severity == "error" for problem in problems):
        raise RecipeError(source, problems)
    return problems


def is_recipe_text(recipe: object) -> bool:
    """Returns whether a recipe is given as YAML text: a string with a line break or ": " is, other strings name one."""
    return isinstance(recipe, str) and ("\n" in recipe or ": " in recipe or not recipe.strip())


def _read(text_or_path: str | Path, manager: QuadPluginManager) -> tuple[str, str]:
    """Returns (text, name for messages)."""
    if is_recipe_text(text_or_path):
        return str(text_or_path), TEXT_SOURCE
    path = resolve_recipe(text_or_path, manager)
    return read_recipe(path), str(path)


def _modifiers_of(recipe: object) -> list[Any]:
    from llmcompressor.modifiers import Modifier
    from llmcompressor.recipe import Recipe
    from torch.utils._pytree import tree_leaves

    if isinstance(recipe, Recipe):
        return list(recipe.modifiers)
    if isinstance(recipe, (Modifier, list, tuple)):
        return list(tree_leaves(recipe))
    raise TypeError(
        "a recipe must be a path, a recipe name, YAML text, a modifier, a list of modifiers or a Recipe, not "
        f"{type(recipe).__name__}"
    )


def _instantiate(entry: ModifierEntry, manager: QuadPluginManager) -> "Modifier | list[Problem]":
    """Returns the modifier that an entry describes, or the problems that prevent it."""
    from pydantic import ValidationError

    try:
        modifier_class = _modifier_class(entry.name, manager)
    except PluginError as error:
        return [Problem(entry.line, str(error), "Correct the name, or repair or install the plugin")]
    try:
        return modifier_class(group=entry.group, **entry.fields)
    except ValidationError as error:
        return [_field_problem(entry, modifier_class, each) for each in error.errors(include_url=False)]
    except Exception as error:  # a modifier's own constructor may raise anything; reported at its line
        message = f"{entry.name} cannot be built: {type(error).__name__}: {error}"
        return [Problem(entry.line, message, "Correct its fields")]


def _modifier_class(name: str, manager: QuadPluginManager) -> "type[Modifier]":
    """Returns the class of a name, found in llm-compressor's order: registered, then its own."""
    contributed = modifier_paths(manager)
    if name in contributed:
        return load_modifier(name, manager)
    others = {**stock_modifiers(), **directly_registered_modifiers()}
    if name in others:
        return others[name]
    raise PluginError(unknown_modifier_message(name, [*contributed, *others], manager))


def _field_problem(entry: ModifierEntry, modifier_class: "type[Modifier]", error: "ErrorDetails") -> Problem:
    location = error["loc"]
    line = entry.line_of(location)
    path = ".".join(str(step) for step in location)
    if error["type"] == "extra_forbidden" and len(location) == 1:
        names = [each for each in modifier_class.model_fields if not each.endswith("_")]
        own = [each for each in names if each not in _LIFECYCLE_FIELDS]
        near = near_names(path, own)
        return Problem(line, f"{entry.name} has no field {path!r}", near[0].upper() + near[1:])
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not location:  # a rule about several fields together, worded by the modifier
        return Problem(line, f"{entry.name}: {reason}", "")
    if error["type"] == "missing":
        return Problem(line, f"{entry.name} needs the field {path!r}", f"Add {path!r}")
    given = "" if isinstance(error["input"], dict) else f", not {error['input']!r}"
    field = modifier_class.model_fields.get(str(location[0]))
    description = "" if field is None or not field.description else f": {field.description}"
    return Problem(line, f"{entry.name}.{path}: {reason}{given}", f"Correct {location[0]!r}{description}")


def _refused_by_llmcompressor(placed: Sequence[PlacedModifier]) -> list[Problem]:
    """Returns the objection of llm-compressor's own recipe check, such as AWQ without a quantizer."""
    from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

    try:
        Recipe(modifiers=[each.modifier for each in placed])
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors(include_url=False))
        return [Problem(placed[0].line if placed else None, f"llm-compressor refuses the recipe: {reasons}", "")]
    return []
