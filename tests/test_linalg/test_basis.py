"""Bases of the residual stream."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.linalg import extended_basis, outlier_basis, random_rotation, square_basis

ROTATIONS = ("hadamard", "random", "none")


def sample_gram(size: int, samples: int | None = None) -> torch.Tensor:
    x = torch.randn(samples or 4 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    x[:, :3] *= 10
    return x.T @ x


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def assert_orthonormal(matrix: torch.Tensor, what: str) -> None:
    """Rows are orthonormal: M M^T = I."""
    measured = float((matrix @ matrix.T - eye(matrix.shape[0])).abs().max())
    print(f"{what}: max |M M^T - I| = {measured:.1e}, bound 1e-11")
    assert measured < 1e-11


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("size", "rank"), [(64, 8), (63, 5), (84, 1), (12, 11), (20, 0)])
def test_extended_basis_is_a_tight_frame(size: int, rank: int, rotation: str) -> None:
    outliers, _ = outlier_basis(sample_gram(size), rank)
    basis = extended_basis(outliers, random_rotation(size, rotation, torch.Generator().manual_seed(0)))
    assert basis.shape == (size, size + rank)
    assert_orthonormal(basis, "Q")
    # What is left after the outliers holds nothing of them.
    torch.testing.assert_close(outliers.T @ basis[:, rank:], torch.zeros(rank, size, dtype=torch.float64))


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(("size", "rank"), [(64, 8), (63, 5), (84, 1), (12, 11), (20, 0)])
def test_square_basis_is_orthogonal(size: int, rank: int, rotation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outliers, complement = outlier_basis(sample_gram(size), rank)
    inner = random_rotation(rank, rotation, generator)
    basis = square_basis(outliers, complement, random_rotation(size - rank, rotation, generator), inner)
    assert basis.shape == (size, size)
    assert_orthonormal(basis, "Q")
    assert_orthonormal(basis.T, "Q^T")


def test_outliers_are_the_top_eigenvectors() -> None:
    gram = sample_gram(32)
    outliers, complement = outlier_basis(gram, 4)
    values = torch.linalg.eigvalsh(gram).flip(0)
    captured = torch.diagonal(outliers.T @ gram @ outliers)
    torch.testing.assert_close(captured, values[:4])
    torch.testing.assert_close(torch.diagonal(complement.T @ gram @ complement), values[4:])


def test_result_does_not_depend_on_the_solvers_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = sample_gram(16)
    expected = outlier_basis(gram, 16 // 2)
    vectors = torch.cat(expected, dim=1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    solve = torch.linalg.eigh

    def flipped(matrix: torch.Tensor) -> object:
        values, found = solve(matrix)
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)
        return torch.return_types.linalg_eigh((values, found * signs))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    for got, wanted in zip(outlier_basis(gram, 8), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [-1, 16, 17])
def test_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank \({rank}\) must be at least 0 and smaller than hidden_size \(16\)"):
        outlier_basis(sample_gram(16), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gram_must_be_finite(bad: float) -> None:
    gram = sample_gram(8)
    gram[2, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        outlier_basis(gram, 2)


@pytest.mark.parametrize("size", [64, 63, 20, 1])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotation_is_orthogonal_and_follows_its_seed(size: int, rotation: str) -> None:
    first, again, other = (random_rotation(size, rotation, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert first.dtype == torch.float64
    assert_orthonormal(first, rotation)
    assert torch.equal(first, again)
    if rotation == "none":
        assert torch.equal(first, eye(size))
    elif size > 1:
        assert not torch.equal(first, other)


def test_global_generator_is_not_used() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    random_rotation(63, "random", torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_hadamard_rotation_spreads_evenly_and_falls_back_to_random() -> None:
    spread = random_rotation(28, "hadamard", torch.Generator().manual_seed(0))
    torch.testing.assert_close(spread.abs(), torch.full_like(spread, 28**-0.5))
    assert_orthonormal(random_rotation(27, "hadamard", torch.Generator().manual_seed(0)), "fallback")
    assert float(random_rotation(27, "hadamard", torch.Generator().manual_seed(0)).abs().max()) < 0.9
