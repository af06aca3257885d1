"""Packed embedding and head in a transformers model."""

from typing import Any

import torch
from torch import nn

from quad_modifiers.checkpoint.format import QuadFormat
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead, PackedTable, TiedHead


def is_packed(model: nn.Module, path: str) -> bool:
    """True if the embedding or head at `path` is quantized."""
    return isinstance(model.get_submodule(path), (PackedTable, TiedHead))


def install_tables(model: nn.Module, architecture: Architecture, quad: QuadFormat) -> None:
    """Puts unset packed tables in place of a stock embedding and head, as the format says.

    Raises:
        ValueError: if head and embedding share one tensor and only one of them is quantized.
    """
    tied = bool(model.config.tie_word_embeddings)
    if tied and (quad.embedding is None) != (quad.head is None):
        raise ValueError(
            "the checkpoint says that head and embedding share one tensor, but only one of them is quantized; its "
            "config.json is damaged"
        )
    if quad.embedding is not None:
        _install(model, architecture.embedding, PackedEmbedding)
    if quad.head is not None and not tied:
        _install(model, architecture.head, PackedHead)
    if quad.head is not None and tied:
        tie_head(model, architecture)


def tie_head(model: Any, architecture: Architecture) -> None:
    """Makes the head read the embedding's packed table."""
    model.set_submodule(architecture.head, TiedHead(model.get_submodule(architecture.embedding)))
    # transformers ties parameters by name; here there is no tensor left to tie.
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}


def _install(model: nn.Module, path: str, kind: type[PackedTable]) -> None:
    weight = model.get_submodule(path).weight
    rows, columns = weight.shape
    with torch.device(weight.device):
        model.set_submodule(path, kind(rows, columns, weight.dtype))
