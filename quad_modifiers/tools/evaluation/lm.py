"""lm-eval's model type `quad`: any causal language model that transformers loads, QUAD checkpoints included.

Importing this module registers the type; `register` of `quad_modifiers.tools.evaluation.harness` does so without
importing it.
"""

import copy
import warnings
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.data.token_rows import check_vocabulary


class _WholeModels:
    """Stands for `AutoModelForCausalLM`, which would fill what a folder lacks with random numbers."""

    from_pretrained = staticmethod(load_whole_model)


@register_model("quad")
class QuadLM(HFLM):
    """lm-eval's `hf` with defaults that small differences between two models need.

    Takes the arguments of `HFLM`, with other defaults:

    * `softmax_dtype` is float32. In bf16, which `HFLM` takes for a bf16 model, a log-likelihood has 8 significant bits:
      choices tie, and perplexities are off by more than 4-bit weights cost.
    * `device` is the GPU if there is one, else the CPU; `HFLM` asks for a GPU that need not be there.

    A tokenizer without special tokens is made up for by those that the model's config names, and is left as it was.
    """

    def __init__(
        self, pretrained: Any, device: str | None = None, softmax_dtype: Any = "float32", **arguments: Any
    ) -> None:
        if "tokenizer" in arguments:
            arguments["tokenizer"] = copy.deepcopy(arguments["tokenizer"])  # HFLM gives it a padding token
        super().__init__(
            pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            softmax_dtype=softmax_dtype,
            **{"backend": "causal", **arguments},  # HFLM does not know the model types of QUAD checkpoints
        )
        self._embedded = len(self.model.get_input_embeddings().weight)
        if self.tokenizer.pad_token_id >= self._embedded:  # one that HFLM has added
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)  # padding is masked: any does

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            ValueError: if neither tokenizer nor model has one.
        """
        return self._special("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text whose first token is to be predicted.

        Raises:
            ValueError: if neither tokenizer nor model has one.
        """
        custom = self.custom_prefix_token_id
        return self._special("bos_token_id", "eos_token_id") if custom is None else int(custom)

    def _special(self, *names: str) -> int:
        for owner in (self.tokenizer, self.model.generation_config, self.model.config):
            for name in names:
                found = getattr(owner, name, None)
                found = found[0] if isinstance(found, list) and found else found
                if isinstance(found, int):
                    return found
        raise ValueError(
            f"neither the tokenizer nor the model's config has {' or '.join(names)}, which this task needs; set it in "
            "the model's tokenizer_config.json or config.json"
        )

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Checks what goes in and what comes out.

        Raises:
            ValueError: for token ids that the model does not embed, or logits that are NaN or infinite.
        """
        check_vocabulary([inps], self._embedded, "a request")
        logits: torch.Tensor = super()._model_call(inps, *arguments, **keywords)
        if not torch.isfinite(logits).all():
            raise ValueError(
                "the model's logits are NaN or infinite; check its weights for NaN, or load it in float32 or bfloat16 "
                "instead of float16"
            )
        return logits

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        check_vocabulary([context], self._embedded, "a request")
        return super()._model_generate(context, *arguments, **keywords)

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        """Loads a model that is whole, or not at all.

        Without the warning that the checkpoint's own quantization config, which `HFLM` passes on, is there. Passing
        None instead would not do: transformers then takes the checkpoint for an unquantized one.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            self.AUTO_MODEL_CLASS = _WholeModels
            try:
                super()._create_model(pretrained, **arguments)
            finally:
                del self.AUTO_MODEL_CLASS  # that of the class is seen again
