"""How the model of a checkpoint computes on the CPU: loaded, and in memory before it is saved, with the same bits."""

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.native_block import install_native_blocks
from quad_modifiers.nn.native_decode import install_native_decode


def use_native_blocks(decoder: Decoder) -> None:
    """Lets blocks, head and last norm, and a token through all blocks, run on the native kernels, where those run.

    A second call changes nothing.
    """
    install_native_blocks([block.module for block in decoder.blocks], decoder.head, decoder.final_norm)
    install_native_decode(decoder.model.base_model)
