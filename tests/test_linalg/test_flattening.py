"""Rotations that flatten rows: the distance never rises, R stays orthogonal, and rows that can be flat become it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, fake_quantize, split_input
from quad_kernels.hadamard import hadamard_matrix

from quad_modifiers.linalg.flattening import (
    RotatedRows,
    distance_to_box,
    flattened,
    flattening_steps,
    identities,
    mean_peak,
    preconditioned,
    refined,
)
from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.projection.learned_rotation import value_rows


def heavy_tailed(tokens: int, size: int, seed: int = 0) -> torch.Tensor:
    """Tokens of independent heavy-tailed sources, mixed by a Hadamard matrix: there is a flatter basis than it."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(tokens, size, generator=generator, dtype=torch.float64).sign()
    sources *= 1 + 0.1 * torch.rand(tokens, size, generator=generator, dtype=torch.float64)
    massive = torch.randint(tokens, (tokens // 50,), generator=generator)
    sources[massive] *= 30  # tokens that would outweigh all others
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return sources @ (hadamard_matrix(size) * signs)


def rows_of(x: torch.Tensor) -> RotatedRows:
    return RotatedRows(preconditioned(x, x.shape[1])[:, None, None, :])


@pytest.mark.parametrize("bound", [1.2, 1.8, 2.5])
@pytest.mark.parametrize("size", [12, 32])
def test_the_distance_never_rises(size: int, bound: float) -> None:
    rows = rows_of(heavy_tailed(400, size))
    distances = [distance_to_box(rows.turned(identities(rows)), bound)]
    for rotation in flattening_steps(rows, identities(rows), [bound] * 40):
        distances.append(distance_to_box(rows.turned(rotation), bound))
        torch.testing.assert_close(
            rotation[0] @ rotation[0].T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0
        )
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(distances))
    assert distances[-1] < 0.9 * distances[0], "the case has something to flatten"


def test_steps_are_those_of_a_computation_of_its_own() -> None:
    """The first step, without over-relaxation: clip, then U V^T of X^T Y."""
    rows = rows_of(heavy_tailed(200, 8))
    x = rows.turned(identities(rows))
    left, _, right = torch.linalg.svd(x.T @ x.clamp(-1.5, 1.5))
    found = next(flattening_steps(rows, identities(rows), [1.5]))
    torch.testing.assert_close(found[0], left @ right)
    best = (x @ found[0] - x.clamp(-1.5, 1.5)).square().sum()
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double())[0]
        assert (x @ other - x.clamp(-1.5, 1.5)).square().sum() > best


def test_rows_count_alike_whatever_their_norm() -> None:
    x = heavy_tailed(100, 16)
    x[3] = 0
    found = preconditioned(x, 16)
    assert len(found) == 99
    torch.testing.assert_close(found.square().mean(1), torch.ones(99, dtype=torch.float64))


@pytest.mark.parametrize("size", [16, 32])
def test_flatter_than_a_random_hadamard_on_other_tokens(size: int) -> None:
    x = heavy_tailed(4000, size)
    fitted, chosen = rows_of(x[:3000]), rows_of(x[3000:])
    found = flattened(fitted, chosen, rounds=40, percentile=99.9, end=1.3)
    assert found.gain.after < 0.85 * found.gain.before
    assert found.gain.after == pytest.approx(mean_peak(chosen.turned(found.rotation)))
    eye = found.rotation[0] @ found.rotation[0].T
    assert float((eye - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-6


def test_chosen_on_other_tokens_it_is_never_worse() -> None:
    """Gaussian rows have no flatter basis: what fits a few of them does not help others."""
    generator = torch.Generator().manual_seed(0)
    fitted, chosen = (rows_of(torch.randn(tokens, 32, generator=generator).double()) for tokens in (40, 4000))
    found = flattened(fitted, chosen, rounds=20, percentile=99.9, end=1.5)
    last = list(flattening_steps(fitted, identities(fitted), [1.5] * 20))[-1]
    assert mean_peak(fitted.turned(last)) < 0.9 * mean_peak(fitted.turned(identities(fitted)))
    assert mean_peak(chosen.turned(last)) > found.gain.after * 0.99
    assert found.gain.after <= found.gain.before


def test_refinement_lowers_the_rounding_error() -> None:
    rows = rows_of(heavy_tailed(2000, 32))
    grid = InputQuantization(4, clip_ratio=0.9)
    found = refined(rows, rows, identities(rows), lambda x: fake_quantize(x, grid), rounds=60)
    turned = rows.turned(found.rotation)
    error = (fake_quantize(turned, grid) - turned).square().mean()
    assert found.gain.after == pytest.approx(float(error), rel=1e-6)
    assert found.gain.after < 0.98 * found.gain.before
    assert found.gain.rounds > 1


SPLITS = [
    InputSplit(24),
    InputSplit(24, 5),
    InputSplit(24, 2, 6),
    InputSplit(24, 2, 6, keep_width=True),
    InputSplit(24, 2, 6, keep_width=True, hadamard=True),
    InputSplit(24, hadamard=True),
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_transpose_of_a_split(split: InputSplit) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    residual = split_input(x, split)[1]
    y = torch.randn(residual.shape, generator=generator, dtype=torch.float64)
    back = unsplit_residual(y, split)
    torch.testing.assert_close((residual * y).sum(1), (x * back).sum(1))
    if split.outliers:
        assert not back[:, split.outlier_index()].any()


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("kept", [0, 2])
def test_values_are_turned_head_by_head(kept: int, hadamard: bool) -> None:
    geometry = ModelGeometry(hidden=24, intermediate=1, layers=1, heads=4, kv_heads=2, head_dim=6, eps=0.0)
    split = InputSplit(24, kept, 6, keep_width=True, hadamard=hadamard)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 24, generator=generator, dtype=torch.float64)
    rows = value_rows(x, split, geometry)
    rotation = torch.stack(
        [torch.linalg.qr(torch.randn(6 - kept, 6 - kept, generator=generator).double())[0] for _ in range(2)]
    )
    heads = x.unflatten(1, (2, 2, 6)).clone()
    for head in range(2):
        heads[:, head, :, kept:] = heads[:, head, :, kept:] @ rotation[head]
    wanted = split_input(heads.flatten(1), split)[1]
    wanted = wanted / wanted.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(rows.turned(rotation), wanted)
    distances = [distance_to_box(rows.turned(identities(rows)), 1.2)]
    for found in flattening_steps(rows, identities(rows), [1.2] * 10):
        distances.append(distance_to_box(rows.turned(found), 1.2))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(distances))
    assert distances[-1] < distances[0]
