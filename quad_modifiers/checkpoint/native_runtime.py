"""How the model of a checkpoint computes on the CPU: loaded, and in memory before it is saved, with the same bits."""

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.native_block import install_native_blocks
from quad_modifiers.nn.native_decode import install_native_decode


def use_native_blocks(decoder: Decoder) -> None:
    """Gives the blocks classes that run on the native CPU kernels, where those run; a second call changes nothing."""
    install_native_blocks([block.module for block in decoder.blocks], decoder.head, decoder.final_norm)
    install_native_decode(decoder.model.base_model)
