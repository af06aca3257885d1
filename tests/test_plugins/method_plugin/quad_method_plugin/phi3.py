"""The model family: Phi-3, whose blocks fuse q, k, v and gate, up."""

from quad_modifiers.model.architecture import Architecture, Group, Member

PHI3 = Architecture(
    "phi3",
    block=(
        Group("in", "self_attn", (Member("qkv_proj", ("queries", "keys", "values")),), "stream", "input_layernorm"),
        Group("out", "self_attn", (Member("o_proj", ("stream",)),), "values"),
        Group("mlp_in", "mlp", (Member("gate_up_proj", ("channels",) * 2),), "stream", "post_attention_layernorm"),
        Group("mlp_out", "mlp", (Member("down_proj", ("stream",)),), "channels"),
    ),
)
