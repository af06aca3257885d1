"""Model architectures as data: the groups of linears of a decoder block, in the order in which they run.

A group is what quantization works on: linears that read the same input. What they read and what their output channels
are says how a projection changes their weights. docs/developer/architectures.md says how to add an architecture.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from quad_modifiers.model.refusal import reason_of_refusal

Space = Literal["stream", "queries", "keys", "values", "channels", "other"]
"""Whose coordinates: those of the residual stream, of query, key or value heads, of the MLP; `other` stays as it is."""

Runner = Literal["segmented", "hooked"]
"""How a block is run while it is quantized; see `quad_modifiers.passes.runners`."""


@dataclass(frozen=True)
class Member:
    """One linear of a group.

    Attributes:
        name: dotted path below the group's parent.
        produces: spaces of its output channels, in order. A fused linear has several: gate_up is
            `("channels", "channels")`, qkv `("queries", "keys", "values")`.
        role: name in recipes and checkpoints, alike in every block; the last part of `name` by default.
        multiplies: whether the channels that it produces last are a factor of what their reader gets, as those of up in
            act(gate) * up, so that a number for each of them goes through.
    """

    name: str
    produces: tuple[Space, ...]
    role: str = ""
    multiplies: bool = False

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", self.name.rpartition(".")[2])


@dataclass(frozen=True)
class Group:
    """Linears that read the same input.

    Attributes:
        name: short name, for reports.
        parent: dotted path of the module that holds the linears, below the block. A `*` stands for every child, such as
            the experts in "mlp.experts.*": the group is repeated for each.
        members: the linears.
        reads: space of the input: "stream" through a norm, "values" for what attention makes of the value heads,
            "channels" of the MLP.
        norm: dotted path of the norm whose output is read, for groups that read the stream.
        quantized: False for linears that stay as they are but read the stream, such as a router.
    """

    name: str
    parent: str
    members: tuple[Member, ...]
    reads: Space
    norm: str = ""
    quantized: bool = True

    def __post_init__(self) -> None:
        if (self.reads == "stream") != bool(self.norm):
            raise ValueError(
                f"group {self.name!r} reads {self.reads!r} and has norm {self.norm!r}: a group reads the stream "
                "through a norm, and nothing else through one"
            )
        changed = {"stream", "values", "channels"}
        if not self.quantized and (
            self.reads != "stream" or any(changed & set(each.produces) for each in self.members)
        ):
            raise ValueError(
                f"group {self.name!r} is not quantized, so it must read the stream and produce nothing that a "
                "projection changes: quantize it, or say that it produces 'other'"
            )
        if self.reads not in changed:
            raise ValueError(f"group {self.name!r} reads {self.reads!r}; it can read 'stream', 'values' or 'channels'")
        for each in self.members:
            if each.produces != ("stream",) if self.writes_stream else "stream" in each.produces:
                rule = "must write the stream, and nothing else" if self.writes_stream else "cannot write it"
                raise ValueError(
                    f"{each.name!r} of group {self.name!r} produces {each.produces}: what reads the {self.reads} {rule}"
                )

    @property
    def is_repeated(self) -> bool:
        """True if it is repeated for several parts, each of which may see other tokens."""
        return "*" in self.parent

    @property
    def writes_stream(self) -> bool:
        """True if its linears write the residual stream ("D-type"), False if they read it ("U-type")."""
        return self.reads != "stream"


def dense_block(
    *,
    attention: str = "self_attn",
    mlp: str = "mlp",
    attention_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    query: str = "q_proj",
    key: str = "k_proj",
    value: str = "v_proj",
    attention_output: str = "o_proj",
    gate: str = "gate_proj",
    up: str = "up_proj",
    mlp_output: str = "down_proj",
    query_key_value: str = "",
    gate_up: str = "",
) -> tuple[Group, ...]:
    """Returns the groups of a pre-norm block as Llama has it, under any names.

    The block is x + o_proj(attention(norm(x))), then x + down_proj(act(gate(norm(x))) * up(norm(x))), or without a gate
    x + down_proj(act(up(norm(x)))).

    Args:
        attention: sub-module of the block.
        mlp: sub-module of the block.
        attention_norm: RMSNorm before attention.
        mlp_norm: RMSNorm before the MLP.
        query: linear of `attention`, which reads the stream; likewise `key` and `value`.
        key: see `query`.
        value: see `query`.
        attention_output: linear of `attention` that writes the stream.
        gate: linear of `mlp`, which reads the stream; likewise `up`. Empty for an MLP without a gate.
        up: see `gate`.
        mlp_output: linear of `mlp` that writes the stream.
        query_key_value: one linear instead of `query`, `key` and `value`; their rows in this order.
        gate_up: one linear instead of `gate` and `up`; their rows in this order.
    """
    heads: tuple[Member, ...] = Member(query, ("queries",)), Member(key, ("keys",)), Member(value, ("values",))
    if query_key_value:
        heads = (Member(query_key_value, ("queries", "keys", "values")),)
    channels: tuple[Member, ...] = (Member(up, ("channels",), multiplies=bool(gate)),)
    if gate:
        channels = (Member(gate, ("channels",)), *channels)
    if gate_up:
        channels = (Member(gate_up, ("channels", "channels"), multiplies=True),)
    return (
        Group("qkv", attention, heads, "stream", attention_norm),
        Group("o", attention, (Member(attention_output, ("stream",)),), "values"),
        Group("gate_up", mlp, channels, "stream", mlp_norm),
        Group("down", mlp, (Member(mlp_output, ("stream",)),), "channels"),
    )


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a model are.

    Attributes:
        model_type: `config.model_type` of the stock model.
        block: groups of a decoder block, in the order in which they run.
        embedding: dotted path of the embedding, from the causal LM.
        layers: dotted path of the list of decoder blocks.
        final_norm: dotted path of the norm before the head.
        head: dotted path of the head.
        branch_factor: field of the config with the factor by which the blocks multiply what attention and MLP add to
            the stream; empty for none.
        runner: "segmented" for blocks whose groups come in pairs, a reader of the stream and the writer after it (each
            activation is computed once); "hooked" runs any block, twice.
    """

    model_type: str
    block: tuple[Group, ...] = dense_block()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    branch_factor: str = ""
    runner: Runner = "segmented"

    def __post_init__(self) -> None:
        roles = [member.role for _, member in self.quantized_members()]
        repeated = sorted({role for role in roles if roles.count(role) > 1})
        if repeated:
            raise ValueError(
                f"the architecture {self.model_type!r} has several linears of the role {', '.join(repeated)}; a role "
                "is one linear of a block (or of each repeated part): give their members a `role` of their own"
            )

    @property
    def backbone(self) -> str:
        """Dotted path of the module that runs the blocks; the causal LM itself if empty."""
        return self.layers.rpartition(".")[0]

    def quantized_members(self) -> Iterator[tuple[Group, Member]]:
        """Yields the linears that are quantized, each with its group."""
        for group in self.block:
            if group.quantized:
                for member in group.members:
                    yield group, member

    def roles(self) -> dict[str, Group]:
        """Returns the group of each role that is quantized, in run order."""
        return {member.role: group for group, member in self.quantized_members()}


_GATE_UP = dense_block(gate_up="gate_up_proj")
_QKV_GATE_UP = dense_block(query_key_value="qkv_proj", gate_up="gate_up_proj")
_NO_GATE = dense_block(gate="")
_APERTUS = dense_block(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm", gate="")

BUILTIN_ARCHITECTURES = (
    *(Architecture(model_type) for model_type in ("llama", "mistral", "qwen2", "qwen3")),
    Architecture("apertus", _APERTUS),
    Architecture("arcee", _NO_GATE),
    Architecture("cwm"),
    Architecture("ernie4_5"),
    Architecture("glm", _GATE_UP),
    Architecture("granite", branch_factor="residual_multiplier"),
    Architecture("granite_swa", branch_factor="residual_multiplier"),
    Architecture("hunyuan_v1_dense"),
    Architecture("ministral"),
    Architecture("ministral3"),
    Architecture("phi3", _QKV_GATE_UP),
    Architecture("seed_oss"),
    Architecture("smollm3"),
)


def find_architecture(config: Any, known: dict[str, Architecture]) -> Architecture:
    """Returns the architecture of a model config.

    Raises:
        ValueError: if the model type is not supported; says why, which are, and how to add one.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise ValueError(
            f"model type {model_type!r} is not supported: {reason_of_refusal(config)}. Supported are "
            f"{', '.join(sorted(known))} (docs/reference/support.md); a plugin can add one: see "
            "docs/developer/architectures.md"
        )
    return known[model_type]
