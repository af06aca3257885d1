"""Plain PyTorch packing."""

import torch

PACKABLE_BITS = (2, 4, 8)  # widths that divide a word: every released compressed-tensors packs these alike


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits ({bits}) must be one of {PACKABLE_BITS}")
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)


def pack_int32(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns words that hold 32 / bits integers each, the first in the lowest bits.

    Integers are stored with an offset of 2^(bits - 1); the last word of a row is filled up with zero bits.

    Args:
        integers: `[rows, columns]`, int8, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: 2, 4 or 8.

    Returns:
        `[rows, ceil(columns * bits / 32)]`, int32.

    Raises:
        ValueError: if `bits` is not supported or a value is out of range.
    """
    shifts = _shifts(bits, integers.device)
    half = 2 ** (bits - 1)
    if integers.numel() and not (-half <= int(integers.min()) and int(integers.max()) < half):
        raise ValueError(f"integers from {int(integers.min())} to {int(integers.max())} do not fit in {bits} bits")
    unsigned = integers.to(torch.int32) + half
    fill = -unsigned.shape[1] % len(shifts)
    unsigned = torch.nn.functional.pad(unsigned, (0, fill))
    # The fields do not overlap, so their sum is their union; it wraps into the sign bit as intended.
    return (unsigned.unflatten(1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.int32)


def unpack_int32(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Reverses `pack_int32`: `[rows, words]` int32 to `[rows, columns]` int8.

    Raises:
        ValueError: if `bits` is not supported or the words do not hold exactly `columns` integers per row.
    """
    shifts = _shifts(bits, words.device)
    if words.shape[1] != -(-columns // len(shifts)):
        raise ValueError(f"{words.shape[1]} words of {len(shifts)} integers do not make a row of {columns}")
    fields = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (fields.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)
