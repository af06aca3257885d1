"""The modifier that stores a note with the model."""

import torch

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier


class NoteMethod(QuadModifier):
    """Keeps a text in the checkpoint."""

    text: str

    def run(self, decoder: Decoder, batches: Batches) -> None:
        note = torch.tensor(list(self.text.encode()), dtype=torch.uint8)
        decoder.model.register_buffer("method_note", note)
        self.contribute(decoder, sections={"method_note": {"length": len(note)}})
