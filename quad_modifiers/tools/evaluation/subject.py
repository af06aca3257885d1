"""A model to be evaluated: where it comes from, what identifies it, and the lm-eval model, loaded when first needed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.checkpoint.opened import open_checkpoint, tokenizer_of
from quad_modifiers.tools.evaluation.cache import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Subject:
    """A model, given as a folder, a Hub id or a loaded transformers model.

    Args:
        model: the model.
        tokenizer: tokenizer of a loaded model, if it is not where its weights come from; unused for a folder or Hub id.
        batch_size: requests in a forward pass.
        device: "cpu", "cuda", ...; the GPU if there is one by default. Loaded models stay where they are.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model.
        ValueError: there is no such device, or the model's config.json is damaged.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.folder: Path | None = None
        self.model: str | PreTrainedModel
        if isinstance(model, (str, Path)):
            opened = open_checkpoint(model)
            opened.check_weights()
            self.model, self.folder, self.config = opened.name, opened.folder, opened.config
        else:
            self.model, self.config = model, model.config
        self._tokenizer = None if isinstance(self.model, str) else tokenizer
        self.device = _usable(device) if device else "cuda" if torch.cuda.is_available() else "cpu"
        self._batch_size = batch_size
        self._lm: Any = None

    @property
    def source(self) -> str:
        """The path or Hub id; what transformers recorded for a loaded model."""
        return self.model if isinstance(self.model, str) else self.model.name_or_path or type(self.model).__name__

    @property
    def name(self) -> str:
        """What others may read: the Hub id, or the name of the folder without where it lies."""
        return self.source if self.folder is None else self.folder.resolve().name

    @property
    def identity(self) -> str | None:
        """What the results depend on: the content of the folder, or Hub id and commit; None for a loaded model."""
        if not isinstance(self.model, str):
            return None
        if self.folder is not None:
            return fingerprint(self.folder)
        from transformers.utils import cached_file

        config = cached_file(self.model, "config.json")  # in a folder that is named for the commit
        return f"{self.model}@{Path(config).parent.name}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; loading it does not load the model."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.source)
        return self._tokenizer

    @property
    def lm(self) -> Any:
        """The lm-eval model, in memory from the first use until `release`."""
        if self._lm is None:
            from quad_modifiers.tools.evaluation.lm import QuadLM

            self._lm = QuadLM(self.model, device=self.device, tokenizer=self.tokenizer, batch_size=self._batch_size)
        return self._lm

    def release(self) -> None:
        """Free the memory of the model, unless it is the caller's."""
        self._lm = None
        gc.collect()


def _usable(device: str) -> str:
    """Return the device, or raise a ValueError if it is none of this machine's; lm-eval would take the CPU."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device!r} cannot be used ({reason}); give cpu, or omit it") from error
    return device
