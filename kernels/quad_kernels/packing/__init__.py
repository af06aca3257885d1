"""Packing of small integers into int32 words, in the layout of compressed-tensors' pack-quantized format."""

from quad_kernels.packing.reference import PACKABLE_BITS, pack_int32, unpack_int32

__all__ = ["PACKABLE_BITS", "pack_int32", "unpack_int32"]
