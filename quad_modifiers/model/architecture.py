"""Model architectures as data: where the norms and linears of a decoder block are.

A supported architecture is a pre-norm decoder: x + o_proj(attention(norm(x))), then x + down_proj(act(gate(norm(x))) *
up(norm(x))), with RMSNorm. docs/developer/architectures.md says how to add one.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of a model.

    Attributes:
        model_type: `config.model_type` of the stock model.
        embedding, layers, final_norm, head: dotted paths from the causal LM.
        attention, mlp: sub-modules of a layer.
        attention_norm, mlp_norm: the RMSNorm before each.
        query, key, value, gate, up: U-type linears, which read the residual stream.
        attention_output, mlp_output: D-type linears, which write it.
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    attention_output: str = "o_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    mlp_output: str = "down_proj"

    @property
    def attention_inputs(self) -> tuple[str, str, str]:
        """The linears that read the attention norm."""
        return self.query, self.key, self.value

    @property
    def mlp_inputs(self) -> tuple[str, str]:
        """The linears that read the MLP norm."""
        return self.gate, self.up

    @property
    def d_type(self) -> tuple[str, str]:
        """The linears that write the residual stream."""
        return self.attention_output, self.mlp_output

    def linear_paths(self) -> tuple[str, ...]:
        """Paths of all linears inside a layer."""
        inside = [f"{self.attention}.{n}" for n in (*self.attention_inputs, self.attention_output)]
        return (*inside, *(f"{self.mlp}.{n}" for n in (*self.mlp_inputs, self.mlp_output)))


BUILTIN_ARCHITECTURES = tuple(Architecture(model_type) for model_type in ("llama", "mistral", "qwen2", "qwen3"))


def find_architecture(config: Any, known: dict[str, Architecture]) -> Architecture:
    """Returns the architecture of a model config.

    Raises:
        ValueError: if the model type is not supported; names those that are and how to add one.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise ValueError(
            f"model type {model_type!r} is not supported; supported are {', '.join(sorted(known))}. A plugin can add "
            "one: see docs/developer/architectures.md"
        )
    return known[model_type]


def check_structure(model: nn.Module, architecture: Architecture) -> None:
    """Checks that every named part exists and that the linears are plain `nn.Linear` modules.

    Raises:
        ValueError: naming the first part that is missing or of another type.
    """
    for path in (architecture.embedding, architecture.layers, architecture.final_norm, architecture.head):
        _require(model, path)
    for index, layer in enumerate(model.get_submodule(architecture.layers).children()):
        for path in (architecture.attention_norm, architecture.mlp_norm):
            _require(layer, path, index)
        for path in architecture.linear_paths():
            module = _require(layer, path, index)
            if not hasattr(module, "residual") and type(module) is not nn.Linear:
                raise ValueError(
                    f"layer {index} {path} is a {type(module).__name__}, not a plain Linear: the model is already "
                    "quantized or adapted; start from the full-precision model"
                )


def _require(root: nn.Module, path: str, layer: int | None = None) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        where = "" if layer is None else f"layer {layer} of "
        raise ValueError(f"{where}the model has no part named {path!r}, which its architecture needs") from error
