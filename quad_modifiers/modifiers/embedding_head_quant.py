"""EmbeddingHeadQuant: 8-bit embedding and head."""

import logging
from typing import Any, ClassVar, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field
from torch import nn

from quad_modifiers.checkpoint.tables import tie_head
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.modifiers.preparation import begin_own_pass, prepare_model
from quad_modifiers.nn.packed_table import BITS, PackedEmbedding, PackedHead, PackedTable
from quad_modifiers.quantization.grid import IntegerGrid, full_range_scales, round_to_grid

logger = logging.getLogger(__name__)

_ROWS = 4096  # quantized at a time: float32 copies stay small beside the model


class EmbeddingHeadQuant(Modifier):
    """Quantizes embedding and head, weight-only: 8 bits, symmetric, one scale per row.

    On small models the two are most of the file. Each row is rounded to nearest: at 8 bits there is nothing to gain
    from calibration. An embedding that shares its tensor with the head goes on sharing it.

    It may stand anywhere after a projection. Before OutlierSplitGPTQ, the calibration of the linears sees what the
    quantized embedding returns.

    Lifecycle:

    - on_initialize
        - check embedding and head
    - on_calibration_start
        - put packed tables in their place

    Attributes:
        targets: "embed_tokens", "lm_head", or both.
        bits: 8.
    """

    recipe_role: ClassVar[str] = "quantize_weights"
    ignore: ClassVar[list[str]] = []  # read by the recipe check, which takes lm_head as ignored otherwise

    targets: list[Literal["embed_tokens", "lm_head"]] = Field(default=["embed_tokens", "lm_head"], min_length=1)
    bits: Literal[8] = 8

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Checks that both are stock modules and wraps the linears, as every QUAD modifier does.

        Raises:
            ValueError: if embedding or head is of another type or the head has a bias.
        """
        architecture = prepare_model(state.model)
        embedding, head = _ends(state.model, architecture)
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
            raise ValueError(
                f"EmbeddingHeadQuant needs a plain Embedding and a plain Linear as head; {architecture.embedding} is a "
                f"{type(embedding).__name__}, {architecture.head} a {type(head).__name__}: start from the original"
            )
        if head.bias is not None and "lm_head" in self.targets:
            raise ValueError(
                f"{architecture.head} has a bias, which a packed head cannot hold; write targets: [embed_tokens]"
            )
        return True

    @torch.no_grad()
    def on_calibration_start(self, state: State, event: object, **kwargs: Any) -> None:
        """Replaces embedding and head.

        Raises:
            ValueError: if the two share one tensor and only one of them is a target.
        """
        begin_own_pass(state.model)
        model = state.model
        architecture = prepare_model(model)
        embedding, head = _ends(model, architecture)
        shared = embedding.weight is head.weight
        if shared and len(set(self.targets)) == 1:
            raise ValueError(
                f"{architecture.embedding} and {architecture.head} share one tensor, so both are quantized or none; "
                "write targets: [embed_tokens, lm_head], or put a projection before, which unties them"
            )
        if "embed_tokens" in self.targets:
            _install(model, architecture.embedding, PackedEmbedding, embedding.weight)
        if "lm_head" in self.targets and not shared:
            _install(model, architecture.head, PackedHead, head.weight)
        if shared:
            tie_head(model, architecture)
        logger.info("EmbeddingHeadQuant: %s in %d bits, one scale per row", " and ".join(self.targets), self.bits)


def _ends(model: nn.Module, architecture: Architecture) -> tuple[nn.Module, nn.Module]:
    return model.get_submodule(architecture.embedding), model.get_submodule(architecture.head)


def _install(model: nn.Module, path: str, kind: type[PackedTable], weight: torch.Tensor) -> None:
    rows, columns = weight.shape
    table = kind(rows, columns, weight.dtype).to(weight.device)
    grid = IntegerGrid(BITS)
    for start in range(0, len(weight), _ROWS):
        values = weight[start : start + _ROWS].float()
        scales = full_range_scales(values, grid, weight.dtype)
        table.fill(start, round_to_grid(values, scales, grid).to(torch.int8), scales.scale)
    model.set_submodule(path, table)
