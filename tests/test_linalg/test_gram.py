"""Streaming Gram matrix."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.linalg import StreamingGram


def activations(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-2, 2, shape[-1]) + 0.5


@pytest.mark.parametrize("chunks", [(97,), (1,) * 97, (90, 7), (1, 96), (32, 64, 1)])
def test_chunked_equals_one_shot(chunks: tuple[int, ...]) -> None:
    x = activations(97, 12)
    gram = StreamingGram(12)
    for chunk in x.split(chunks):
        gram.add(chunk)
    wanted = x.double().T @ x.double() / 97
    assert gram.tokens == 97
    assert gram.mean().dtype == torch.float64
    measured = float(((gram.mean() - wanted).abs() / wanted.diagonal().sqrt().outer(wanted.diagonal().sqrt())).max())
    print(f"relative difference {measured:.1e}, bound 1e-6")
    assert measured < 1e-6


def test_every_token_counts_once_whatever_its_batch() -> None:
    x = activations(24, 5)
    flat, nested = StreamingGram(5), StreamingGram(5)
    flat.add(x)
    nested.add(x[:20].reshape(2, 10, 5))
    nested.add(x[20:].reshape(1, 4, 5))
    assert nested.tokens == flat.tokens == 24
    torch.testing.assert_close(nested.mean(), flat.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_activations_are_counted_and_refused(bad: float) -> None:
    x = activations(6, 4)
    x[1, 2] = x[3, 0] = bad
    gram = StreamingGram(4)
    with pytest.raises(ValueError, match="2 calibration activations are NaN or infinite"):
        gram.add(x)
    assert gram.tokens == 0
    assert not gram.total.any()


def test_overflow_of_the_product_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration activations"):
        StreamingGram(4).add(torch.full((2, 4), 1e30))


def test_width_and_emptiness_are_checked() -> None:
    gram = StreamingGram(4)
    with pytest.raises(ValueError, match="activations have 5 coordinates, the Gram matrix has 4"):
        gram.add(activations(3, 5))
    with pytest.raises(ValueError, match="no calibration tokens"):
        gram.mean()
