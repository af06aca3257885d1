"""Compression of toy models with token ids for calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

SAMPLES, LENGTH = 8, 48
TokenIds = Callable[..., torch.Tensor]
Compress = Callable[..., PreTrainedModel]


def _token_ids(samples: int = SAMPLES, length: int = LENGTH, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 320, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def token_ids() -> TokenIds:
    """Return `token_ids(samples=8, length=48, seed=5)`, `[samples, length]`."""
    return _token_ids


@pytest.fixture(scope="session")
def compress() -> Compress:
    """Return `compress(model, *modifiers, **oneshot_arguments)`, which changes and returns the model."""
    from quad_modifiers import oneshot

    def run(model: PreTrainedModel, *modifiers: Any, **arguments: Any) -> PreTrainedModel:
        arguments = {
            "dataset": _token_ids(),
            "num_calibration_samples": SAMPLES,
            "max_seq_length": LENGTH,
            **arguments,
        }
        recipe: str | Sequence[Any] = modifiers[0] if isinstance(modifiers[0], str) else list(modifiers)
        return oneshot(model, recipe, **arguments)

    return run


@pytest.fixture
def refusal_of(compress: Compress, make_toy: Any) -> Callable[[Sequence[Any]], str]:
    """Return `refusal_of(modifiers)`: with what the recipe is refused; the model is checked to be as it was."""
    from quad_modifiers.recipe import RecipeError

    def check(modifiers: Sequence[Any]) -> str:
        model = make_toy("llama", "even")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises((RecipeError, ValueError)) as refused:
            compress(model, *[each.model_copy(deep=True) for each in modifiers])
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        return str(refused.value)

    return check


@pytest.fixture(scope="session")
def logits_of() -> Callable[[PreTrainedModel], torch.Tensor]:
    """Return `logits_of(model)`: float32 logits of 3 x 20 tokens that no calibration uses."""

    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        return model(_token_ids(3, 20, seed=99)).logits.float()

    return run


@pytest.fixture(scope="session")
def assert_same_function() -> Callable[..., None]:
    """Return `assert_same_function(got, wanted, bound=1e-4)`: largest difference over largest logit."""

    def check(got: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-4) -> None:
        measured = float((got - wanted).abs().max() / wanted.abs().max())
        print(f"relative difference of the logits {measured:.1e}, bound {bound:.0e}")
        assert measured < bound

    return check
