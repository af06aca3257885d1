"""A short look at a model behind its compression, beside the original: does it still speak?"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.checkpoint.opened import find_tokenizer
from quad_modifiers.checkpoint.whole_model import LoadingOptions, load_reference
from quad_modifiers.data import CalibrationSource, calibration_windows, held_out_name, held_out_prose, token_windows
from quad_modifiers.tools.evaluation.window_perplexity import perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BROKEN = 2.0  # times the original's perplexity, from which a result is called broken
_WINDOWS = 4
_PROMPT_TOKENS = 16
_NEW_TOKENS = 24


@dataclass(frozen=True)
class Look:
    """What was seen of a model: its perplexity, and how it goes on, "" without a tokenizer."""

    perplexity: float
    continuation: str


@dataclass(frozen=True)
class Sanity:
    """A model before and after.

    Attributes:
        text: what the windows are of.
        windows: number of windows.
        prompt: beginning of the first window, with which both go on.
        before: the original.
        after: the compressed model.
    """

    text: str
    windows: int
    prompt: str
    before: Look
    after: Look

    @property
    def ratio(self) -> float:
        """Perplexity after / before."""
        return self.after.perplexity / self.before.perplexity


class SanityCheck:
    """Looks at models on the same few windows.

    The windows are of text that never calibrates where the calibration text is the default one; else they are drawn
    anew from the text that calibrated.

    Args:
        original: folder or Hub id of the original.
        dataset: the calibration text, None for the default one.
        tokenizer: folder or Hub id; the original's own by default.
        sequence_length: tokens of a window.
        seed: with which the calibration text was drawn.
        options: how the original is loaded.
        reading: `text_column`, `splits` and `dataset_config_name` of `calibration_windows`.

    Raises:
        ValueError, OSError: if there is no text of this length.
    """

    def __init__(
        self,
        original: str | Path,
        *,
        dataset: CalibrationSource = None,
        tokenizer: str | Path | None = None,
        sequence_length: int = 512,
        seed: int = 0,
        options: LoadingOptions | None = None,
        **reading: Any,
    ) -> None:
        self.original = original
        self.options = LoadingOptions() if options is None else options
        self._tokens: PreTrainedTokenizerBase | None = find_tokenizer(tokenizer or original, self.options)
        if dataset is not None:
            self.text = "the calibration text, drawn anew"
            found = calibration_windows(
                dataset, self._tokens, num_samples=_WINDOWS, sequence_length=sequence_length, seed=seed + 1, **reading
            )
            shortest = min(window.shape[1] for window in found)
            self._windows = torch.cat([window[:, :shortest] for window in found])
            return
        if self._tokens is None:
            raise ValueError(f"{original} has no tokenizer")
        self.text = held_out_name()
        self._windows = token_windows(self._tokens, held_out_prose(), sequence_length, _WINDOWS, seed=seed)

    @torch.inference_mode()
    def look(self, model: "PreTrainedModel") -> Look:
        """Returns what is seen of a model; a ValueError if its logits are NaN."""
        value = perplexity(model, self._windows, progress=False).value
        ids = self._windows[:1, :_PROMPT_TOKENS].to(model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=0
        )
        return Look(value, self._words(output[0, ids.shape[1] :]))

    def compare(self, take: "Callable[[], PreTrainedModel]") -> Sanity:
        """Looks at the compressed model, which `take` hands over and which is let go, and then at the original.

        Raises:
            ValueError, OSError: if the logits of one are NaN, or the original cannot be loaded.
        """
        after = self.look(take())
        gc.collect()  # before the original takes its memory
        before = self.look(load_reference(self.original, self.options))
        prompt = self._words(self._windows[0, :_PROMPT_TOKENS])
        return Sanity(self.text, len(self._windows), prompt, before, after)

    def _words(self, ids: torch.Tensor) -> str:
        return "" if self._tokens is None else " ".join(str(self._tokens.decode(ids, skip_special_tokens=True)).split())
