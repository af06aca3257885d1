"""lm-eval's model type `quad`: any causal language model that transformers loads, QUAD checkpoints included.

Importing this module registers the type; `register` of `quad_modifiers.tools.evaluation.harness` does so without
importing it.
"""

import warnings
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from quad_modifiers.checkpoint.whole_model import load_whole_model


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
    """

    def __init__(
        self, pretrained: Any, device: str | None = None, softmax_dtype: Any = "float32", **arguments: Any
    ) -> None:
        super().__init__(
            pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            softmax_dtype=softmax_dtype,
            **{"backend": "causal", **arguments},  # HFLM does not know the model types of QUAD checkpoints
        )

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
