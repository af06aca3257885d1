"""Lines of bytes: how a key or value is rounded and laid out, and read back.

A line is the integers in 4 bits, two a byte, then those in 8 bits, then scale and zero of the first and of the second.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from quad_kernels import KVEntries, apply_hadamard, dequantize_kv, quantize_kv
from quad_kernels.hadamard import HadamardPlan, plan_hadamard

HIGH_BITS: Literal[8] = 8


class Basis(NamedTuple):
    """The coordinates that states are rounded in.

    Attributes:
        matrix: by which row vectors are multiplied before they are rounded, `[heads, head_dim, head_dim]`.
        inverse: by which they are multiplied when they are read, likewise; None for an orthogonal matrix.
    """

    matrix: torch.Tensor
    inverse: torch.Tensor | None = None

    def back(self) -> torch.Tensor:
        """Returns the inverse."""
        return self.matrix.mT if self.inverse is None else self.inverse


@dataclass(frozen=True)
class KVCacheFormat:
    """How keys and values are rounded.

    Attributes:
        clip_ratio: share of the span of a vector that its grid of 16 points covers, in (0, 1].
        hadamard: whether a vector all in 4 bits is transformed before it is rounded, and back when it is read.
        sink_tokens: first tokens of a sequence whose keys and values stay as they are; 0 where attention slides.
        key_rank: first coordinates of a key, in its basis, that have 8 bits; with a grid of their own, unclipped.
        value_rank: the same of a value.
    """

    clip_ratio: float = 1.0
    hadamard: bool = True
    sink_tokens: int = 0
    key_rank: int = 0
    value_rank: int = 0


def check_high_rank(rank: int, head_dim: int) -> None:
    """Checks a number of coordinates in 8 bits.

    Raises:
        ValueError: if it is none or all, or is odd, or leaves an odd number.
    """
    if not 0 < rank < head_dim or rank % 2 or head_dim % 2:
        raise ValueError(
            f"high_rank comes to {rank} of the {head_dim} coordinates of a head; those in 8 bits and the rest must "
            f"both be even numbers, and not 0; choose about {max(2, head_dim // 16 * 2)}"
        )


@torch.compiler.assume_constant_result
def _plan(size: int) -> HadamardPlan:
    return plan_hadamard(size)


def pack_states(states: torch.Tensor, form: KVCacheFormat, rank: int = 0, basis: Basis | None = None) -> torch.Tensor:
    """Returns keys or values `[..., head_dim]` as lines of bytes, uint8.

    Scale and zero have the dtype of the states, float16, bfloat16 or float32: a line has
    `(head_dim + rank) / 2 + 2 * itemsize` bytes, and with a rank `2 * itemsize` more.

    Args:
        states: `[batch, heads, positions, head_dim]`; without a basis any leading dimensions.
        form: how they are rounded.
        rank: how many of the first coordinates have 8 bits; with any, `form.hadamard` is of no account.
        basis: of each head; None for the coordinates given, behind the Hadamard transform if the form has it.
    """
    dtype = states.dtype
    if basis is not None:
        states = states.float() @ basis.matrix.float()
    elif form.hadamard and not rank:
        states = apply_hadamard(states, _plan(states.shape[-1]))
    entries = [quantize_kv(states[..., rank:], clip_ratio=form.clip_ratio, scale_dtype=dtype)]
    if rank:
        entries.append(quantize_kv(states[..., :rank], scale_dtype=dtype, bits=HIGH_BITS))
    ends = torch.stack([end for entry in entries for end in (entry.scale, entry.zero)], dim=-1)
    return torch.cat([*(entry.integers for entry in entries), ends.view(torch.uint8)], dim=-1)


def unpack_states(
    lines: torch.Tensor,
    form: KVCacheFormat,
    dtype: torch.dtype,
    rank: int = 0,
    basis: Basis | None = None,
) -> torch.Tensor:
    """Returns the rounded states of lines, in the dtype that the states had; the other arguments are as they were."""
    size = lines.shape[-1] - (4 if rank else 2) * dtype.itemsize
    ends = lines[..., size:].clone(memory_format=torch.contiguous_format).view(dtype).unbind(-1)
    wide = dtype if basis is None else torch.float32
    low = KVEntries(lines[..., : size - rank].contiguous(), ends[0].contiguous(), ends[1].contiguous())
    states = dequantize_kv(low, wide)
    if rank:
        high = KVEntries(lines[..., size - rank : size].contiguous(), ends[2].contiguous(), ends[3].contiguous())
        states = torch.cat([dequantize_kv(high, wide, bits=HIGH_BITS), states], dim=-1)
    if basis is not None:
        return (states @ basis.back().float()).to(dtype)
    return apply_hadamard(states, _plan(states.shape[-1]), transpose=True) if form.hadamard and not rank else states
