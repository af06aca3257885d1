"""vLLM's methods for a packed embedding and head (format version 2)."""

from typing import Any

import torch
from quad_kernels import IntegerGrid
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from quad_modifiers.nn.packed_shapes import packed_shapes
from quad_modifiers.nn.packed_table import BITS, PackedEmbedding, PackedHead


class QuadTableMethod(QuantizeMethodBase):
    """Loads and applies an 8-bit table; vLLM divides its rows among the ranks and pads them.

    `kind` is the module of the transformers runtime that does the arithmetic.
    """

    def __init__(self, kind: type[PackedEmbedding | PackedHead]) -> None:
        self.kind = kind

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Creates the rank's rows of the checkpoint's tensors."""
        specs = packed_shapes(sum(output_partition_sizes), input_size, IntegerGrid(BITS), params_dtype)
        for name in ("weight_packed", "weight_scale"):
            tensor = torch.zeros(specs[name].shape, dtype=specs[name].dtype)
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter.output_dim, parameter.weight_loader = 0, extra["weight_loader"]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Gives the tensors to the module that computes with them."""
        with torch.device("meta"):
            table = self.kind(len(layer.weight_packed), layer.embedding_dim, layer.weight_scale.dtype)
        table.weight_packed, table.weight_scale = layer.weight_packed.data, layer.weight_scale.data
        del table.weight_shape
        layer.table = table
        layer.weight = layer.weight_packed  # where vLLM's LoRA wrapper looks for the device

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Makes a head share the embedding's tensors."""
        layer.weight_packed, layer.weight_scale = embed_tokens.weight_packed, embed_tokens.weight_scale
        return layer

    def embedding(self, layer: nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Looks up `[...]` ids: `[..., hidden_size]`."""
        return layer.table(input_)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The head's logits, `[..., rows]` for `[..., hidden_size]`."""
        y = layer.table(x)
        return y if bias is None else y + bias
