"""EmbeddingHeadQuant: 8-bit embedding and head."""

import logging
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from quad_modifiers.checkpoint.tables import tie_head
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier, recipe_modifiers
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead, PackedTable
from quad_modifiers.quantization.table_rows import quantize_rows
from quad_modifiers.recipe.order import unties_head

logger = logging.getLogger(__name__)


class EmbeddingHeadQuant(QuadModifier):
    """Quantizes embedding and head, weight-only: 8 bits, symmetric, one scale per row.

    On small models the two are most of the file. Each row is rounded to nearest: at 8 bits there is nothing to gain
    from calibration. An embedding that shares its tensor with the head goes on sharing it.

    It may stand anywhere after a projection. Before OutlierSplitGPTQ, the calibration of the linears sees what the
    quantized embedding returns.

    Lifecycle:

    - check
        - embedding and head
    - run
        - put packed tables in their place

    Attributes:
        targets: "embed_tokens", "lm_head", or both.
        bits: 8.
    """

    recipe_role: ClassVar[str | None] = "quantize_weights"
    ignored_by_default: ClassVar[tuple[str, ...]] = ()

    targets: list[Literal["embed_tokens", "lm_head"]] = Field(default=["embed_tokens", "lm_head"], min_length=1)
    bits: Literal[8] = 8

    def check(self, decoder: Decoder) -> None:
        """Checks that both are stock modules.

        Raises:
            ValueError: if embedding or head is of another type or the head has a bias.
        """
        embedding, head, names = decoder.embedding, decoder.head, decoder.architecture
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
            raise ValueError(
                f"EmbeddingHeadQuant needs a plain Embedding and a plain Linear as head; {names.embedding} is a "
                f"{type(embedding).__name__}, {names.head} a {type(head).__name__}: start from the original"
            )
        if decoder.is_tied and not any(unties_head(each) for each in recipe_modifiers()):
            self._check_shared(names)
        if head.bias is not None and "lm_head" in self.targets:
            raise ValueError(f"{names.head} has a bias, which a packed head cannot hold; write targets: [embed_tokens]")

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Replaces embedding and head.

        Raises:
            ValueError: if the two share one tensor and only one of them is a target.
        """
        embedding, head, names = decoder.embedding, decoder.head, decoder.architecture
        shared = decoder.is_tied
        if shared:
            self._check_shared(names)
        if "embed_tokens" in self.targets:
            decoder.replace_embedding(_quantized(PackedEmbedding, embedding.weight))
        if "lm_head" in self.targets and not shared:
            decoder.replace_head(_quantized(PackedHead, head.weight))
        if shared:
            tie_head(decoder)
        logger.info("EmbeddingHeadQuant: %s in %d bits, one scale per row", " and ".join(self.targets), self.bits)

    def _check_shared(self, names: Architecture) -> None:
        if len(set(self.targets)) == 1:
            raise ValueError(
                f"{names.embedding} and {names.head} share one tensor, so both are quantized or none; "
                "write targets: [embed_tokens, lm_head], or put a projection before, with keep_tied: false"
            )


def _quantized(kind: type[PackedTable], weight: torch.Tensor) -> PackedTable:
    rows, columns = weight.shape
    table = kind(rows, columns, weight.dtype).to(weight.device)
    quantize_rows(table, weight)
    return table
