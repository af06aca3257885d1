"""The transform in which one step costs the products least."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.linalg import balanced_factors, balanced_transform

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
    with pytest.raises(ValueError, match="second moment of what is rounded, or of what reads it, is not finite"):
        balanced_transform(moment(0), torch.full((SIZE, SIZE), float("nan")))
    with pytest.raises(ValueError, match="second moment of what is rounded, or of what reads it, is not finite"):
        balanced_factors(torch.full((SIZE,), float("inf")), torch.ones(SIZE))


def test_blocks_share_a_step() -> None:
    """As one transform of all coordinates at once does, that may not mix the blocks."""
    states, readers = torch.stack([moment(0), 9 * moment(1)]), torch.stack([moment(5), moment(3) / 50])
    into, back = balanced_transform(states, readers)
    torch.testing.assert_close(into @ back, torch.eye(SIZE, dtype=torch.float64).repeat(2, 1, 1))
    whole = [torch.block_diag(*each) for each in (into, back, states, readers)]
    found = cost(*whole)
    assert 0.8 < float((whole[0] @ whole[2] @ whole[0]).trace() / whole[2].trace()) < 1.25
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = torch.block_diag(into[0], into[1] * factor)
        assert cost(other, torch.linalg.inv(other), *whole[2:]) > found
    alone = [balanced_transform(*pair) for pair in zip(states, readers, strict=True)]
    assert cost(*(torch.block_diag(*each) for each in zip(*alone, strict=True)), *whole[2:]) > found


def test_no_other_factors_cost_less() -> None:
    states, readers = torch.linspace(0.5, 40, SIZE), torch.linspace(3, 1, SIZE).square()
    found = balanced_factors(states, readers)

    def paid(factors: torch.Tensor) -> float:
        return float((states * factors.square()).sum() * (readers / factors.square()).sum())

    assert float((states * found.square()).sum()) == pytest.approx(float(states.sum()), rel=0.02)
    assert paid(found) < 0.9 * paid(torch.ones(SIZE))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        assert paid(found * torch.empty(SIZE).uniform_(0.7, 1.4, generator=generator)) > paid(found)


def test_factors_of_dead_coordinates_are_bounded() -> None:
    states, readers = torch.tensor([0.0, 1.0, 1.0, 1e9]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = balanced_factors(states, readers)
    assert torch.isfinite(found).all()
    assert float(found.max() / found.min()) <= 64 * (1 + 1e-9)
    assert torch.isfinite(balanced_factors(torch.zeros(4), torch.zeros(4))).all()
