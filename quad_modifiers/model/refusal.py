"""Why a model cannot be projected, read from its config: no weight has to be loaded for it.

A rotation of the residual stream passes a block only if every norm is an RMSNorm before a linear, so that its weight
can be folded, and if nothing but linears reads and writes the stream.
"""

from typing import Any

_POST_NORM = (
    "it has a norm after attention or MLP, whose weight works on single channels of what is added to the stream, and "
    "no rotation of the stream passes it"
)
_SCALED = "it multiplies its embeddings by the square root of hidden_size, which the extended basis changes"
_LAYER_NORM = "it has LayerNorm, which subtracts the mean and so depends on the basis; only RMSNorm can be folded"
_RECURRENT = "it has recurrent, state space or convolution layers, which are not the attention that a projection knows"
_EXPERTS = "it has experts (MoE), which transformers holds in three-dimensional tensors and not in linears"
_LATENT = "it has latent attention: queries, keys and values read norms of their own and not the stream"
_MULTIMODAL = "it is multimodal, and only models whose whole input is text are supported"
_ENCODER_DECODER = "it has an encoder beside the decoder, or reads one"
_DRAFT = "it drafts for another model and reads that one's activations"
_NEWER = "it came with a newer transformers than llm-compressor takes"
_UNKNOWN = "nobody has described its parts yet"

# What the config does not tell.
_BY_TYPE = {
    "exaone4": _POST_NORM,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "gemma3n_text": _POST_NORM,
    "gemma4_text": _POST_NORM,
    "gemma4_unified_text": _POST_NORM,
    "glm4": _POST_NORM,
    "hyperclovax": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "gemma": _SCALED,
    "vaultgemma": _SCALED,
    "olmo": _LAYER_NORM,
    "opt": _LAYER_NORM,
    "xglm": _LAYER_NORM,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "xlstm": _RECURRENT,
    "trocr": _ENCODER_DECODER,
    "dbrx": _EXPERTS,
    "apertus1p5_text": _NEWER,
    "exaone": _NEWER,
    "internlm3": _NEWER,
    "iquestcoder": _NEWER,
    "bitnet": "it has norms between attention or the activation and the linear that follows",
    "blt": "it has several stacks of blocks with cross-attention between them",
    "cpmant": "its norms and its position biases are not those of a block that a projection knows",
    "diffllama": "it mixes the values of several heads and norms the result, which no rotation of values passes",
    "doge": "it multiplies the stream channel by channel, which no rotation of the stream passes",
    "dory": "it weighs what its blocks add to the stream channel by channel, which no rotation of the stream passes",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "helium": "its o_proj has hidden_size inputs, which the extended basis changes",
    "hrm_text": "it runs two stacks of blocks over and over",
    "nanochat": "its norms have no weight, and its MLP has no gate",
}

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")
_RECURRENT_FIELDS = ("state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache", "linear_conv_kernel_dim")
_LAYER_NORM_FIELDS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_PARTS = ("text_config", "vision_config", "audio_config", "audio_encoder_config")
_RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid"}


def reason_of_refusal(config: Any) -> str:
    """Returns why the model of a config cannot be compressed, as a clause; for types without an `Architecture`."""

    def has(*fields: str) -> bool:
        return any(getattr(config, field, None) for field in fields)

    model_type = getattr(config, "model_type", None)
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    if has(*_PARTS):
        return _MULTIMODAL
    if has("is_encoder_decoder"):
        return _ENCODER_DECODER
    if has(*_RECURRENT_FIELDS) or _RECURRENT_LAYERS & set(getattr(config, "layer_types", None) or ()):
        return _RECURRENT
    if has(*_EXPERT_FIELDS):
        return _EXPERTS
    if has("kv_lora_rank"):
        return _LATENT
    if has(*_LAYER_NORM_FIELDS) and not has("rms_norm_eps"):
        return _LAYER_NORM
    return _UNKNOWN
