"""The transform in which one step costs the products least."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.linalg import balanced_transform

SIZE = 12


def moment(seed: int) -> torch.Tensor:
    x = torch.randn(200, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.logspace(-1, 1, SIZE).roll(seed)).T.cov() + 0.1 * torch.eye(SIZE)


def cost(into: torch.Tensor, back: torch.Tensor, states: torch.Tensor, readers: torch.Tensor) -> float:
    return float((into.T @ states @ into).trace() * (back @ readers @ back.T).trace())


def test_no_other_transform_costs_less() -> None:
    states, readers = moment(0), moment(5)
    into, back = balanced_transform(states, readers)
    torch.testing.assert_close(into @ back, torch.eye(SIZE, dtype=torch.float64))
    torch.testing.assert_close(into, into.T)
    assert 0.8 < float((into @ states @ into).trace() / states.trace()) < 1.25
    eye = torch.eye(SIZE, dtype=torch.float64)
    found, plain = cost(into, back, states, readers), cost(eye, eye, states, readers)
    print(found / plain)
    assert found < 0.5 * plain
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 3e-1, 1.0):
        other = into + size * into.norm() / SIZE * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        assert cost(other, torch.linalg.inv(other), states, readers) > found


def test_directions_without_energy_stay_invertible() -> None:
    states = torch.zeros(SIZE, SIZE)
    states[0, 0] = 3
    for readers in (torch.zeros(SIZE, SIZE), moment(2).float()):
        into, back = balanced_transform(states, readers)
        torch.testing.assert_close(into @ back, torch.eye(SIZE, dtype=torch.float64))


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="second moments of keys or queries are not finite"):
        balanced_transform(moment(0), torch.full((SIZE, SIZE), float("nan")))
