"""Which parts get 8 bits: by gain over cost, within the budget, whatever their order."""

from __future__ import annotations

import random

import pytest

from quad_modifiers.tools.suggestion.allocation import allocated, predicted
from quad_modifiers.tools.suggestion.sensitivities import Part, Sensitivities


def part(first: int, gain: float, extra: int, group: str = "down") -> Part:
    return Part(
        kind="weights",
        group=group,
        roles=("down_proj",),
        first=first,
        last=first,
        bits=4,
        weights=extra // 4,
        extra=extra,
        narrow=1.0 + gain,
        wide=1.0,
    )


def sensitivities(*parts: Part) -> Sensitivities:
    weights = sum(each.weights for each in parts)
    return Sensitivities(
        model="toy",
        model_type="llama",
        layers=9,
        recipe="quad_w4a4",
        recipe_digest="",
        text="text",
        windows=1,
        window_length=8,
        seed=0,
        weights=weights,
        stored=4 * weights,
        outliers=0,
        parts=parts,
    )


def test_most_gain_for_the_bits_comes_first_and_what_does_not_fit_is_passed_over() -> None:
    best, large, small, none = part(0, 0.5, 400), part(1, 0.9, 4000), part(2, 0.1, 800), part(3, -0.1, 400)
    parts = [none, small, large, best]
    found = sensitivities(*parts)
    assert allocated(found, "weights", 4.0) == []
    room = lambda *wide: found.average("weights", wide)  # noqa: E731
    assert allocated(found, "weights", room(best)) == [best]
    assert allocated(found, "weights", room(best, small)) == [small, best]  # the large one does not fit
    assert allocated(found, "weights", room(best, large)) == [large, best]
    assert allocated(found, "weights", 8.0) == [small, large, best]  # not the one that gains nothing
    before, after = predicted(parts, [best, large])
    assert (before, after) == pytest.approx((4 + 0.5 + 0.9 + 0.1 - 0.1, 4 + 0.1 - 0.1))


def test_equal_parts_are_taken_by_their_place() -> None:
    parts = [part(layer, 0.25, 400, group) for layer in range(4) for group in ("down", "o")]
    for seed in range(5):
        mixed = random.Random(seed).sample(parts, len(parts))
        taken = allocated(sensitivities(*mixed), "weights", 4 + 4 * 3 / 8)
        assert {(each.first, each.group) for each in taken} == {(0, "down"), (0, "o"), (1, "down")}


@pytest.mark.parametrize(("bits", "hint"), [(3.99, "4.00 to 8.00"), (8.01, "4.00 to 8.00")])
def test_the_range_is_told(bits: float, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"{bits:g} bits per weight cannot be had: .* choose {hint}"):
        allocated(sensitivities(part(0, 1.0, 400)), "weights", bits)
