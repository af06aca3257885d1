"""The layer for few tokens, without tensor cores: reading the weights is what costs, the kernel does little else."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

MOST_TOKENS = 8  # beyond, the tensor cores are faster
MOST_RANK = 256
VECTOR = 4  # words of 4 bytes that a thread loads at once
WORD = 4  # activations per word
HALF_WORDS = 16  # words of a chunk, each with 4 coordinates of its first half and 4 of its second


class FewTokensConfig(NamedTuple):
    """One way to launch the kernel.

    Attributes:
        block_n: output channels per program.
        block_w: words of a row per step, 8 weights each; at least one vector for each thread.
        warps: warps per program.
        prefetch: loads the next step's weights before it multiplies with this one's.
        early: starts before the kernel in front of it has ended, and loads weights meanwhile (programmatic dependent
            launch, compute capability 9.0).
    """

    block_n: int
    block_w: int
    warps: int
    prefetch: bool = True
    early: bool = False


# block_n, block_w, warps
CANDIDATES = tuple(
    FewTokensConfig(*each)
    for each in (
        (8, 512, 4),
        (4, 512, 4),
        (16, 512, 4),
        (2, 512, 4),
        (8, 256, 2),
        (4, 256, 2),
        (16, 256, 2),
        (8, 128, 1),
        (4, 128, 1),
        (4, 512, 1),
        (2, 512, 1),
        (4, 512, 2),
        (2, 512, 2),
        (4, 1024, 4),
        (2, 1024, 4),
        (8, 1024, 8),
        (4, 1024, 8),
        (2, 2048, 4),
        (4, 2048, 8),
        (2, 2048, 8),
        (4, 2048, 16),
    )
)


def default_config(tokens: int, outputs: int, inputs: int) -> FewTokensConfig:
    """The choice without measurements."""
    block_w = min(512, max(32 * VECTOR, triton.next_power_of_2(row_words(inputs))))
    return FewTokensConfig(8 if outputs >= 8192 and tokens <= 2 else 4, block_w, block_w // (32 * VECTOR))


def fits(config: FewTokensConfig, tokens: int, inputs: int) -> bool:
    """Whether the blocks suit the width, and a thread's sums and weights its registers."""
    if config.block_w < 32 * VECTOR * config.warps or config.block_w >= 2 * max(row_words(inputs), 128):
        return False
    padded, threads = triton.next_power_of_2(tokens), 32 * config.warps
    weights = config.block_n * config.block_w // threads
    sums = padded * config.block_n * config.block_w // VECTOR // threads
    return weights <= 64 and sums <= 64


def row_words(inputs: int) -> int:
    """Words of a packed row."""
    return -(-inputs // (8 * HALF_WORDS)) * HALF_WORDS


@triton.jit
def _multiply_bytes(a: tl.tensor, b: tl.tensor, c: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """Adds to c the sum of the products of the four int8 of each word, int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        c += ((a << 24) >> 24) * ((b << 24) >> 24)
        c += ((a << 16) >> 24) * ((b << 16) >> 24)
        c += ((a << 8) >> 24) * ((b << 8) >> 24)
        return c + (a >> 24) * (b >> 24)


@triton.jit
def _load_weights(
    rows: tl.tensor, start: tl.tensor, words: tl.tensor, BLOCK_W: tl.constexpr, MASK: tl.constexpr
) -> tl.tensor:
    """Words `start` to `start + BLOCK_W` of each row, `[BLOCK_N, BLOCK_W]`."""
    column = start + tl.arange(0, BLOCK_W)[None, :]
    if MASK:
        return tl.load(rows + column, mask=column < words, other=0, eviction_policy="evict_first")
    else:
        return tl.load(rows + column, eviction_policy="evict_first")


@triton.jit
def _add_products(
    sums: tl.tensor,
    weights: tl.tensor,
    x: tl.tensor,
    start: tl.tensor,
    x_words: tl.tensor,
    x_stride: tl.tensor,
    tokens: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HALF_WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Adds 16 times the products of a step's weights and activations to sums, one `[BLOCK_N, BLOCK_W // VECTOR]` each
    for TOKENS tokens.
    """
    word = start + tl.arange(0, BLOCK_W)[None, :]
    column = word // HALF_WORDS * (2 * HALF_WORDS) + word % HALF_WORDS
    low = (weights << 4) & -0x0F0F0F10
    high = weights & -0x0F0F0F10
    added = ()
    for token in tl.static_range(TOKENS):
        pointers = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + column
        if MASK:
            low_x = tl.load(pointers, mask=column < x_words, other=0)
            high_x = tl.load(pointers + HALF_WORDS, mask=column + HALF_WORDS < x_words, other=0)
        else:
            low_x = tl.load(pointers)
            high_x = tl.load(pointers + HALF_WORDS)
        products = tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
        products = _multiply_bytes(low, tl.broadcast_to(low_x, (BLOCK_N, BLOCK_W)), products, ASM)
        products = _multiply_bytes(high, tl.broadcast_to(high_x, (BLOCK_N, BLOCK_W)), products, ASM)
        products = tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_W // VECTOR, VECTOR)), 2)
        added = added + (sums[token] + products,)  # type: ignore[assignment]  # noqa: RUF005 (not in Triton)
    return added


@triton.jit(do_not_specialize=("tokens",))
def few_tokens_kernel(
    x: tl.tensor,  # [tokens, x_stride] words of 4 int8
    x_scale: tl.tensor,
    weight: tl.tensor,  # [outputs, words] words of 8 nibbles
    weight_scale: tl.tensor,
    outlier: tl.tensor,
    outlier_weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    words: tl.tensor,
    x_words: tl.tensor,
    x_stride: tl.tensor,
    outlier_stride: tl.tensor,
    rank: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF_WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    SINGLE: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
    MASK: tl.constexpr,
    RANK_MASK: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """BLOCK_N outputs of all tokens. What does not depend on the activations is loaded first."""
    first_n = tl.program_id(0) * BLOCK_N
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N), outputs - 1)
    rows = weight + n.to(tl.int64)[:, None] * words
    weights = _load_weights(rows, 0, words, BLOCK_W, MASK)
    if outlier is not None:
        coordinate = tl.arange(0, BLOCK_R)[None, :] + tl.zeros((BLOCK_N, 1), tl.int32)
        outlier_rows = outlier_weight + n.to(tl.int64)[:, None] * rank + coordinate
        if RANK_MASK:  # noqa: SIM108 (decided when it is compiled)
            wide = tl.load(outlier_rows, mask=coordinate < rank, other=0.0)
        else:
            wide = tl.load(outlier_rows)
    scale = tl.load(weight_scale + n)
    if bias is not None:
        shift = tl.load(bias + n)
    if EARLY and ASM:
        gdc_wait()

    sums = ()
    for _ in tl.static_range(TOKENS):
        zeros = tl.zeros((BLOCK_N, BLOCK_W // VECTOR), tl.int32)
        sums = sums + (zeros,)  # type: ignore[assignment]  # noqa: RUF005 (not in Triton)
    if SINGLE:
        sums = _add_products(
            sums, weights, x, 0, x_words, x_stride, tokens,
            TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, MASK, ASM,
        )  # fmt: skip
    elif PREFETCH:
        start = 0
        for following in range(BLOCK_W, words, BLOCK_W):
            next_weights = _load_weights(rows, following, words, BLOCK_W, MASK)
            sums = _add_products(
                sums, weights, x, start, x_words, x_stride, tokens,
                TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, False, ASM,
            )  # fmt: skip
            weights = next_weights
            start = following
        sums = _add_products(
            sums, weights, x, start, x_words, x_stride, tokens,
            TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, MASK, ASM,
        )  # fmt: skip
    else:
        sums = _add_products(
            sums, weights, x, 0, x_words, x_stride, tokens,
            TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, False, ASM,
        )  # fmt: skip
        for start in range(BLOCK_W, words, BLOCK_W):
            weights = _load_weights(rows, start, words, BLOCK_W, MASK)
            sums = _add_products(
                sums, weights, x, start, x_words, x_stride, tokens,
                TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, MASK, ASM,
            )  # fmt: skip

    n = first_n + tl.arange(0, BLOCK_N)
    for token in tl.static_range(TOKENS):
        m = tl.minimum(token, tokens - 1).to(tl.int64)
        total = tl.sum(sums[token], 1) >> 4
        result = total.to(tl.float32) * tl.load(x_scale + m) * scale.to(tl.float32)
        if outlier is not None:
            if RANK_MASK:
                coordinates = tl.load(outlier + m * outlier_stride + coordinate, mask=coordinate < rank, other=0.0)
            else:
                coordinates = tl.load(outlier + m * outlier_stride + coordinate)
            result += tl.sum(wide.to(tl.float32) * coordinates.to(tl.float32), 1)
        if bias is not None:
            result += shift.to(tl.float32)
        tl.store(y + m * outputs + n, result.to(y.dtype.element_ty), mask=(n < outputs) & (token < tokens))


def qualifies(x: torch.Tensor, inputs: int, rank: int) -> bool:
    """Whether the kernel takes these activations and so many outliers; the weight are nibbles of `inputs` columns."""
    aligned = x.stride(0) % WORD == 0 and x.storage_offset() % WORD == 0 and x.data_ptr() % WORD == 0
    return x.dtype == torch.int8 and x.shape[0] <= MOST_TOKENS and inputs % WORD == 0 and aligned and rank <= MOST_RANK


def few_tokens_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    integers: torch.Tensor,
    weight_scale: torch.Tensor,
    outlier: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: FewTokensConfig,
    compiled: bool,
) -> torch.Tensor:
    """Returns `[tokens, out]`.

    Args:
        x: `[tokens, in]`, int8; see `qualifies`.
        x_scale: `[tokens, 1]`, float32.
        integers: nibbles, `[out, nibble_bytes(in)]`, uint8.
        weight_scale: `[out, 1]`.
        outlier: `[tokens, rank]`, or None.
        outlier_weight: `[out, rank]`, of the same dtype, or None.
        bias: `[out]`, or None.
        out_dtype: dtype of the result.
        config: how to launch.
        compiled: not in Triton's interpreter.
    """
    (tokens, inputs), outputs = x.shape, integers.shape[0]
    packed, x = integers.view(torch.int32), x.view(torch.int32)
    words = packed.shape[1]
    rank = 0 if outlier is None else outlier.shape[1]
    block_r = triton.next_power_of_2(max(rank, 8))
    y = torch.empty(tokens, outputs, dtype=out_dtype, device=x.device)
    options = {"launch_pdl": True} if config.early else {}
    few_tokens_kernel[(triton.cdiv(outputs, config.block_n),)](
        x,
        x_scale,
        packed,
        weight_scale,
        outlier,
        outlier_weight,
        bias,
        y,
        tokens,
        outputs,
        words,
        inputs // WORD,
        x.stride(0),
        1 if outlier is None else outlier.stride(0),
        max(1, rank),
        TOKENS=triton.next_power_of_2(tokens),
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_w,
        BLOCK_R=block_r,
        HALF_WORDS=HALF_WORDS,
        VECTOR=VECTOR,
        SINGLE=config.block_w >= words,
        PREFETCH=config.prefetch,
        EARLY=config.early,
        MASK=words % config.block_w != 0 or inputs % (8 * HALF_WORDS) != 0,
        RANK_MASK=rank != block_r,
        ASM=compiled,
        num_warps=config.warps,
        **options,
    )
    return y
