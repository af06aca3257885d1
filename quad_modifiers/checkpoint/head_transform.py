"""The section `head_transform`: head and embedding of a projected model share one table."""

from typing import Any

import torch

from quad_modifiers.checkpoint.contribute import CheckpointSection
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.packed_table import dense_table
from quad_modifiers.nn.plain_linear import plain_linear
from quad_modifiers.nn.transformed_norm import add_head_transform, remove_head_transform

NAME = "head_transform"


class HeadTransform(CheckpointSection):
    """Has no fields; its tensor is `<final norm>.head_transform`, `[hidden_size, hidden_size]`."""

    @classmethod
    def install(cls, decoder: Decoder, section: dict[str, Any]) -> None:
        """Makes room for the matrix behind the final norm.

        Raises:
            ValueError: for a field, or if the config says that the head has a tensor of its own.
        """
        if section:
            raise ValueError(f"the section {NAME!r} has no fields, not {', '.join(section)}; the checkpoint is damaged")
        if not decoder.model.config.tie_word_embeddings:
            raise ValueError(
                f"the checkpoint has the section {NAME!r} and a head with a tensor of its own; config.json is damaged"
            )
        weight = decoder.final_norm.weight
        add_head_transform(decoder.final_norm, weight.new_empty(len(weight), len(weight)))

    @classmethod
    def fold(cls, decoder: Decoder, dtype: torch.dtype) -> None:
        """Gives the head a table of its own, in floating point, and makes the norm a stock one."""
        matrix = remove_head_transform(decoder.final_norm)
        table = dense_table(decoder.head) @ matrix.double()
        decoder.replace_head(plain_linear(table, decoder.head.bias, dtype))
        decoder.model.config.tie_word_embeddings = False
