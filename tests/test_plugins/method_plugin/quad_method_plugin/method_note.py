"""The section: a note that is stored with the model."""

from typing import Any

import torch

from quad_modifiers.checkpoint.contribute import CheckpointSection
from quad_modifiers.model.decoder import Decoder


class MethodNote(CheckpointSection):
    """A buffer `method_note` of the model, the UTF-8 bytes of a text."""

    @classmethod
    def install(cls, decoder: Decoder, section: dict[str, Any]) -> None:
        length = section.get("length")
        if not isinstance(length, int) or length < 0:
            raise ValueError(f"method_note has the length {length!r}, not a number of bytes; the checkpoint is damaged")
        decoder.model.register_buffer("method_note", torch.empty(length, dtype=torch.uint8))
