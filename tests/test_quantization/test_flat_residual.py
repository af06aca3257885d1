"""The low-rank part of a weight: each half-step lowers the error of clipping, and the residual's rows become flat."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quad_modifiers.quantization.flat_residual import clip_sweep, flat_residual


def problem(out: int = 24, width: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A heavy-tailed weight with a low-rank part, and inputs of which a few directions hold most of the energy."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(out, width).pow(3) / 4 + 2 * normal(out, 2) @ normal(2, width)
    inputs = normal(500, width) @ torch.diag(torch.linspace(3, 0.3, width).double()) @ normal(width, width)
    return weight, inputs.T @ inputs / 500


def error(rest: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(torch.trace(rest @ hessian @ rest.T))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_error_never_rises(rank: int, seed: int) -> None:
    weight, hessian = problem(seed=seed)
    found = flat_residual(weight, hessian, rank, rounds=12, quantile=0.9, damping=0.01)
    assert len(found.losses) == 13
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(found.losses))
    assert found.losses[-1] < 0.9 * found.losses[0], "the case has something to gain"
    assert found.up.shape == (24, rank)
    assert found.down.shape == (rank, 40)


def test_without_rounds_it_is_the_truncated_svd() -> None:
    weight, hessian = problem()
    found = flat_residual(weight, hessian, 3, rounds=0, quantile=0.99, damping=1e-6)
    root = torch.linalg.cholesky(hessian + 1e-6 * hessian.diagonal().mean() * torch.eye(40))
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    wanted = (left[:, :3] * values[:3]) @ right[:3] @ torch.linalg.inv(root)
    ours, theirs = (error(weight - part, hessian) for part in (found.up @ found.down, wanted))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("width", [40, 300])  # of one block of columns, and of several
def test_a_sweep_moves_each_column_to_its_minimum(width: int) -> None:
    target, hessian = problem(width=width)
    hessian = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(width)
    bound = target.abs().mean(1, keepdim=True)
    start = target.clamp(-bound, bound)
    wanted = start.clone()
    for column in range(width):  # the definition: the least-squares value of this column, clipped
        rest = target - wanted
        step = (rest @ hessian[:, column]) / hessian[column, column]
        wanted[:, column] = (wanted[:, column] + step).clamp(-bound.squeeze(1), bound.squeeze(1))
    found, gradient = clip_sweep(start, (target - start) @ hessian, bound, hessian)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, (target - found) @ hessian)
    assert (found.abs() <= bound).all()
    assert error(target - found, hessian) < 0.9 * error(target - start, hessian)


def test_rows_are_flatter_than_behind_the_svd() -> None:
    """A grid for the residual is finer for the deviation of what it rounds."""
    weight, _ = problem()

    def ratio(rounds: int) -> float:
        found = flat_residual(weight, torch.eye(40).double(), 8, rounds, quantile=0.9, damping=0.01)
        rest = weight - found.up @ found.down
        return float((rest.abs().amax(1) / rest.std(1)).mean())

    assert ratio(40) < 0.9 * ratio(0)


def test_both_parts_have_one_scale() -> None:
    found = flat_residual(*problem(), 4, rounds=2, quantile=0.99, damping=0.01)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


def test_inputs_of_zeros_weigh_alike() -> None:
    weight, hessian = problem()
    for each, other in zip(
        vars(flat_residual(weight, torch.zeros_like(hessian), 2, 3, 0.95, 0.01)).values(),
        vars(flat_residual(weight, torch.eye(40).double(), 2, 3, 0.95, 1e-12)).values(),
        strict=True,
    ):
        torch.testing.assert_close(each, other, rtol=1e-6, atol=1e-8)


def test_a_moment_that_cannot_be_used_is_refused() -> None:
    weight, hessian = problem()
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(ValueError, match="not positive definite; raise `damping`"):
        flat_residual(weight, hessian, 2, 1, 0.99, 1e-3)
