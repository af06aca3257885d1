"""A model family of its own: Phi-3 under another name, whose blocks fuse q, k, v and gate, up."""

from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from quad_modifiers.model.architecture import Architecture, Group, Member


class TwinConfig(Phi3Config):
    """Config of a twin."""

    model_type = "twin"


class TwinForCausalLM(Phi3ForCausalLM):
    """A twin."""

    config_class = TwinConfig


AutoConfig.register("twin", TwinConfig)
AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM)

TWIN = Architecture(
    "twin",
    block=(
        Group("in", "self_attn", (Member("qkv_proj", ("queries", "keys", "values")),), "stream", "input_layernorm"),
        Group("out", "self_attn", (Member("o_proj", ("stream",)),), "values"),
        Group("mlp_in", "mlp", (Member("gate_up_proj", ("channels",) * 2),), "stream", "post_attention_layernorm"),
        Group("mlp_out", "mlp", (Member("down_proj", ("stream",)),), "channels"),
    ),
)
