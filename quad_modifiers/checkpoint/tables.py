"""Packed embedding and head in a transformers model."""

import torch

from quad_modifiers.checkpoint.format import QuadFormat
from quad_modifiers.checkpoint.tensors import packed_tables
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead, PackedTable, TiedHead


def install_tables(decoder: Decoder, quad: QuadFormat) -> None:
    """Puts unset packed tables in place of a stock embedding and head, as the format says."""
    embedding, head = packed_tables(decoder, quad)
    if embedding:
        decoder.replace_embedding(_unset(PackedEmbedding, decoder.embedding.weight))
    if head:
        decoder.replace_head(_unset(PackedHead, decoder.head.weight))
    if quad.head is not None and decoder.model.config.tie_word_embeddings:
        tie_head(decoder)


def tie_head(decoder: Decoder) -> None:
    """Makes the head read the embedding's packed table."""
    decoder.replace_head(TiedHead(decoder.embedding))
    # transformers ties parameters by name; here there is no tensor left to tie.
    decoder.model._tied_weights_keys = {}
    decoder.model.all_tied_weights_keys = {}


def _unset(kind: type[PackedTable], weight: torch.Tensor) -> PackedTable:
    rows, columns = weight.shape
    with torch.device(weight.device):
        return kind(rows, columns, weight.dtype)
