"""Turns a QUAD model into a plain one of the same function, with unquantized inputs, in place.

Every container is linear in its input once that is not quantized: the split picks coordinates, the online Hadamard is
an orthogonal matrix. So each becomes one `nn.Linear`, and what is left is the stock architecture, in its stock class.
Where stock code insists that the heads divide the hidden size, which an extended basis need not respect, the stream is
widened by coordinates that are always zero.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quad_modifiers.checkpoint.format import QuadFormat
from quad_modifiers.checkpoint.installed_sections import fold_sections
from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.native_block import remove_native_blocks
from quad_modifiers.nn.native_decode import remove_native_decode
from quad_modifiers.nn.packed_table import dense_table
from quad_modifiers.nn.plain_linear import plain_linear
from quad_modifiers.nn.quad_linear import QuadLinear


@torch.no_grad()
def dequantize_model(
    model: nn.Module, architecture: Architecture, dtype: torch.dtype | None = None, quad: QuadFormat | None = None
) -> nn.Module:
    """Makes `model` a plain model of the stock class; changes it in place and returns it.

    Args:
        model: with `QuadLinear` linears, loaded or in memory.
        architecture: names of its parts.
        dtype: of the weights; the model's own by default.
        quad: the `quad` section of its checkpoint, whose sections are folded into the weights; None for none.

    Raises:
        ValueError: if weights are offloaded, or the stock config class refuses every hidden size.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded; dequantizing needs all weights in memory: load without offloading")
    remove_native_decode(model)
    remove_native_blocks(model)
    dtype, decoder = dtype or model.dtype, Decoder(model, architecture)
    if quad is not None:
        fold_sections(decoder, quad, torch.float64)  # rounded once, with all other weights
    config = _stock_config(model.config, architecture)
    width, stock_width = model.config.hidden_size, config.hidden_size
    # A stock RMSNorm divides by the new width; the factor goes into readers and writers, as in the projection.
    gain = (stock_width / width) ** 0.5
    fill = stock_width - width
    for block in decoder.blocks:
        for linear in (each for group in block.groups for each in group.linears):
            module = linear.module
            weight = dense_weight(module) if linear.group.quantized else module.weight.double()
            bias = module.bias
            if linear.group.writes_stream:
                weight = gain * nn.functional.pad(weight, (0, 0, 0, fill))
                bias = None if bias is None else gain * nn.functional.pad(bias.double(), (0, fill))
            else:
                weight = nn.functional.pad(weight, (0, fill)) / gain
            linear.replace(plain_linear(weight, bias, dtype))
        for norm in block.norms():
            _widen_norm(norm, fill)
    _widen_norm(decoder.final_norm, fill)
    _replace_ends(decoder, gain, fill, dtype)
    _become_stock(model, config)
    return model.to(dtype)


def dense_weight(container: QuadLinear) -> torch.Tensor:
    """Returns the matrix that the container applies to an unquantized input, `[out, in]`, float64."""
    split = container.split
    packed = container.packed()
    residual = container.residual.weight.double() if packed is None else packed.dequantized(torch.float64)
    weight = unsplit_residual(residual, split)
    outlier = container.dense_outlier(torch.float64)
    if outlier is not None:
        weight[:, split.outlier_index(weight.device)] = outlier
    for term in container.terms():
        weight = weight + term.dense().to(weight)
    return weight


def _widen_norm(norm: Any, fill: int) -> None:
    norm.weight = nn.Parameter(nn.functional.pad(norm.weight, (0, fill), value=1.0))


def _replace_ends(decoder: Decoder, gain: float, fill: int, dtype: torch.dtype) -> None:
    """Embedding and head in floating point; a tied pair stays tied."""
    model, old_embedding, old_head = decoder.model, decoder.embedding, decoder.head
    table = gain * nn.functional.pad(dense_table(old_embedding), (0, fill))
    embedding = nn.Embedding(*table.shape, padding_idx=model.config.pad_token_id, device="meta")
    embedding.weight = nn.Parameter(table.to(dtype).contiguous())
    weight = nn.functional.pad(dense_table(old_head), (0, fill)) / gain
    head = plain_linear(weight, getattr(old_head, "bias", None), dtype)
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    decoder.replace_embedding(embedding)
    decoder.replace_head(head)


def _stock_config(config: Any, architecture: Architecture) -> Any:
    """Returns the stock config with the smallest hidden size that it accepts, not below the model's."""
    content = config.to_dict()
    for key in ("model_type", "quantization_config"):
        content.pop(key, None)
    heads = config.num_attention_heads
    width = config.hidden_size
    refused: Exception | None = None
    for size in dict.fromkeys((width, -(-width // heads) * heads)):
        try:
            return CONFIG_MAPPING[architecture.model_type].from_dict({**content, "hidden_size": size})
        except Exception as error:  # config classes refuse with exceptions of their own
            refused = error
    raise ValueError(
        f"the stock {architecture.model_type} config takes neither hidden_size {width} nor a multiple of the "
        f"{heads} heads: {refused}"
    ) from refused


def _become_stock(model: Any, config: Any) -> None:
    """Gives the model the stock class and all its modules the stock config."""
    stock_class = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [stock_class.__name__]
    config._name_or_path = model.config._name_or_path
    config._attn_implementation_internal = model.config._attn_implementation_internal
    config.dtype = model.config.dtype
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    model.__class__ = stock_class
    model.__dict__.pop("_tied_weights_keys", None)  # set while the table was packed
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
