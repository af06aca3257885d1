"""Sizes of a model, read from its config."""

from dataclasses import dataclass
from typing import Any

from quad_modifiers.model.architecture import Space


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes that the projection needs.

    Attributes:
        hidden: width of the residual stream.
        intermediate: channels of the MLP.
        layers: number of decoder blocks.
        heads: number of query heads.
        kv_heads: number of key-value heads.
        head_dim: coordinates of a head.
        eps: epsilon of the RMSNorms.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @classmethod
    def of(cls, model: Any) -> "ModelGeometry":
        """Reads the sizes of a transformers causal LM."""
        config = model.config
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            eps=config.rms_norm_eps,
        )

    def sizes(self) -> dict[Space, int]:
        """Returns the number of coordinates of each space."""
        heads, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "stream": self.hidden,
            "queries": heads,
            "keys": values,
            "values": values,
            "channels": self.intermediate,
        }
