"""What a QUAD checkpoint could not hold of what a recipe makes, told before the work.

The format has one entry for each role and, for some layers, other bits (`overrides` of a modifier of ours); integers
only, and no place for scales outside of the decoder blocks. A recipe
without a modifier that works on a decoder makes no such checkpoint: llm-compressor writes its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.nn.from_compressed_tensors import unstorable_inputs, unstorable_weights
from quad_modifiers.plugins.contributions import architectures
from quad_modifiers.recipe import coverage
from quad_modifiers.recipe.layer_bits import override_of, overrides_of
from quad_modifiers.recipe.order import QUANTIZE_WEIGHTS, PlacedModifier
from quad_modifiers.recipe.problems import Problem


@dataclass(frozen=True)
class Place:
    """A linear of the decoder blocks that may be quantized.

    Attributes:
        family: what it is compared within: the linears of one role of one architecture.
        layer: position of its block.
        within: its path in the block, such as "self_attn.q_proj".
        name: its full name.
    """

    family: tuple[str, str]
    layer: int
    within: str
    name: str


def sample_places(layers: int = coverage.LAYERS) -> tuple[Place, ...]:
    """Returns the linears of the first layers of every known architecture."""
    return tuple(
        Place((known.model_type, member.role), layer, path, f"{known.layers}.{layer}.{path}")
        for known in architectures().values()
        for layer in range(layers)
        for group, member in known.quantized_members()
        for path in (f"{group.parent}.{member.name}".replace("*", "0"),)
    )


def decoder_places(decoder: Decoder) -> tuple[Place, ...]:
    """Returns the linears of a model."""
    return tuple(
        Place(
            (decoder.architecture.model_type, linear.role),
            block.index,
            linear.name.removeprefix(f"{block.name}."),
            linear.name,
        )
        for block in decoder.blocks
        for linear in block.linears()
    )


def weight_words(placed: Sequence[PlacedModifier], linears: Sequence[PlacedLinear]) -> dict[str, str]:
    """Returns what the modifiers make of the weights of linears, in words; nothing of one that is left as it is."""
    treated: dict[str, list[str]] = {linear.name: [] for linear in linears}
    for each in placed:
        for words, reached in _treatments(each, list(treated)):
            for linear in linears:
                if linear.name in reached:
                    override = override_of(overrides_of(each.modifier), linear)
                    own = words if override is None else _own_words(each, override.bits)
                    treated[linear.name].append(own)
    return {name: " and ".join(words) for name, words in treated.items()}


def storage_problems(placed: Sequence[PlacedModifier], places: Sequence[Place] | None = None) -> list[Problem]:
    """Returns what the checkpoint could not hold.

    Args:
        placed: the modifiers of a recipe.
        places: linears of the model; by default those of the known architectures.
    """
    if not any(getattr(type(each.modifier), "makes_quad_checkpoint", False) for each in placed):
        return []
    problems = [problem for each in placed if each.is_stock for problem in _unstorable(each)]
    if places is None:
        places = (
            sample_places() if any(coverage.tells_layers_apart(each.modifier) for each in placed) else sample_places(1)
        )
    problems = problems or list(_uneven(placed, places))
    return list(dict.fromkeys(problems))  # several architectures have the same names


def _unstorable(placed: PlacedModifier) -> Iterator[Problem]:
    """Yields what is wrong with the schemes of a stock quantizer, whatever they are applied to."""
    schemes = coverage.stock_schemes(placed.modifier)
    for scheme in schemes:
        found = [None if scheme.weights is None else unstorable_weights(scheme.weights)]
        found.append(None if scheme.input_activations is None else unstorable_inputs(scheme.input_activations))
        if scheme.output_activations is not None:
            found.append("quantized outputs cannot be stored; leave output_activations out")
        for problem in dict.fromkeys(each for each in found if each is not None):
            message, _, remedy = problem.partition("; ")
            yield Problem(placed.line, f"{placed.name}: {message}", remedy[0].upper() + remedy[1:])
    if schemes and placed.modifier.resolved_config.kv_cache_scheme is not None:
        message = f"{placed.name}: a quantized cache of keys and values cannot be stored"
        yield Problem(placed.line, message, "Leave kv_cache_scheme out")
    for scheme in schemes:
        yield from _tables(placed, scheme)


def _tables(placed: PlacedModifier, scheme: Any) -> Iterator[Problem]:
    """Yields an embedding or head that a stock quantizer would reach."""
    ignore = getattr(placed.modifier, "ignore", None) or []
    for known in architectures().values():
        reached = coverage.matching([known.head], scheme.targets, ignore)
        reached |= coverage.matching_tables([known.embedding], scheme.targets, ignore)
        for name in sorted(reached):
            yield Problem(
                placed.line,
                f"{name} is quantized by {placed.name}, but a QUAD checkpoint holds quantized weights in the linears "
                "of the decoder blocks only",
                f"Add {name!r} to its ignore list and use EmbeddingHeadQuant",
            )


def _uneven(placed: Sequence[PlacedModifier], places: Sequence[Place]) -> Iterator[Problem]:
    """Yields the first linear that is treated differently from others of its role, once for each kind of difference."""
    names = [place.name for place in places]
    treated: dict[str, list[tuple[str, PlacedModifier]]] = {name: [] for name in names}
    for each in placed:
        for words, reached in _treatments(each, names):
            for name in reached:
                treated[name].append((words, each))
    first: dict[tuple[str, str], Place] = {}
    told: set[tuple[str, ...]] = set()
    for place in places:
        known = first.setdefault(place.family, place)
        mine, theirs = treated[place.name], treated[known.name]
        here, there = (" and ".join(words for words, _ in each) or "not quantized" for each in (mine, theirs))
        if here != there and told.isdisjoint(((here, there), place.family)):
            told |= {(here, there), place.family}
            line = next((each.line for _, each in (*mine, *theirs)), None)
            yield _different(place, known, f"{here} against {there}", line)


def _different(place: Place, known: Place, difference: str, line: int | None) -> Problem:
    other = f"layer {known.layer}" if known.within == place.within else f"layer {known.layer} {known.within}"
    return Problem(
        line,
        f"layer {place.layer} {place.within} is quantized differently from {other}: {difference}; the checkpoint "
        "format needs the same settings in every layer",
        f"Name {place.within.rpartition('.')[2]} as a whole in targets and ignore, not single layers",
    )


def _treatments(placed: PlacedModifier, names: Sequence[str]) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields what a modifier makes of which linears, in words that are equal for what is stored alike."""
    modifier = placed.modifier
    if not placed.is_stock:
        if QUANTIZE_WEIGHTS in placed.roles:
            yield _own_words(placed, getattr(modifier, "bits", placed.name)), _reached(names, placed)
        return
    for scheme in coverage.stock_schemes(modifier):
        reached = _reached(names, placed, scheme.targets)
        for part in (scheme.weights, scheme.input_activations):
            if part is not None:
                kind = "" if part is scheme.weights else " inputs"
                yield _words(part.num_bits, part.group_size, part.symmetric) + kind, reached


def _own_words(placed: PlacedModifier, bits: object) -> str:
    modifier = placed.modifier
    levels = " of two levels" if getattr(modifier, "sub_scale_bits", None) else ""
    number_format = getattr(modifier, "number_format", "int")
    if number_format != "int":
        return f"numbers of {number_format}"
    return _words(bits, getattr(modifier, "group_size", None), getattr(modifier, "symmetric", True)) + levels


def _words(bits: object, group_size: int | None, symmetric: bool) -> str:
    groups = "" if group_size in (None, -1) else f" in groups of {group_size}"
    return f"{bits} bits{groups}{'' if symmetric else ' with zero points'}"


def _reached(names: Sequence[str], placed: PlacedModifier, targets: Sequence[str] | None = None) -> set[str]:
    """Returns the linears that a modifier reaches, as they are or as the residuals in their containers."""
    reached: set[str] = set()
    for form in (names, [f"{name}.residual" for name in names]):
        if targets is None:
            reached |= coverage.covered(placed.modifier, "weights", tuple(form))
        else:
            reached |= coverage.matching(form, targets, getattr(placed.modifier, "ignore", None) or [])
    return {name.removesuffix(".residual") for name in reached}
