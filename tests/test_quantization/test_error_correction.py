"""How far weights make up for the error of earlier layers."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.quantization.error_correction import Correction, Moments, corrected, cross_fitted

WIDTH, OUT = 24, 16


def drawn(tokens: int, seed: int) -> torch.Tensor:
    scale = torch.logspace(1, -1, WIDTH, dtype=torch.float64)
    return torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def moments(seen: torch.Tensor, original: torch.Tensor) -> Moments:
    return Moments(seen.T @ seen / len(seen), (original - seen).T @ seen / len(seen))


def sample(tokens: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the quantized model and of the original, which differ by a matrix and by noise."""
    seen = drawn(tokens, seed)
    matrix = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 0.02
    return seen, seen + seen @ matrix + noise * drawn(tokens, seed + 1000)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(5))


def test_what_holds_for_both_halves_is_taken_whole(weight: torch.Tensor) -> None:
    halves = [moments(*sample(4000, 0.0, seed)) for seed in (0, 1)]
    found = cross_fitted(weight, halves, WIDTH)
    assert found.share > 0.9
    assert found.ridge == pytest.approx(0.01)


def test_noise_is_not_followed(weight: torch.Tensor) -> None:
    halves = []
    for seed in (0, 1):
        seen = drawn(30, seed)
        halves.append(moments(seen, seen + 0.3 * drawn(30, seed + 1000)))
    found = cross_fitted(weight, halves, WIDTH)
    assert found.share < 0.2
    bad = Moments(halves[0].hessian, -halves[1].drift)  # the halves contradict each other
    assert cross_fitted(weight, [Moments(*halves[1]), bad._replace(hessian=halves[1].hessian)], WIDTH).share == 0


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_new_tokens_confirm_it(noise: float, weight: torch.Tensor) -> None:
    """On tokens that nobody saw, the chosen correction is better than none and than a bold one."""
    halves = [moments(*sample(60, noise, seed)) for seed in (0, 1)]
    both = Moments(*(torch.stack(pair).mean(0) for pair in zip(*halves, strict=True)))
    seen, original = sample(20000, noise, 7)

    def error(correction: Correction) -> float:
        found = corrected(weight, both, WIDTH, correction).double()
        return float((original @ weight.double().T - seen @ found.T).square().mean())

    chosen = cross_fitted(weight, halves, WIDTH)
    print(chosen, error(chosen), error(Correction(0.0, 1.0)), error(Correction(1.0, 0.01)))
    assert error(chosen) < error(Correction(0.0, 1.0))
    assert error(chosen) < 1.02 * error(Correction(1.0, 0.01))


def test_no_share_changes_nothing(weight: torch.Tensor) -> None:
    assert torch.equal(corrected(weight, moments(*sample(50, 0.1, 0)), WIDTH, Correction(0.0, 0.1)), weight)
