"""Triton kernel of the product with an 8-bit table for few tokens: the rows are read once, as they are stored."""

# Tuples grow in the unrolled loops of the kernel: no static type follows them, and Triton knows no (*a, b).
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl

from quad_kernels.whole_numbers import ceil_div, next_power_of_2

MOST_TOKENS = 8  # beyond, widening some rows at a time and a product of PyTorch is no slower
_BLOCK_N = 8  # rows per program
_WORDS, _LEAST_WORDS = 512, 128  # of a row per step, of one token and at least: sums of each token take registers


@triton.jit
def table_kernel(
    x: tl.tensor,  # [tokens, columns]
    words: tl.tensor,  # [rows, row_words] int32, four bytes each, with an offset of 128
    scale: tl.tensor,  # [rows]
    y: tl.tensor,  # [tokens, rows]
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_words: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """BLOCK_N rows for all tokens; sums are float32, rounded to the dtype of x before the scale multiplies them."""
    first = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(first, rows - 1)
    row = words + n.to(tl.int64)[:, None] * row_words
    sums = ()
    for _ in tl.static_range(TOKENS):
        zeros = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
        sums = sums + (zeros,)
    for start in range(0, row_words, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)[None, :]
        packed = tl.load(row + word, mask=word < row_words, other=0)
        for byte in tl.static_range(4):
            weight = (((packed >> (8 * byte)) & 0xFF) - 128).to(tl.float32)
            column = 4 * word + byte
            added = ()
            for token in tl.static_range(TOKENS):
                place = x + tl.minimum(token, tokens - 1).to(tl.int64) * columns + column
                value = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
                added = added + (sums[token] + weight * value,)
            sums = added
    factor = tl.load(scale + n).to(tl.float32)
    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], 1).to(y.dtype.element_ty).to(tl.float32) * factor
        inside = (first < rows) & (token < tokens)
        tl.store(y + token * rows.to(tl.int64) + first, total.to(y.dtype.element_ty), mask=inside)


def table_product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See `quad_kernels.table_product`; `x` is `[tokens, columns]` of up to `MOST_TOKENS` tokens."""
    (tokens, columns), (rows, row_words) = x.shape, words.shape
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    padded = next_power_of_2(max(1, tokens))
    if tokens:
        table_kernel[(ceil_div(rows, _BLOCK_N),)](
            x.contiguous(),
            words.contiguous(),
            scale.contiguous(),
            y,
            tokens,
            rows,
            columns,
            row_words,
            TOKENS=padded,
            BLOCK_N=_BLOCK_N,
            BLOCK_W=max(_LEAST_WORDS, _WORDS // padded),
            num_warps=4,
        )
    return y
