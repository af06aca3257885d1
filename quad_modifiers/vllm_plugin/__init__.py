"""Serves QUAD checkpoints with an unmodified vLLM; docs/developer/vllm.md has the design.

vLLM calls `register` through the entry-point group `vllm.general_plugins`. Importing this package imports no vLLM.
"""

MODEL_CLASSES = (
    "QuadLlamaForCausalLM",
    "QuadMistralForCausalLM",
    "QuadQwen2ForCausalLM",
    "QuadQwen3ForCausalLM",
    "QuadApertusForCausalLM",
    "QuadErnie4_5ForCausalLM",
    "QuadGraniteForCausalLM",
    "QuadGraniteSWAForCausalLM",
    "QuadMinistralForCausalLM",
    "QuadPhi3ForCausalLM",
)


def register() -> None:
    """Teaches this process to serve QUAD checkpoints; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry

    from quad_modifiers.checkpoint.format import QUANT_METHOD
    from quad_modifiers.checkpoint.loader import register_loader
    from quad_modifiers.vllm_plugin.config import QuadConfig

    register_loader()
    register_quantization_config(QUANT_METHOD)(QuadConfig)
    supported = ModelRegistry.get_supported_archs()
    for name in MODEL_CLASSES:
        if name not in supported:
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
