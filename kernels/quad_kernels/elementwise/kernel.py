"""Triton kernels of the operations; each rounds where the reference does."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from quad_kernels.whole_numbers import ceil_div, next_power_of_2

_BLOCK = 1024  # channels per program


@triton.jit
def _rotate_heads(
    states: tl.tensor,
    norm: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    token: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
) -> None:
    """All heads of a token, each as two halves."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.arange(0, HEADS_PADDED)[:, None]
    column = tl.arange(0, HALF_PADDED)[None, :]
    inside = (head < HEADS) & (column < HALF)
    first_place = states + token * (HEADS * HEAD_DIM) + head * HEAD_DIM + column
    first = tl.load(first_place, mask=inside, other=0.0)
    second = tl.load(first_place + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    if norm is not None:
        wide, wide_2 = first.to(tl.float32), second.to(tl.float32)
        total = tl.sum(wide * wide + wide_2 * wide_2, 1, keep_dims=True)
        inverse = tl.rsqrt(tl.div_rn(total, HEAD_DIM * 1.0) + eps)
        weight = tl.load(norm + column, mask=column < HALF, other=0.0).to(tl.float32)
        weight_2 = tl.load(norm + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
        first = ((wide * inverse).to(dtype).to(tl.float32) * weight).to(dtype)
        second = ((wide_2 * inverse).to(dtype).to(tl.float32) * weight_2).to(dtype)
    angle = token * HEAD_DIM + column
    cos = tl.load(cosine + angle, mask=column < HALF, other=0.0).to(tl.float32)
    cos_2 = tl.load(cosine + HALF + angle, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sine + angle, mask=column < HALF, other=0.0).to(tl.float32)
    sin_2 = tl.load(sine + HALF + angle, mask=column < HALF, other=0.0).to(tl.float32)
    wide, wide_2 = first.to(tl.float32), second.to(tl.float32)
    turned = (wide * cos).to(dtype).to(tl.float32) - (wide_2 * sin).to(dtype).to(tl.float32)
    turned_2 = (wide_2 * cos_2).to(dtype).to(tl.float32) + (wide * sin_2).to(dtype).to(tl.float32)
    tl.store(first_place, turned.to(dtype), mask=inside)
    tl.store(first_place + HALF, turned_2.to(dtype), mask=inside)


@triton.jit
def rotate_kernel(
    query: tl.tensor,
    key: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
) -> None:
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    _rotate_heads(query, query_norm, cosine, sine, token, eps, HEADS, HEADS_PADDED, HEAD_DIM, HALF_PADDED)
    _rotate_heads(key, key_norm, cosine, sine, token, eps, KV_HEADS, KV_HEADS_PADDED, HEAD_DIM, HALF_PADDED)


@triton.jit
def gated_kernel(gate: tl.tensor, up: tl.tensor, y: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """BLOCK neighbouring numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    shrunk = tl.exp(-tl.abs(wide))  # never overflows
    active = tl.div_rn(tl.where(wide < 0.0, wide * shrunk, wide), 1.0 + shrunk).to(x.dtype).to(tl.float32)
    product = active * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, product.to(x.dtype), mask=inside)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    head_norms: Sequence[torch.Tensor],
    eps: float,
) -> None:
    """See `quad_kernels.elementwise.reference.rotate`."""
    tokens, head_dim = cosine.shape
    if not tokens:
        return
    heads, kv_heads = query.shape[1] // head_dim, key.shape[1] // head_dim
    query_norm, key_norm = head_norms or (None, None)
    rotate_kernel[(tokens,)](
        query,
        key,
        query_norm,
        key_norm,
        cosine.contiguous(),
        sine.contiguous(),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEADS_PADDED=next_power_of_2(heads),
        KV_HEADS_PADDED=next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        HALF_PADDED=next_power_of_2(head_dim // 2),
        enable_fp_fusion=False,
    )


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `quad_kernels.elementwise.reference.gated`; both contiguous."""
    y = torch.empty_like(gate)
    if y.numel():
        gated_kernel[(ceil_div(y.numel(), _BLOCK),)](gate, up, y, y.numel(), BLOCK=_BLOCK, enable_fp_fusion=False)
    return y
