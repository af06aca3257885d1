"""The model family: Phi-3, whose blocks fuse q, k, v and gate, up."""

from quad_modifiers.model.architecture import Architecture, Group, Member

PHI3 = Architecture(
    "phi3",
    block=(
        Group("qkv", "self_attn", (Member("qkv_proj", ("queries", "keys", "values")),), "stream", "input_layernorm"),
        Group("o", "self_attn", (Member("o_proj", ("stream",)),), "values"),
        Group("gate_up", "mlp", (Member("gate_up_proj", ("channels",) * 2),), "stream", "post_attention_layernorm"),
        Group("down", "mlp", (Member("down_proj", ("stream",)),), "channels"),
    ),
)
