"""vLLM's quantization config for quant_method "quad"."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quad_modifiers.checkpoint.cache_section import NAME as KV_CACHE
from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
from quad_modifiers.checkpoint.head_transform import NAME as HEAD_TRANSFORM
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead
from quad_modifiers.vllm_plugin.layout import branch_ranks, fused_format, layer_index
from quad_modifiers.vllm_plugin.linear import QuadLinearMethod
from quad_modifiers.vllm_plugin.table import QuadTableMethod

logger = init_logger("vllm.quad_modifiers")  # vLLM shows what is logged below its own name


class QuadConfig(QuantizationConfig):
    """`quantization_config` of a QUAD checkpoint; `quad` is its section of that name, checked."""

    def __init__(self, quad: QuadFormat) -> None:
        super().__init__()
        self.quad = quad

    def __repr__(self) -> str:
        """The base model and the roles."""
        return f"QuadConfig({self.quad.base_model_type}: {', '.join(self.quad.linears)})"

    def get_name(self) -> Any:
        """The quant_method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of the model."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Integer tensor cores, and Triton."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuadConfig":
        """Reads `quantization_config`; ValueError if it is damaged, of an unknown version, or not served."""
        quad = read_format(config.get("quad"))
        terms = {kind for linear in quad.linears.values() for kind in linear.terms}
        unserved = sorted(terms - {BranchTerm.kind} | quad.sections.keys() - {HEAD_TRANSFORM, KV_CACHE})
        if unserved:
            raise ValueError(
                f"the checkpoint has {', '.join(map(repr, unserved))}, which the vLLM plugin does not compute "
                "yet; load it with transformers"
            )
        if KV_CACHE in quad.sections:
            logger.warning_once(
                "the checkpoint asks for keys and values in 4 bits, or 4 and 8, which vLLM's cache holds its own way: "
                "on CUDA give --kv-cache-dtype int4_per_token_head; without it, and on a CPU, they are in what "
                "--kv-cache-dtype says, by default the model's own type"
            )
        return cls(quad)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a decoder linear, or of a packed embedding or head; None leaves a layer as it is."""
        if isinstance(layer, ParallelLMHead):
            return None if self.quad.head is None else QuadTableMethod(PackedHead)
        if isinstance(layer, VocabParallelEmbedding):
            return None if self.quad.embedding is None else QuadTableMethod(PackedEmbedding)
        if not isinstance(layer, LinearBase):
            return None
        name = prefix.rpartition(".")[2]
        roles = tuple(self.packed_modules_mapping.get(name, (name,)))
        linears = self.quad.of_layer(layer_index(prefix)) if self.quad.overrides else self.quad.linears
        fused = fused_format(linears, roles, prefix)
        members = [linears[role] for role in roles]
        out_features = tuple(member.out_features for member in members)
        return QuadLinearMethod(fused, out_features, prefix, branch_ranks(members))
