"""Other bits for some linears: the `overrides` of a quantizing modifier, by layer and by pattern."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from quad_modifiers.model.decoder import Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.recipe.coverage import is_ignored
from quad_modifiers.recipe.document import RecipeDocument, parse_recipe
from quad_modifiers.recipe.problems import Problem, RecipeError

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def _listed(value: Any) -> Any:
    """A single item as a list of one."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


def _checked_range(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("a layer is a number, or a range such as 0-3")
    found = _RANGE.fullmatch(str(value).strip())
    if found is None:
        raise ValueError("a layer is a number, or a range such as 0-3")
    if found[2] is not None and int(found[1]) > int(found[2]):
        raise ValueError(f"the range ends before it begins; write {found[2]}-{found[1]}")
    return value


class BitsOverride(BaseModel):
    """Names linears.

    Attributes:
        layers: numbers of decoder blocks from 0 on, or ranges such as "0-3"; one, or a list. None is every layer.
        linears: last parts of names, such as "down_proj", or "re:" and a regular expression; one, or a list. None is
            every linear.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[
        list[Annotated[int | str, BeforeValidator(_checked_range)]] | None,
        BeforeValidator(_listed),
        Field(min_length=1),
    ] = None
    linears: Annotated[list[str] | None, BeforeValidator(_listed), Field(min_length=1)] = None

    def ranges(self) -> list[tuple[int, int]]:
        """Returns first and last layer of each range."""
        found = [_RANGE.fullmatch(str(each).strip()) for each in self.layers or ()]
        return [(int(each[1]), int(each[2] or each[1])) for each in found if each is not None]

    def names(self, linear: PlacedLinear) -> bool:
        """Returns whether a linear is meant."""
        inside = self.layers is None or any(first <= linear.layer <= last for first, last in self.ranges())
        return inside and (self.linears is None or is_ignored(linear.name, self.linears))


class WeightBits(BitsOverride):
    """Bits of the weights of some linears.

    Attributes:
        bits: 2, 4 or 8.
    """

    bits: Literal[2, 4, 8]


class InputBits(BitsOverride):
    """Bits of the inputs of some linears.

    Attributes:
        bits: 2 to 8.
        clip_ratio: share of the largest magnitude that the grid covers; None for what it is elsewhere.
    """

    bits: int = Field(ge=2, le=8)
    clip_ratio: float | None = Field(default=None, gt=0.3, le=1.0)


Override = TypeVar("Override", bound=BitsOverride)


def override_of(overrides: Sequence[Override], linear: PlacedLinear) -> Override | None:
    """Returns the override that counts for a linear: the last that names it, None without one."""
    return next((each for each in reversed(overrides) if each.names(linear)), None)


def overrides_of(modifier: "Modifier") -> list[Any]:
    """Returns the overrides of a modifier, none of one that knows no such thing."""
    return [each for each in getattr(modifier, "overrides", None) or () if isinstance(each, BitsOverride)]


def has_overrides(modifiers: "Iterable[Modifier]") -> bool:
    """Returns whether a recipe gives some linears other bits than the rest."""
    return any(map(overrides_of, modifiers))


def check_overrides(
    modifiers: "Sequence[Modifier]", decoder: Decoder, recipe: str | None = None, source: str | Path = "recipe"
) -> None:
    """Refuses overrides that cannot have their effect on a model.

    Args:
        modifiers: those of the recipe, in order. One with a field `overrides` says of a linear what it makes of it, in
            words, by its method `words_of`; nothing of one that it leaves alone.
        decoder: the model; one on the meta device will do.
        recipe: text of the recipe, from which the line numbers come; None has none.
        source: name of the recipe in messages.

    Raises:
        RecipeError: naming every override that names a layer or a linear that is not there, or only linears that are
            not quantized, and every group of linears that would get unlike bits for the input that they share.
    """
    document = RecipeDocument() if recipe is None else parse_recipe(recipe)
    problems = []
    for index, modifier in enumerate(modifiers):
        overrides = overrides_of(modifier)
        entry = document.entries[index] if len(document.entries) == len(modifiers) else None
        for place, override in enumerate(overrides):
            problem = _problem(modifier, override, decoder)
            if problem is not None:
                line = None if entry is None else entry.line_of(("overrides", place))
                problems.append(Problem(line, f"{type(modifier).__name__}.overrides: {problem[0]}", problem[1]))
        if overrides and not problems:
            line = None if entry is None else entry.line_of(("overrides",))
            problems += [Problem(line, *found) for found in _torn_groups(modifier, decoder)][:1]
    if problems:
        raise RecipeError(str(source), problems)


def _problem(modifier: Any, override: BitsOverride, decoder: Decoder) -> tuple[str, str] | None:
    """What is wrong with an override by itself, and the remedy."""
    last = len(decoder.blocks) - 1
    for first, final in override.ranges():
        if final > last:
            span = f"layer {first}" if first == final else f"layers {first}-{final}"
            return f"{span} of a model whose layers are 0 to {last}", "Correct 'layers'"
    linears = list(decoder.linears())
    for pattern in override.linears or ():
        if not any(is_ignored(linear.name, [pattern]) for linear in linears):
            known = ", ".join(dict.fromkeys(linear.role for linear in linears))
            return f"{pattern!r} matches no linear of the model", f"Correct it; there are {known}"
    named = [linear for linear in linears if override.names(linear)]
    if not named:
        return f"no linear is in {override.layers} and matches {override.linears}", "Correct one of the two"
    if not any(modifier.words_of(linear) for linear in named):
        return (
            f"{named[0].name} and all others that it names are not quantized by this modifier",
            "Remove the override, or let the modifier quantize them",
        )
    return None


def _torn_groups(modifier: Any, decoder: Decoder) -> Iterator[tuple[str, str]]:
    for group in decoder.groups():
        words = _words_in(modifier, group)
        if len(set(words.values())) > 1:
            unlike = ", ".join(f"{name} {each}" for name, each in words.items())
            yield (
                f"{type(modifier).__name__}.overrides: layer {group.layer} would have {unlike}, which share their "
                "input and are quantized together",
                f"Name all of {', '.join(words)} in 'linears', or none",
            )


def _words_in(modifier: Any, group: PlacedGroup) -> dict[str, str]:
    found = {linear.role: modifier.words_of(linear) for linear in group.linears}
    return {role: words for role, words in found.items() if words}
