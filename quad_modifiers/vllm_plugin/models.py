"""vLLM model classes for QUAD checkpoints: vLLM's own graphs, with every tensor checked while it is loaded."""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.apertus import ApertusForCausalLM
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.granite import GraniteForCausalLM
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform

from quad_modifiers.checkpoint.head_transform import NAME as HEAD_TRANSFORM
from quad_modifiers.checkpoint.tensors import expected_tensors
from quad_modifiers.nn.kv_cache import BUFFERS
from quad_modifiers.nn.transformed_norm import add_head_transform
from quad_modifiers.plugins import architectures
from quad_modifiers.vllm_plugin.config import QuadConfig
from quad_modifiers.vllm_plugin.kernels import kernel_key
from quad_modifiers.vllm_plugin.tensor_check import checked_tensors


class CheckedWeights:
    """Mix-in, before a vLLM causal LM: checks the tensors of a QUAD checkpoint under their own names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **arguments: Any) -> None:
        if not isinstance(vllm_config.quant_config, QuadConfig):
            raise ValueError(
                f"{type(self).__name__} runs QUAD checkpoints, but quantization is "
                f"{vllm_config.model_config.quantization!r}; leave --quantization out"
            )
        if isinstance(vllm_config.additional_config, dict):  # part of the key of vLLM's compile cache
            vllm_config.additional_config["quad_kernels"] = kernel_key(torch.device(current_platform.device_type))
        super().__init__(vllm_config=vllm_config, prefix=prefix, **arguments)  # type: ignore[call-arg]
        self._checkpoint = vllm_config.model_config, vllm_config.quant_config.quad
        if HEAD_TRANSFORM in vllm_config.quant_config.quad.sections:
            decoder: Any = getattr(self, "model", None)
            weight = getattr(decoder.norm, "weight", None)
            if weight is not None:  # only the last of several pipeline stages has the norm
                add_head_transform(decoder.norm, weight.new_empty(len(weight), len(weight)))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the tensors of a checkpoint; ValueError names those missing, surplus, mis-shaped or damaged."""
        model_config, quad = self._checkpoint
        expected = expected_tensors(model_config.hf_config, quad, architectures())
        checked = checked_tensors(weights, expected, model_config.dtype)
        # vLLM's cache has its own way.
        served = (each for each in checked if each[0].rpartition(".")[2] not in BUFFERS)
        loaded: set[str] = super().load_weights(served)  # type: ignore[misc]
        return loaded


class QuadLlamaForCausalLM(CheckedWeights, LlamaForCausalLM):
    """Llama."""


class QuadMistralForCausalLM(CheckedWeights, MistralForCausalLM):
    """Mistral."""


class QuadQwen3ForCausalLM(CheckedWeights, Qwen3ForCausalLM):
    """Qwen3."""


class _Qwen2DecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with Qwen2's biases: on q, k and v only."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = copy(config or vllm_config.model_config.hf_config)
        config.qkv_bias = True
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)


class QuadQwen2ForCausalLM(CheckedWeights, LlamaForCausalLM):
    """Qwen2: vLLM's own class takes head_dim from hidden_size, which the extended basis changes."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = _Qwen2DecoderLayer
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class QuadApertusForCausalLM(CheckedWeights, ApertusForCausalLM):
    """Apertus."""


class QuadErnie4_5ForCausalLM(CheckedWeights, Ernie4_5ForCausalLM):
    """Ernie 4.5."""


class QuadGraniteForCausalLM(CheckedWeights, GraniteForCausalLM):
    """Granite."""


class QuadGraniteSWAForCausalLM(CheckedWeights, GraniteForCausalLM):
    """Granite with sliding windows, which vLLM computes by the same class."""


class QuadMinistralForCausalLM(CheckedWeights, MistralForCausalLM):
    """Ministral."""


class QuadPhi3ForCausalLM(CheckedWeights, Phi3ForCausalLM):
    """Phi-3 and Phi-4."""
