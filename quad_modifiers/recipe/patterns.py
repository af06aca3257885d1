"""Finds the patterns of a recipe that match nothing in a model, as soon as the model's parts are known.

A misspelt `ignore` entry quantizes what was to be kept, a misspelt target leaves what was to be quantized; neither
llm-compressor nor a modifier would say so.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.recipe.coverage import is_ignored, stock_schemes
from quad_modifiers.recipe.document import RecipeDocument, parse_recipe
from quad_modifiers.recipe.problems import Problem, RecipeError

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from torch.nn import Module

_FIELDS = ("targets", "ignore", "mappings", "norm_mappings")
_SCHEMES = ("scheme", "config_groups")  # fields of a stock quantizer that name targets further down
_NO_PATTERNS = ("activation_hook_target",)  # a path below the parent that a mapping finds
_CHILDREN = ("residual", "outlier")  # of the containers that a modifier of ours puts in place of the linears


class _Pattern(NamedTuple):
    """A pattern of a modifier: the path of its field, and its text."""

    location: tuple[str | int, ...]
    text: str


def check_patterns(
    modifiers: "Sequence[Modifier]", model: "Module", recipe: str | None = None, source: str | Path = "recipe"
) -> None:
    """Refuses patterns that match no module of the model.

    Only what the recipe says is looked at; the default value of a field may name what not every model has.

    Args:
        modifiers: those of the recipe, in order.
        model: the original model; one on the meta device will do.
        recipe: text of the recipe, from which the line numbers come; None has none.
        source: name of the recipe in messages.

    Raises:
        RecipeError: naming every such pattern.
    """
    found = [list(_given_patterns(each)) for each in modifiers]
    if not any(found):
        return
    names = dict(_names(model, modifiers))
    document = RecipeDocument() if recipe is None else parse_recipe(recipe)
    problems = []
    for index, (modifier, patterns) in enumerate(zip(modifiers, found, strict=True)):
        entry = document.entries[index] if len(document.entries) == len(found) else None
        for pattern in patterns:
            if not _matches(modifier, pattern.text, names):
                line = None if entry is None else entry.line_of(pattern.location)
                problems.append(_problem(modifier, pattern, names, line))
    if problems:
        raise RecipeError(str(source), problems)


def has_patterns(modifiers: "Iterable[Modifier]") -> bool:
    """Returns whether a recipe names parts of a model at all."""
    return any(any(_given_patterns(each)) for each in modifiers)


def _given_patterns(modifier: "Modifier") -> Iterator[_Pattern]:
    fields = type(modifier).model_fields
    for name in modifier.model_fields_set.intersection(_FIELDS):
        if "Literal" not in str(fields[name].annotation):  # a choice of words, which pydantic has checked
            yield from _strings(getattr(modifier, name), (name,))
    for name in modifier.model_fields_set.intersection(_SCHEMES):
        if isinstance(getattr(modifier, name), dict):
            for scheme in stock_schemes(modifier):
                yield from (_Pattern((name,), target) for target in scheme.targets)


def _strings(value: Any, location: tuple[str | int, ...]) -> Iterator[_Pattern]:
    """Yields the texts in a field, however deep."""
    if isinstance(value, str):
        yield _Pattern(location, value)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _strings(each, (*location, index))
    elif value is not None:
        for key, each in getattr(value, "__dict__", {}).items():  # a mapping: a dataclass or a pydantic model
            if key not in _NO_PATTERNS:
                yield from _strings(each, (*location, key))


def _names(model: "Module", modifiers: "Sequence[Modifier]") -> "Iterator[tuple[str, Module]]":
    """Yields the modules of a model, and the children that its linears will have under a modifier of ours."""
    import torch

    wrapped = any(_is_ours(each) for each in modifiers)
    for name, module in model.named_modules():
        yield name, module
        if wrapped and isinstance(module, torch.nn.Linear):
            yield from ((f"{name}.{child}", module) for child in _CHILDREN)


def _is_ours(modifier: "Modifier") -> bool:
    return hasattr(type(modifier), "ignored_by_default")


def _matches(modifier: "Modifier", pattern: str, names: "dict[str, Module]") -> bool:
    """Returns whether a pattern matches by the rule of its modifier; a stranger's may have either."""
    if _is_ours(modifier):
        return _matches_end(pattern, names)
    stock = type(modifier).__module__.startswith("llmcompressor.")
    return _matches_stock(pattern, names) or (not stock and _matches_end(pattern, names))


def _matches_end(pattern: str, names: "dict[str, Module]") -> bool:
    """The rule of our modifiers, which take single linears and not what holds several."""
    single = (
        name for name, module in names.items() if isinstance(module, QuadLinear) or not any(module.named_children())
    )
    return any(is_ignored(name, [pattern]) for name in single)


def _matches_stock(pattern: str, names: "dict[str, Module]") -> bool:
    from compressed_tensors.utils.match import is_match

    return any(is_match(name, module, pattern) for name, module in names.items())


def _problem(modifier: "Modifier", pattern: _Pattern, names: "dict[str, Module]", line: int | None) -> Problem:
    kind, field = type(modifier).__name__, pattern.location[0]
    message = f"{kind}.{field}: {pattern.text!r} matches no module of the model"
    if not _is_ours(modifier) and _matches_end(pattern.text, names):
        return Problem(line, message, f"{kind} wants whole names; write 're:.*{pattern.text}$'")
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    words = re.findall(r"[A-Za-z][A-Za-z_0-9]+", pattern.text.removeprefix("re:"))
    near = [close for word in words if word not in parts for close in difflib.get_close_matches(word, parts, n=1)]
    if near:
        return Problem(line, message, f"Did you mean {' and '.join(dict.fromkeys(near))}?")
    return Problem(line, message, "Correct it, or remove it")
