"""Which parts get 8 bits within a budget."""

from collections.abc import Sequence

from quad_modifiers.tools.suggestion.sensitivities import Kind, Part, Sensitivities

_WHAT = {"weights": "bits per weight", "inputs": "bits of an input, over all multiplications"}


def check_budget(found: Sensitivities, kind: Kind, bits: float) -> None:
    """Checks that a budget can be met.

    Raises:
        ValueError: with the range, if no choice has such an average.
    """
    least, most = found.average(kind), found.average(kind, found.of(kind))
    if not least <= bits <= most:
        raise ValueError(
            f"{bits:g} {_WHAT[kind]} cannot be had: {found.recipe} takes {least:.3f} on {found.model}"
            f"{_of_outliers(found, kind)}, and {most:.3f} with 8 bits everywhere; choose {_up(least)} to {_down(most)}"
        )


def allocated(found: Sensitivities, kind: Kind, bits: float) -> list[Part]:
    """Returns the parts of a kind to widen so that their average is at most `bits`, in the order of the model.

    Parts are taken by falling gain over cost, and passed over where they do not fit any more; equal ones by their
    place. A part that gains nothing is not taken.

    Raises:
        ValueError: with the range, if no choice has such an average.
    """
    check_budget(found, kind, bits)
    parts = found.of(kind)
    size = found.weights if kind == "weights" else sum(part.weights for part in parts)
    return _taken(parts, (bits - found.average(kind)) * size + 0.5)  # half a bit, for the rounding of the averages


def _taken(parts: Sequence[Part], room: float) -> list[Part]:
    taken = set()
    for part in sorted(parts, key=lambda part: (-part.gain / part.cost if part.cost else 0.0, part.first, part.group)):
        if part.gain > 0 and 0 < part.cost <= room:
            taken.add(part)
            room -= part.cost
    return [part for part in parts if part in taken]


def _of_outliers(found: Sensitivities, kind: Kind) -> str:
    if kind != "weights" or not found.outliers:
        return ""
    return f" ({found.outliers / found.weights:.3f} of them for outlier columns, which a smaller rank lessens)"


def _up(bits: float) -> str:
    """Rounded so that the number can be asked for."""
    return f"{-(-bits * 100 // 1) / 100:.2f}"


def _down(bits: float) -> str:
    return f"{bits * 100 // 1 / 100:.2f}"


def predicted(parts: Sequence[Part], wide: Sequence[Part]) -> tuple[float, float]:
    """Returns the sum of the parts' divergences with the recipe's bits and with some parts at 8, nats."""
    before = sum(part.narrow for part in parts)
    return before, before - sum(part.gain for part in wide)
