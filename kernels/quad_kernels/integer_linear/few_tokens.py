"""The layer for few tokens, without tensor cores: reading the weights is what costs, the kernel does little else."""

# Tuples grow in the unrolled loops of the kernel: no static type follows them, and Triton knows no (*a, b).
# mypy: disable-error-code="assignment, misc, unreachable"
# ruff: noqa: RUF005, SIM108

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from quad_kernels.whole_numbers import ceil_div, next_power_of_2

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
        depth: steps whose weights are in flight or in registers at the same time.
        early: starts before the kernel in front of it has ended, and loads weights meanwhile (programmatic dependent
            launch, compute capability 9.0).
    """

    block_n: int
    block_w: int
    warps: int
    depth: int
    early: bool = False


# block_w, warps, depth, and block_n of each
_STEPS = (
    (512, 4, 1, (8, 4, 16, 2)),
    (256, 2, 2, (4, 8, 2)),
    (128, 1, 4, (4, 2, 1)),
    (1024, 8, 1, (8, 4)),
    (256, 2, 7, (2, 4, 1)),
    (512, 4, 4, (4, 2, 1)),
    (1024, 8, 2, (4, 8, 2)),
    (2048, 16, 1, (8, 4)),
    (128, 1, 14, (1, 2)),
    (512, 4, 2, (4, 8)),
)
CANDIDATES = tuple(FewTokensConfig(n, w, warps, depth) for w, warps, depth, sizes in _STEPS for n in sizes)


def default_config(tokens: int, outputs: int, inputs: int) -> FewTokensConfig:
    """The choice without measurements: whole rows in flight, 16 KB of a program or more where there are many rows."""
    words = row_words(inputs)
    widest = 512 if tokens == 1 or words > 512 else 256  # with more tokens, sums over fewer threads weigh more
    block_w = min(widest, max(32 * VECTOR, next_power_of_2(words)))
    depth = min(4, -(-words // block_w))
    block_n = 8 if depth == 1 and tokens == 1 and outputs >= 4096 else 4
    if depth > 2 and tokens > 4:
        block_n = 2
    return FewTokensConfig(block_n, block_w, block_w // (32 * VECTOR), depth)


def fits(config: FewTokensConfig, tokens: int, inputs: int) -> bool:
    """Whether the blocks suit the width, and a thread's sums and weights its registers."""
    words, threads = row_words(inputs), 32 * config.warps
    if config.block_w < VECTOR * threads or (config.block_w >= 2 * words and config.block_w > 32 * VECTOR):
        return False
    if config.depth > 1 and (config.depth - 1) * config.block_w >= words:
        return False
    padded = next_power_of_2(tokens)
    weights = config.block_n * config.block_w * config.depth // threads
    sums = padded * config.block_n * config.block_w // VECTOR // threads
    if tokens == 1:
        return weights <= 112
    loop = config.depth * config.block_w < words
    return weights <= 64 and sums <= 32 and weights + sums <= (80 if loop else 96)


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
    """Words `start` to `start + BLOCK_W` of each row, `[BLOCK_N, BLOCK_W]`; zeros beyond the end, if MASK."""
    column = start + tl.arange(0, BLOCK_W)[None, :]
    if MASK:
        return tl.load(rows + column, mask=column < words, other=0, eviction_policy="evict_first")
    else:
        return tl.load(rows + column, eviction_policy="evict_first")


@triton.jit
def _columns_of_vectors(words: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Words 4i, 4i + 1, 4i + 2 and 4i + 3 of rows, in tensors of their own; a thread that has loaded a vector of four
    words has them all.
    """
    even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


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
    low = _columns_of_vectors((weights << 4) & -0x0F0F0F10)
    high = _columns_of_vectors(weights & -0x0F0F0F10)
    added = ()
    for token in tl.static_range(TOKENS):
        pointers = x + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride + column
        if MASK:
            low_x = tl.load(pointers, mask=column < x_words, other=0)
            high_x = tl.load(pointers + HALF_WORDS, mask=column + HALF_WORDS < x_words, other=0)
        else:
            low_x = tl.load(pointers)
            high_x = tl.load(pointers + HALF_WORDS)
        low_x = _columns_of_vectors(low_x)
        high_x = _columns_of_vectors(high_x)
        total = sums[token]
        for place in tl.static_range(VECTOR):
            total = _multiply_bytes(low[place], tl.broadcast_to(low_x[place], total.shape), total, ASM)
            total = _multiply_bytes(high[place], tl.broadcast_to(high_x[place], total.shape), total, ASM)
        added = added + (total,)
    return added


@triton.jit
def _stacked_sums(parts: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Sums of each of COUNT tensors `[BLOCK_N, columns]` over its columns, `[BLOCK_N, COUNT]`: all in one reduction."""
    BLOCK_N: tl.constexpr = parts[0].shape[0]
    if COUNT == 1:
        return tl.sum(parts[0], 1)[:, None]
    elif COUNT == 2:
        return tl.sum(tl.join(parts[0], parts[1]), 1)
    elif COUNT == 4:
        sums = tl.sum(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])), 1)
        return tl.reshape(sums, (BLOCK_N, 4))
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        return tl.reshape(tl.sum(tl.join(even, odd), 1), (BLOCK_N, 8))


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
    DEPTH: tl.constexpr,
    LOOP: tl.constexpr,
    EARLY: tl.constexpr,
    MASK: tl.constexpr,
    RANK_MASK: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """BLOCK_N outputs of all tokens. What does not depend on the activations is loaded first.

    DEPTH steps of weights are in registers or on their way there. If that is not the whole row, LOOP, what a step has
    freed is filled for the step DEPTH later.
    """
    first_n = tl.program_id(0) * BLOCK_N
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N), outputs - 1)
    rows = weight + n.to(tl.int64)[:, None] * words
    weights = ()
    for step in tl.static_range(DEPTH):
        block = _load_weights(rows, step * BLOCK_W, words, BLOCK_W, MASK and step == DEPTH - 1 and not LOOP)
        weights = weights + (block,)
    if outlier is not None:
        coordinate = tl.arange(0, BLOCK_R)[None, :] + tl.zeros((BLOCK_N, 1), tl.int32)
        outlier_rows = outlier_weight + n.to(tl.int64)[:, None] * rank + coordinate
        if RANK_MASK:
            wide = tl.load(outlier_rows, mask=coordinate < rank, other=0.0)
        else:
            wide = tl.load(outlier_rows)
    scale = tl.load(weight_scale + n)
    if bias is not None:
        shift = tl.load(bias + n)
    # Either one keeps the loads before it in front of everything else. Without, the compiler puts them off, each until
    # there are registers to spare, and few are under way at a time.
    if EARLY and ASM:
        gdc_wait()
    else:
        tl.debug_barrier()

    m = tl.arange(0, TOKENS)
    token_scale = tl.load(x_scale + tl.minimum(m, tokens - 1))
    sums, products = (), ()
    for token in tl.static_range(TOKENS):
        zeros = tl.zeros((BLOCK_N, BLOCK_W // VECTOR), tl.int32)
        sums = sums + (zeros,)
        if outlier is not None:
            row = outlier + tl.minimum(token, tokens - 1).to(tl.int64) * outlier_stride
            if RANK_MASK:
                coordinates = tl.load(row + coordinate, mask=coordinate < rank, other=0.0)
            else:
                coordinates = tl.load(row + coordinate)
            product = wide.to(tl.float32) * coordinates.to(tl.float32)
            products = products + (product,)

    first = 0
    if LOOP:
        for start in range(0, words - DEPTH * BLOCK_W, DEPTH * BLOCK_W):
            following = ()
            for step in tl.static_range(DEPTH):
                sums = _add_products(
                    sums, weights[step], x, start + step * BLOCK_W, x_words, x_stride, tokens,
                    TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, False, ASM,
                )  # fmt: skip
                block = _load_weights(rows, start + (DEPTH + step) * BLOCK_W, words, BLOCK_W, MASK)
                tl.debug_barrier()  # keeps the load in front of the next step
                following = following + (block,)
            weights = following
            first = start + DEPTH * BLOCK_W
    for step in tl.static_range(DEPTH):
        sums = _add_products(
            sums, weights[step], x, first + step * BLOCK_W, x_words, x_stride, tokens,
            TOKENS, BLOCK_N, BLOCK_W, HALF_WORDS, VECTOR, MASK and (LOOP or step == DEPTH - 1), ASM,
        )  # fmt: skip

    result = (_stacked_sums(sums, TOKENS) >> 4).to(tl.float32)
    result = result * token_scale[None, :] * scale.to(tl.float32)[:, None]
    if outlier is not None:
        result += _stacked_sums(products, TOKENS)
    if bias is not None:
        result += shift.to(tl.float32)[:, None]
    n = first_n + tl.arange(0, BLOCK_N)
    pointers = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(pointers, result.to(y.dtype.element_ty), mask=(m < tokens)[None, :] & (n < outputs)[:, None])


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
    depth = min(config.depth, ceil_div(words, config.block_w))
    loop = depth * config.block_w < words
    step = depth * config.block_w if loop else config.block_w
    block_r = next_power_of_2(max(rank, 8))
    y = torch.empty(tokens, outputs, dtype=out_dtype, device=x.device)
    options = {"launch_pdl": True} if config.early else {}
    few_tokens_kernel[(ceil_div(outputs, config.block_n),)](
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
        TOKENS=next_power_of_2(tokens),
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_w,
        BLOCK_R=block_r,
        HALF_WORDS=HALF_WORDS,
        VECTOR=VECTOR,
        DEPTH=depth,
        LOOP=loop,
        EARLY=config.early,
        MASK=words % step != 0 or inputs % (8 * HALF_WORDS) != 0,
        RANK_MASK=rank != block_r,
        ASM=compiled,
        num_warps=config.warps,
        **options,
    )
    return y
