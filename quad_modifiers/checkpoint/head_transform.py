"""The section `head_transform`: head and embedding of a projected model share one table."""

from typing import Any

from torch import nn

from quad_modifiers.checkpoint.contribute import CheckpointSection
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.packed_table import dense_table
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
    def fold(cls, decoder: Decoder) -> None:
        """Gives the head a table of its own, in floating point, and makes the norm a stock one."""
        matrix, old = remove_head_transform(decoder.final_norm), decoder.head
        table = dense_table(old) @ matrix.double()
        head = nn.Linear(table.shape[1], table.shape[0], bias=old.bias is not None, device="meta")
        head.weight = nn.Parameter(table, requires_grad=False)
        if old.bias is not None:
            head.bias = old.bias
        decoder.replace_head(head)
        decoder.model.config.tie_word_embeddings = False
