"""Packing of small integers: the checkpoint's int32 words, and the bytes that the kernels read."""

from quad_kernels.packing.nibbles import nibble_bytes, pack_nibbles, unpack_integers, unpack_nibbles
from quad_kernels.packing.reference import PACKABLE_BITS, pack_int32, unpack_int32

__all__ = [
    "PACKABLE_BITS",
    "nibble_bytes",
    "pack_int32",
    "pack_nibbles",
    "unpack_int32",
    "unpack_integers",
    "unpack_nibbles",
]
