"""The rules about which modifiers may be combined in a recipe, and in which order.

A modifier class says what it does in `recipe_role: ClassVar[str]`, one of `ROLES`; llm-compressor's own are
told by their class. A rule is applied only where at least one of the modifiers is not llm-compressor's own:
whether stock modifiers go together is for llm-compressor to say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from quad_modifiers.recipe import coverage
from quad_modifiers.recipe.problems import Problem

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

SMOOTH = "smooth"
PROJECT = "project"
ROTATE = "rotate"
BRANCH = "branch"
QUANTIZE_ACTIVATIONS = "quantize_activations"
QUANTIZE_WEIGHTS = "quantize_weights"
QUANTIZE_CACHE = "quantize_cache"
TUNE = "tune"
ROLES = (SMOOTH, PROJECT, ROTATE, BRANCH, QUANTIZE_ACTIVATIONS, QUANTIZE_WEIGHTS, QUANTIZE_CACHE, TUNE)

STOCK_ROLES = {
    "SmoothQuantModifier": SMOOTH,  # its subclass LogarithmicEqualizationModifier as well
    "AWQModifier": SMOOTH,
    "SpinQuantModifier": PROJECT,
    "QuIPModifier": PROJECT,
}

FORBIDDEN_ORDER = {
    (QUANTIZE_WEIGHTS, PROJECT): "the projection would rotate weights that are quantized already",
    (QUANTIZE_ACTIVATIONS, PROJECT): "the projection changes the inputs that the quantizer was set up for",
    (PROJECT, SMOOTH): "smoothing would scale channels of the rotated basis, where no channel stands out any more",
    (ROTATE, PROJECT): "it refines the rotation of a projection, which has to come first",
    (ROTATE, SMOOTH): "smoothing would scale channels of the rotated basis, where no channel stands out any more",
    (QUANTIZE_WEIGHTS, ROTATE): "it would rotate weights that are quantized already",
    (QUANTIZE_ACTIVATIONS, ROTATE): "it changes the inputs that the quantizer was set up for",
    (QUANTIZE_CACHE, ROTATE): "it would calibrate with rounded keys and values",
    (TUNE, ROTATE): "it would rotate weights that were tuned for the old basis",
    (BRANCH, PROJECT): "the projection would change the basis that the branch was made for",
    (BRANCH, ROTATE): "it would change the basis that the branch was made for",
    (BRANCH, SMOOTH): "smoothing would scale weights that a part was taken out of",
    (QUANTIZE_WEIGHTS, BRANCH): "it takes a part out of weights before they are quantized",
    (QUANTIZE_CACHE, BRANCH): "it would calibrate with rounded keys and values",
    (TUNE, BRANCH): "it would take a part out of weights that were tuned",
    (QUANTIZE_WEIGHTS, SMOOTH): "smoothing would scale weights that are quantized already",
    (QUANTIZE_CACHE, SMOOTH): "smoothing would calibrate with rounded keys and values",
    (QUANTIZE_CACHE, PROJECT): "the projection would calibrate with rounded keys and values",
    (QUANTIZE_CACHE, QUANTIZE_WEIGHTS): "the weights would be calibrated with rounded keys and values",
    (QUANTIZE_CACHE, QUANTIZE_ACTIVATIONS): "the clip ratios would be chosen with rounded keys and values",
    (TUNE, QUANTIZE_CACHE): "the tuning would not have seen the rounded keys and values",
    (TUNE, PROJECT): "the projection would rotate weights that were tuned for the old basis",
    (TUNE, QUANTIZE_WEIGHTS): "quantizing the weights would undo what was tuned",
    (TUNE, QUANTIZE_ACTIVATIONS): "the tuning would not have seen the quantized inputs",
}

IGNORE_OUTLIER = "re:.*outlier$"


@dataclass(frozen=True)
class PlacedModifier:
    """A modifier of a recipe with the line of its name, None where there is no text."""

    modifier: "Modifier"
    line: int | None = None

    @property
    def name(self) -> str:
        """The class name, which is the recipe name."""
        return type(self.modifier).__name__

    @property
    def is_stock(self) -> bool:
        """Whether the class declares no role, as llm-compressor's own do not."""
        return getattr(type(self.modifier), "recipe_role", None) is None

    @property
    def roles(self) -> frozenset[str]:
        """What the modifier does, of `ROLES`; a stock quantizer may quantize weights and activations."""
        if not self.is_stock:
            return frozenset((type(self.modifier).recipe_role,))
        table = {STOCK_ROLES[each.__name__] for each in type(self.modifier).__mro__ if each.__name__ in STOCK_ROLES}
        schemes = coverage.stock_schemes(self.modifier)
        if any(scheme.weights for scheme in schemes):
            table.add(QUANTIZE_WEIGHTS)
        if any(scheme.input_activations for scheme in schemes):
            table.add(QUANTIZE_ACTIVATIONS)
        return frozenset(table)


def unties_head(modifier: "Modifier") -> bool:
    """Returns whether a modifier gives a head that shares the embedding's tensor one of its own.

    Projections do; one that need not always says so in its `unties_head`.
    """
    return PROJECT in PlacedModifier(modifier).roles and getattr(modifier, "unties_head", True)


def order_problems(placed: Sequence[PlacedModifier]) -> list[Problem]:
    """Returns what is wrong with the order and the company of the modifiers, errors before the warning."""
    problems = [
        Problem(
            each.line,
            f"{each.name}.recipe_role is {role!r}, which is not a role",
            f"Set the class attribute to one of {', '.join(ROLES)}, or None",
        )
        for each in placed
        for role in each.roles - set(ROLES)
    ]
    for first, second in combinations(placed, 2):
        if not (first.is_stock and second.is_stock):
            for rule in (_wrong_order, _rotations, _two_quantizers, _quantized_outlier):
                problems += rule(first, second)
    return problems


def company_problems(placed: Sequence[PlacedModifier]) -> list[Problem]:
    """Returns what modifiers themselves have against the others of the recipe (`QuadModifier.check_company`)."""
    problems = []
    for index, each in enumerate(placed):
        check = getattr(type(each.modifier), "check_company", None)
        if check is None:
            continue
        try:
            check(each.modifier, [other.modifier for other in (*placed[:index], *placed[index + 1 :])])
        except ValueError as error:
            problems.append(Problem(each.line, f"{each.name}: {error}", ""))
    return problems


def nothing_quantized(placed: Sequence[PlacedModifier]) -> list[Problem]:
    """Returns a warning if the recipe prepares a model for quantization but quantizes nothing."""
    roles = frozenset[str]().union(*(each.roles for each in placed))
    if not roles & {PROJECT, SMOOTH} or roles & {QUANTIZE_WEIGHTS, QUANTIZE_ACTIVATIONS, QUANTIZE_CACHE}:
        return []
    names = ", ".join(each.name for each in placed)
    return [
        Problem(
            placed[0].line,
            f"nothing is quantized: the recipe has only {names}",
            "Add OutlierSplitGPTQ for 4-bit weights and DynamicActQuant for 4-bit inputs, unless a prepared model in "
            "full precision is what you want",
            "warning",
        )
    ]


def _wrong_order(first: PlacedModifier, second: PlacedModifier) -> Iterator[Problem]:
    for (role, later), reason in FORBIDDEN_ORDER.items():
        if role in first.roles and later in second.roles:
            yield Problem(
                second.line,
                f"{second.name} comes after {first.name}{_in_line(first)}, but {reason}",
                f"Move {second.name} before {first.name}",
            )
            return


def _rotations(first: PlacedModifier, second: PlacedModifier) -> Iterator[Problem]:
    """Reports a second projection, and modifiers that need linears where another one puts containers."""
    if PROJECT in first.roles & second.roles:
        yield Problem(
            second.line,
            f"{second.name} is a second projection after {first.name}{_in_line(first)}; both rotate the same weights",
            "Keep one of the two (SVDOutlierProjection with rank: 0 is a plain rotation)",
        )
    if not first.is_stock and PROJECT in first.roles and second.name == "AutoRoundModifier":
        yield Problem(
            second.line,
            f"AutoRoundModifier after {first.name}{_in_line(first)} is not supported: it stops in the middle of "
            "the run, on the containers that the projection makes",
            "Use OutlierSplitGPTQ or GPTQModifier",
        )
    if first.is_stock and PROJECT in first.roles and second.roles & {QUANTIZE_WEIGHTS, QUANTIZE_ACTIVATIONS, TUNE}:
        yield Problem(
            first.line,
            f"{first.name} rotates plain linears, but {second.name}{_in_line(second)} replaces them by containers",
            "Use SVDOutlierProjection in its place (with rank: 0 it is a plain rotation)",
        )


def _two_quantizers(first: PlacedModifier, second: PlacedModifier) -> Iterator[Problem]:
    names = coverage.weight_names()
    for role, part in ((QUANTIZE_WEIGHTS, "weights"), (QUANTIZE_ACTIVATIONS, "input_activations")):
        if role not in first.roles & second.roles:
            continue
        both = coverage.covered(first.modifier, part, names) & coverage.covered(second.modifier, part, names)
        if both:
            what = part.replace("_", " ")
            yield Problem(
                second.line,
                f"{second.name} quantizes the {what} of linears that {first.name}{_in_line(first)} quantizes too, "
                f"such as {min(both)}",
                "Remove one of the two, or keep their layers apart with targets and ignore"
                if part == "weights"
                else f"Remove one of the two, or choose a scheme without {what}, such as W4A16",
            )


def _quantized_outlier(first: PlacedModifier, second: PlacedModifier) -> Iterator[Problem]:
    """Reports a stock quantizer that would hit what a projection before it made of the linears."""
    if first.is_stock or PROJECT not in first.roles or not second.is_stock:
        return
    ignore = list(getattr(second.modifier, "ignore", None) or [])
    targets = [target for scheme in coverage.stock_schemes(second.modifier) for target in scheme.targets]
    containers = coverage.matching_containers(targets, ignore)
    if containers:
        yield Problem(
            second.line,
            f"{second.name} targets {min(containers)}, which {first.name}{_in_line(first)} makes a container without "
            "a weight of its own",
            'Name the residual linear in it, for example "re:.*q_proj.residual$"',
        )
    if coverage.matching(coverage.outlier_names(first.modifier), targets, ignore):
        better = [*dict.fromkeys(["lm_head", *ignore]), IGNORE_OUTLIER]
        remedy = ", ".join(f'"{each}"' if ":" in each else each for each in better)
        yield Problem(
            second.line,
            f"{second.name} would quantize the outlier linears too, which {first.name}{_in_line(first)} keeps in full "
            "precision",
            f"Write ignore: [{remedy}]",
        )


def _in_line(placed: PlacedModifier) -> str:
    return "" if placed.line is None else f" (line {placed.line})"
