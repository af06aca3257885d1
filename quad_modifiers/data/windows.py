"""Cuts texts into token windows of one length, by the usual WikiText protocol."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.data.readable import readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SEPARATOR = "\n\n"


def token_windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    length: int,
    count: int | None = None,
    *,
    seed: int | None = None,
    fewer: bool = False,
) -> torch.Tensor:
    """Returns non-overlapping windows of one token stream.

    The texts are joined with a blank line, tokenized as a whole without special tokens, and cut every `length` tokens;
    an incomplete window at the end is dropped.

    Args:
        tokenizer: the tokenizer of the model that will see the windows.
        texts: documents, in order.
        length: tokens per window.
        count: windows to return, all of them by default.
        seed: when given, the `count` windows are drawn at random without replacement (and come in the order drawn);
            otherwise they are the first ones.
        fewer: True to return all windows of a text that has fewer than `count`.

    Returns:
        [count, length], int64.

    Raises:
        ValueError: if `length` or `count` is not positive, there is no text, or it has fewer windows than asked, with
            `fewer` none at all.
    """
    if length < 1 or (count is not None and count < 1):
        raise ValueError(f"length and count must be positive, not length={length}, count={count}")
    stream = token_stream(tokenizer, texts)
    available = stream.numel() // length
    if not available:
        raise ValueError(
            f"the text has {stream.numel()} tokens, less than one window of {length} tokens; lower the length to at "
            f"most {stream.numel()}, or give more text"
        )
    if fewer and count is not None:
        count = min(count, available)
    windows = stream_windows(stream, length)
    if count is None:
        return windows
    if available < count:
        raise ValueError(
            f"the text has {stream.numel()} tokens, enough for {available} windows of {length} tokens, but {count} "
            f"are needed; lower the number of windows to {available} or their length to {stream.numel() // count}, or "
            "give more text"
        )
    if seed is None:
        return windows[:count].clone()
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(available, generator=generator)[:count]]


def warn_of_length(config: Any, length: int) -> None:
    """Warns if windows of `length` tokens are longer than what the model of a config was trained on."""
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        logger.warning("windows of %d tokens are longer than the %d positions that the model knows", length, positions)


def stream_windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the complete windows of a stream `[tokens]`, `[windows, length]`; an incomplete one is dropped."""
    return stream[: len(stream) // length * length].view(-1, length)


def token_stream(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> torch.Tensor:
    """Returns the tokens of all texts joined with a blank line: [tokens], int64, no special tokens added."""
    texts = readable(texts)
    joined = _SEPARATOR.join(text for text in texts if text.strip())
    if not joined:
        raise ValueError(f"there is no text to tokenize: {len(texts)} documents, all empty; give a non-empty text")
    # verbose=False: the stream is longer than the model's context on purpose, windows are cut from it.
    encoding = tokenizer(joined, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)
