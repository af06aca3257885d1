"""Two signed 4-bit integers per byte, in the order in which the kernels read them.

Coordinates come in chunks of 128: byte j of chunk c holds coordinate 128 c + j in its low four bits and coordinate
128 c + 64 + j in its high four, both in two's complement. Unpacking is then two contiguous halves instead of an
interleaving, and `byte & 0xF0` and `byte << 4` are 16 times the two values without a sign extension.
"""

import torch

CHUNK = 128
HALF = CHUNK // 2


def nibble_bytes(columns: int) -> int:
    """Bytes per row of `columns` integers."""
    return -(-columns // CHUNK) * HALF


def pack_nibbles(integers: torch.Tensor) -> torch.Tensor:
    """Packs signed 4-bit integers.

    Args:
        integers: `[..., columns]`, int8, from -8 to 7 (not checked: this runs in the forward pass).

    Returns:
        `[..., nibble_bytes(columns)]`, uint8; the last chunk is filled with zeros.
    """
    columns = integers.shape[-1]
    padded = torch.nn.functional.pad(integers, (0, -columns % CHUNK)).view(torch.uint8).unflatten(-1, (-1, 2, HALF))
    return ((padded[..., 0, :] & 0x0F) | (padded[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Inverse of `pack_nibbles`: `[..., columns]`, int8, from uint8 `[..., nibble_bytes(columns)]`."""
    chunks = packed.view(torch.int8).unflatten(-1, (-1, HALF))
    return torch.cat([(chunks << 4) >> 4, chunks >> 4], dim=-1).flatten(-2)[..., :columns].contiguous()


def unpack_integers(integers: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns `[..., columns]`, int8, from int8 (as it is) or from nibbles, uint8: the two forms of activations."""
    return unpack_nibbles(integers, columns) if integers.dtype == torch.uint8 else integers
