"""Weights and Hessians as they come up in a projected model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def _hessian(size: int, tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    """Mean of x x^T of correlated inputs with very different energies, `[size, size]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 8 * size
    x = torch.randn(tokens, size, dtype=torch.float64, generator=generator)
    mix = torch.randn(size, size, dtype=torch.float64, generator=generator) / size**0.5
    x = (x @ mix + 0.3 * x) * torch.logspace(-1, 1, size, dtype=torch.float64)[
        torch.randperm(size, generator=generator)
    ]
    return x.T @ x / tokens


def _weight(out: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


@pytest.fixture(scope="session")
def make_hessian() -> Callable[..., torch.Tensor]:
    """Return `make_hessian(size, tokens=8 * size, seed=0)`."""
    return _hessian


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., torch.Tensor]:
    """Return `make_weight(out, columns, seed=1)`."""
    return _weight
