"""A model to be evaluated: where it comes from, what identifies it, and the lm-eval model, loaded when first needed."""

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.checkpoint.opened import Opened, open_checkpoint, tokenizer_of
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions, check_device
from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.reporting import only_errors
from quad_modifiers.tools.evaluation.cache import fingerprint
from quad_modifiers.tools.evaluation.vllm_engine import vllm_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Subject:
    """A model, given as a folder, a Hub id or a loaded transformers model.

    Args:
        model: the model.
        tokenizer: tokenizer of a loaded model, if it is not where its weights come from; unused for a folder or Hub id.
        batch_size: requests in a forward pass.
        device: "cpu", "cuda", ...; the GPU if there is one by default. Loaded models stay where they are.
        options: how a folder or Hub id is loaded; its `device` is not read.
        backend: "transformers", or "vllm", which finds its device itself.
        seed: seed of vLLM's engine.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds no model.
        ValueError: if there is no such device, the config.json is damaged, a loaded model is given with options of
            loading, or a device for vLLM.
        TypeError: for a loaded model and vLLM.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        batch_size: int = 16,
        device: str | None = None,
        options: LoadingOptions = DEFAULTS,
        backend: str = "transformers",
        seed: int = 0,
    ) -> None:
        self.backend, self._seed = backend, seed
        self.folder: Path | None = None
        self.model: str | PreTrainedModel
        if backend == "vllm":
            _check_served(model, device)
            self.device, self.options = f"vLLM's, {vllm_version()}", replace(options, device=None)
        else:
            self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            check_device(self.device)
            self.options = replace(options, device=self.device)
        self._opened: Opened | None = None
        if isinstance(model, (str, Path)):
            self._opened = opened = open_checkpoint(model, options=self.options)
            opened.check_weights()
            self.model, self.folder, self.config = opened.name, opened.folder, opened.config
        else:
            _check_unread(options)
            self.model, self.config = model, model.config
        self._tokenizer = None if isinstance(self.model, str) else tokenizer
        self._batch_size = batch_size
        self._lm: Any = None
        self._training = not isinstance(self.model, str) and self.model.training

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

        where = {"revision": self.options.revision, "cache_dir": self.options.cache_dir}
        config = cached_file(self.model, "config.json", **where)  # in a folder that is named for the commit
        return f"{self.model}@{Path(config).parent.name}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; loading it does not load the model."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.source, self.options)
        return self._tokenizer

    @property
    def lm(self) -> Any:
        """The lm-eval model, in memory from the first use until `release`."""
        if self._lm is None and self.backend == "vllm":
            from quad_modifiers.tools.evaluation.vllm_engine import vllm_lm

            self._lm = vllm_lm(self.source, self._batch_size, self._seed, self.options)
        elif self._lm is None:
            from quad_modifiers.tools.evaluation.lm import QuadLM

            tokenizer = self.tokenizer  # first: it is the cheaper one to miss
            model = self.model if self._opened is None else self._opened.load()
            if self._opened is not None and self._opened.quantized is None:
                _hint_at_float32(model, self.name)
            with only_errors("lm_eval.models.huggingface"):  # it warns of models that others have loaded
                self._lm = QuadLM(model, device=self.device, tokenizer=tokenizer, batch_size=self._batch_size)
            self._lm.pretrained = self.model  # the name, as of a model that lm-eval loads itself
        return self._lm

    def release(self) -> None:
        """Frees the memory of the model, unless it is the caller's, which goes back to the mode that it had."""
        self._lm = None
        if not isinstance(self.model, str):
            self.model.train(self._training)
        gc.collect()


def _hint_at_float32(model: "PreTrainedModel", name: str) -> None:
    if model.dtype == torch.bfloat16 and fast_dtype(model.device) == torch.float32:
        logger.warning(
            "%s is in bfloat16, which this processor has no instructions for; with --dtype float32 (dtype of "
            "LoadingOptions) it runs several times faster and rounds less",
            name,
        )


def _check_unread(options: LoadingOptions) -> None:
    for name, value in (("revision", options.revision), ("dtype", options.dtype)):
        if value not in (None, "auto"):
            raise ValueError(f"{name}={value} has no effect on a model that is loaded already; omit it")


def _check_served(model: object, device: str | None) -> None:
    if not isinstance(model, (str, Path)):
        raise TypeError("vLLM serves a folder or a Hub id, not a model in memory; save it, or use transformers")
    if device is not None:
        raise ValueError(f"vLLM chooses its device itself; leave the device {device!r} out")
