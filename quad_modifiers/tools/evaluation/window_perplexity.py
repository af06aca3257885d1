"""Perplexity of a causal language model over fixed token windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with the amount of text it was measured on."""

    value: float  # exp(nll_per_token)
    nll_per_token: float  # mean negative log-likelihood of a predicted token, in nats
    tokens: int  # predicted tokens, that is (length - 1) per window
    stderr: float  # standard error of `nll_per_token` over windows, in nats; NaN for a single window
    # mean negative log-likelihood of each window, in nats, to compare two models window by window
    window_nll: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """Returns the value with the half width of its one-sigma interval, where there is one."""
        if math.isnan(self.stderr):
            return f"{self.value:.3f} ({self.tokens} tokens)"
        return f"{self.value:.3f} +- {self.value * self.stderr:.3f} ({self.tokens} tokens)"


def perplexity(
    model: "PreTrainedModel",
    windows: torch.Tensor | Sequence[torch.Tensor],
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Returns the perplexity of `model`, each window on its own, without context from its neighbours.

    The first token of a window is given, the others are predicted. Log-softmax runs in float32 for any dtype of
    the model. Two models compared on the same windows have strongly correlated errors: the error of their ratio is
    smaller than `stderr` says.

    Args:
        model: causal language model; it is in evaluation mode for the duration of the call.
        windows: [count, length] token ids, or a sequence of [1, length].
        batch_size: windows per forward pass.
        progress: True to show a progress bar.

    Raises:
        ValueError: for no window, fewer than two tokens a window, `batch_size` below 1, an id outside the model's
            vocabulary, or logits that are NaN or infinite.
    """
    stacked = stack_windows(windows)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    embedding = model.get_input_embeddings().weight
    lowest, highest = int(stacked.min()), int(stacked.max())
    if lowest < 0 or highest >= len(embedding):
        raise ValueError(
            f"token ids run from {lowest} to {highest}, but the model embeds 0 to {len(embedding) - 1}; "
            "use the tokenizer of this model"
        )
    was_training = model.training
    model.eval()
    means: list[torch.Tensor] = []
    try:
        batches = tqdm(stacked.split(batch_size), desc="perplexity", unit="batch", disable=not progress)
        for index, batch in enumerate(batches):
            means.append(_window_nll(model, batch.to(embedding.device), first_window=index * batch_size))
    finally:
        model.train(was_training)
    return perplexity_of(torch.cat(means), stacked.shape[1])


def perplexity_of(nll: torch.Tensor, length: int) -> Perplexity:
    """Returns the perplexity of windows of `length` tokens from the mean negative log-likelihood of each.

    Args:
        nll: `[count]`, float64, in nats.
        length: tokens of a window.

    Raises:
        ValueError: for a window whose likelihood is NaN or infinite.
    """
    _check_finite(nll, first_window=0)
    mean = nll.mean().item()
    stderr = (nll.std() / math.sqrt(len(nll))).item() if len(nll) > 1 else math.nan
    return Perplexity(_exp(mean), mean, len(nll) * (length - 1), stderr, tuple(nll.tolist()))


@torch.inference_mode()
def _window_nll(model: "PreTrainedModel", batch: torch.Tensor, first_window: int) -> torch.Tensor:
    """Returns the mean negative log-likelihood of each window: [batch], float64, on the CPU."""
    logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
    token_nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
    )
    window_nll = token_nll.view(batch.shape[0], -1).double().mean(dim=1).cpu()
    _check_finite(window_nll, first_window)
    return window_nll


def _check_finite(window_nll: torch.Tensor, first_window: int) -> None:
    if not window_nll.isfinite().all():
        bad = first_window + int((~window_nll.isfinite()).nonzero()[0])
        raise ValueError(
            f"the model's logits are NaN or infinite in window {bad}; check its weights for NaN, or load it in "
            "float32 or bfloat16 instead of float16"
        )


def stack_windows(windows: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns `windows` as one [count, length] tensor; ValueError for none, or fewer than two tokens a window."""
    if not isinstance(windows, torch.Tensor):
        shapes = sorted({tuple(window.shape) for window in windows})
        if len(shapes) != 1:
            raise ValueError(f"windows must be a non-empty sequence of one shape [1, length], found shapes {shapes}")
        windows = torch.cat(list(windows))
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows must be [count, length] with at least one window of two tokens, not {list(windows.shape)}"
        )
    return windows


def _exp(nll: float) -> float:
    """Returns exp(nll), infinity where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
