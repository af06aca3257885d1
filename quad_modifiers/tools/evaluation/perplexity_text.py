"""Perplexity of one model over a text, by the WikiText protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quad_modifiers.data import held_out_name, held_out_prose, local_texts, token_windows
from quad_modifiers.data.unused_options import check_column_used

WIKIPEDIA = "wikipedia"
WINDOW_LENGTH = 512  # tokens
WIKIPEDIA_WINDOWS = 40


@dataclass(frozen=True)
class PerplexityText:
    """A text and how it is cut."""

    name: str  # name of the text for readers
    texts: Sequence[str]  # the documents, joined by blank lines
    length: int  # tokens of a window
    count: int | None  # windows, drawn at random; None takes all of them, in order
    seed: int  # seed of the draw
    fewer: bool = False  # True to take all windows of a text that has fewer than `count`

    def windows(self, tokenizer: Any) -> Any:
        """Returns the windows: [count, length], int64.

        Raises:
            ValueError: if the text is too short.
        """
        seed = None if self.count is None else self.seed
        return token_windows(tokenizer, self.texts, self.length, self.count, seed=seed, fewer=self.fewer)


def text_name(source: str | Path) -> str:
    """Returns what results on a text call it."""
    return held_out_name() if source == WIKIPEDIA else Path(source).name


def perplexity_text(
    source: str | Path,
    length: int = WINDOW_LENGTH,
    count: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    text_column: str = "text",
) -> PerplexityText:
    """Returns the text to measure perplexity on.

    The source is a local file, as `quad_modifiers.data.local_texts` takes it, or "wikipedia" for the articles of
    gensim's package that never calibrate; without gensim these are pages of Python's language reference, under their
    own name. By default all windows of a file count, 40 of Wikipedia, `limit` at most.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a length below 2 or an unknown format of file.
    """
    if length < 2:
        raise ValueError(f"the length of a window must be at least 2 tokens, not {length}")
    check_column_used(None if source == WIKIPEDIA else source, text_column)
    if source == WIKIPEDIA:
        texts: Sequence[str] = held_out_prose()
        count = count or WIKIPEDIA_WINDOWS
    else:
        texts = local_texts(source, text_column)
    fewer = count is None
    if limit is not None:
        count = min(count or limit, limit)
    return PerplexityText(text_name(source), texts, length, count, seed, fewer)
