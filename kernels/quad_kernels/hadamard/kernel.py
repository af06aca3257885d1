"""Triton kernel of the online Hadamard transform, alone or with the quantizer after it; launch.py runs it.

README.md in this folder has the factors and the error.
"""

# Tuples of tiles grow in the unrolled loops of the kernel: no static type follows them, and Triton knows no (*a, b).
# mypy: disable-error-code="assignment, misc, unreachable"
# ruff: noqa: RUF005, SIM108

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quad_kernels.triton_grid import (
    above_zero,
    asymmetric_grid,
    below_zero,
    magnitude_bits,
    outlier_source,
    residual_source,
    symmetric_grid,
)


@triton.jit
def _terms(x: tl.tensor, TERMS: tl.constexpr) -> tl.tuple:
    """Bfloat16 tiles whose sum is x, 8 bits each, the smallest first; x itself if TERMS is 0.

    All but the smallest are cut off, not rounded: that takes integer operations at the full rate.
    """
    terms = ()
    if TERMS == 0:
        terms = (x,)
    for term in tl.static_range(TERMS):
        if term + 1 < TERMS:
            bits = x.to(tl.int32, bitcast=True)
            terms = ((bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True),) + terms
            x -= (bits & -65536).to(tl.float32, bitcast=True)
        else:
            terms = (x.to(tl.bfloat16),) + terms
    return terms


@triton.jit
def _copy_outliers(
    x_row: tl.tensor,
    outlier_row: tl.tensor,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTLIER_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """Copies the outliers of a token; RANK is OUTLIER_WIDTH rounded up to a power of two."""
    index = tl.arange(0, RANK)
    outlier = tl.load(x_row + outlier_source(index, WIDTH, OUTLIERS, BLOCK), mask=index < OUTLIER_WIDTH)
    tl.store(outlier_row + index, outlier, mask=index < OUTLIER_WIDTH)


@triton.jit
def _load_rows(
    x_row: tl.tensor,
    exists: tl.tensor,
    step: tl.tensor,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOADED: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """LOADED columns, from `first` on, of one step's rows of a token read as `[LEFT, COLUMNS]`; outliers are zero."""
    row = step * DEPTH + tl.arange(0, DEPTH)[:, None]
    column = row * COLUMNS + first + tl.arange(0, LOADED)[None, :]
    valid = (row < LEFT) & exists
    if KEEP_WIDTH and OUTLIERS > 0:
        valid = valid & (column % BLOCK >= OUTLIERS)
    source = residual_source(column, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH)
    return tl.load(x_row + source, mask=valid, other=0.0)


@triton.jit
def _take_apart(x: tl.tensor, PARTS: tl.constexpr) -> tl.tuple:
    """PARTS tiles side by side, from left to right: no data moves, a thread holds the same columns of each."""
    parts = (x,)
    for level in tl.static_range(8):
        if (1 << level) < PARTS:
            halves = ()
            for i in tl.static_range(1 << level):
                whole = parts[i].reshape([x.shape[0], 2, x.shape[1] >> (level + 1)])
                low, high = whole.permute(0, 2, 1).split()
                halves = halves + (low, high)
            parts = halves
    return parts


@triton.jit
def _put_together(parts: tl.tuple, FIRST: tl.constexpr, PARTS: tl.constexpr) -> tl.tensor:
    """The opposite, of PARTS tiles from FIRST on."""
    tiles = ()
    for i in tl.static_range(PARTS):
        tiles = tiles + (parts[FIRST + i],)
    for level in tl.static_range(8):
        if (1 << level) < PARTS:
            wider = ()
            for i in tl.static_range(PARTS >> (level + 1)):
                both = tl.join(tiles[2 * i], tiles[2 * i + 1]).permute(0, 2, 1)
                wider = wider + (both.reshape([both.shape[0], 2 * both.shape[2]]),)
            tiles = wider
    return tiles[0]


@triton.jit
def _multiply_left(
    x_row: tl.tensor,
    exists: tl.tensor,  # False: zeros
    left_ptr: tl.tensor,
    left: tl.tensor,  # None: loaded here, step by step
    tile: tl.constexpr,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOADED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    IN_TERMS: tl.constexpr,
) -> tl.tensor:
    """One tile of rows of the left factor times LOADED columns of a token, `[TILE, LOADED]`, float32."""
    acc = tl.zeros([TILE, LOADED], tl.float32)
    small = acc  # terms other than the largest are summed apart, where little is lost to the places that are cut off
    for step in range(STEPS):
        x = _load_rows(x_row, exists, step, first, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH, LEFT, COLUMNS, LOADED, DEPTH)
        tile_left = left
        if left is None:
            left_row = (tile * TILE + tl.arange(0, TILE)[:, None]) * (STEPS * DEPTH)
            tile_left = tl.load(left_ptr + left_row + step * DEPTH + tl.arange(0, DEPTH)[None, :])
        terms = _terms(x, IN_TERMS)
        for term in tl.static_range(IN_TERMS - 1):
            small = tl.dot(tile_left, terms[term], small)
        acc = tl.dot(tile_left, terms[max(1, IN_TERMS) - 1], acc)
    return acc + small if IN_TERMS > 0 else acc


@triton.jit
def _multiply_right(
    acc: tl.tensor, right: tl.tensor, normaliser: tl.tensor, PARTS: tl.constexpr, OUT_TERMS: tl.constexpr
) -> tl.tuple:
    """The right factor: PARTS tiles, float32."""
    parts = _take_apart(acc * normaliser, PARTS)
    products = ()
    for part in tl.static_range(PARTS):
        terms = _terms(parts[part], OUT_TERMS)
        if right.shape[0] == OUT_TERMS * right.shape[1]:
            y = tl.dot(_put_together(terms, 0, OUT_TERMS), right)
        else:
            y = tl.dot(terms[0], right)
            for term in tl.static_range(1, OUT_TERMS):
                y = tl.dot(terms[term], right, y)
        products = products + (y,)
    return products


@triton.jit
def _add_slices(parts: tl.tuple, SLICES: tl.constexpr) -> tl.tuple:
    """The middle factor, of order SLICES: butterflies between whole tiles."""
    for bit in tl.static_range(4):
        if (1 << bit) < SLICES:
            sums = ()
            for part in tl.static_range(SLICES):
                if (part >> bit) & 1:
                    sums = sums + (parts[part - (1 << bit)] - parts[part],)
                else:
                    sums = sums + (parts[part] + parts[part + (1 << bit)],)
            parts = sums
    return parts


@triton.jit
def _round_to_dtype(y: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Float32 numbers rounded to nearest even in `dtype`.

    For bfloat16 two operations at the full rate: 65537 y has its last place where bfloat16 has it in y, and the
    rounding's tie is even where y's is. For |y| < 2^112, and without bfloat16's subnormal numbers.
    """
    if dtype == tl.bfloat16:
        y = tl.fma(y, -65536.0, y * 65537.0)
    else:
        y = y.to(dtype).to(tl.float32)
    return y


@triton.jit
def _store_slices(
    y_row: tl.tensor,
    y: tl.tensor,
    tile: tl.constexpr,
    part: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Stores the slices of one tile from `part` on in their place in the token."""
    row = tile * TILE + tl.arange(0, TILE)[:, None]
    column = row * COLUMNS + part * RIGHT + tl.arange(0, y.shape[1])[None, :]
    tl.store(y_row + column, y, mask=row < LEFT)


@triton.jit
def _round_product(x: tl.tensor, scale: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """`triton_grid.round_to_grid` by one multiplication, as int8: of x times the inverse of the scale.

    That is x / scale but for 2^-24 of it, less than what the order of the sums in x makes.
    """
    usable = (scale > 0.0) & (scale < float("inf"))
    inverse = tl.div_rn(1.0, tl.where(usable, scale, 1.0))
    # Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits of the sum.
    total = tl.fma(x, inverse, 12582912.0)
    low, high = tl.where(usable, low, 0.0) + 12582912.0, tl.where(usable, high, 0.0) + 12582912.0
    return tl.minimum(tl.maximum(total, low), high).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store_quantized(
    y_row: tl.tensor,
    scale_ptr: tl.tensor,
    rounded: tl.tuple,
    clip_ratio: tl.tensor,
    LEFT: tl.constexpr,
    SLICES: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    JOINED: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
) -> None:
    """Quantizes a token, held in the tuple tile by tile and slice by slice, and stores integers and scale."""
    largest = tl.abs(rounded[0])
    for i in tl.static_range(1, TILES * SLICES):
        largest = tl.maximum(largest, tl.abs(rounded[i]), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(tl.max(magnitude_bits(largest), 1), 0)
    if SYMMETRIC:
        scale, low, high = symmetric_grid(largest, clip_ratio, BITS)
    else:
        least, most = below_zero(rounded[0]), above_zero(rounded[0])
        for i in tl.static_range(1, TILES * SLICES):
            least = tl.minimum(least, below_zero(rounded[i]))
            most = tl.maximum(most, above_zero(rounded[i]))
        least, most = tl.min(tl.min(least, 1), 0), tl.max(tl.max(most, 1), 0)
        scale, low, high = asymmetric_grid(least, most, largest, clip_ratio, BITS)
    tl.store(scale_ptr, scale)
    for tile in tl.static_range(TILES):
        for first in tl.static_range(0, SLICES, JOINED):
            integers = ()
            for part in tl.static_range(JOINED):
                integers = integers + (_round_product(rounded[tile * SLICES + first + part], scale, low, high),)
            y = _put_together(integers, 0, JOINED)
            _store_slices(y_row, y, tile, first, LEFT, SLICES * RIGHT, RIGHT, TILE)


@triton.jit
def _store_token(
    x_row: tl.tensor,
    outlier_row: tl.tensor,
    y_row: tl.tensor,
    scale_ptr: tl.tensor,
    parts: tl.tuple,
    clip_ratio: tl.tensor,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    SLICES: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    JOINED: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """What becomes of a token's products, held in the tuple tile by tile and slice by slice, float32; its outliers."""
    if RANK > 0:
        _copy_outliers(x_row, outlier_row, WIDTH, OUTLIERS, BLOCK, WIDTH // BLOCK * OUTLIERS, RANK)
    if BITS > 0:
        rounded = ()
        for i in tl.static_range(TILES * SLICES):
            rounded = rounded + (_round_to_dtype(parts[i], x_row.dtype.element_ty),)
        _store_quantized(
            y_row, scale_ptr, rounded, clip_ratio, LEFT, SLICES, RIGHT, TILE, TILES, JOINED, BITS, SYMMETRIC
        )
    else:
        for tile in tl.static_range(TILES):
            for first in tl.static_range(0, SLICES, JOINED):
                y = _put_together(parts, tile * SLICES + first, JOINED).to(x_row.dtype.element_ty)
                _store_slices(y_row, y, tile, first, LEFT, SLICES * RIGHT, RIGHT, TILE)


@triton.jit
def _load_right(right_ptr: tl.tensor, RIGHT: tl.constexpr, OUT_TERMS: tl.constexpr) -> tl.tensor:
    """The right factor, twice one above the other for two terms side by side: `[RIGHT or 2 * RIGHT, RIGHT]`."""
    row = tl.arange(0, 2 * RIGHT if OUT_TERMS == 2 else RIGHT)[:, None]
    return tl.load(right_ptr + row % RIGHT * RIGHT + tl.arange(0, RIGHT)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def hadamard_kernel(
    x_ptr: tl.tensor,  # [tokens, WIDTH]
    left_ptr: tl.tensor,  # [TILES * TILE, STEPS * DEPTH], signs of the left factor, transposed
    right_ptr: tl.tensor,  # [RIGHT, RIGHT] bfloat16, signs
    outlier_ptr: tl.tensor,  # [tokens, outliers of all blocks]
    y_ptr: tl.tensor,  # [tokens, LEFT * SLICES * RIGHT], int8 if BITS, else the dtype of x
    scale_ptr: tl.tensor,  # [tokens] float32
    tokens: tl.tensor,
    normaliser: tl.tensor,
    clip_ratio: tl.tensor,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    SLICES: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    LOADED: tl.constexpr,
    JOINED: tl.constexpr,
    TURNS: tl.constexpr,
    IN_TERMS: tl.constexpr,
    OUT_TERMS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
) -> None:
    """Transforms tokens and, unless BITS is 0, quantizes them.

    With TURNS the programs take turns with the tokens and keep the factors, of which the left one must be one tile. The
    left product of the next token ends a turn, so that its input has the time of a turn to arrive. Without TURNS each
    program has one token, and asks for its input and the factors together.
    """
    if NEXT_EARLY:
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = SLICES * RIGHT
    SIZE: tl.constexpr = LEFT * COLUMNS
    OUTLIER_WIDTH: tl.constexpr = WIDTH // BLOCK * OUTLIERS
    if TURNS:
        right = _load_right(right_ptr, RIGHT, OUT_TERMS)
        left = tl.load(left_ptr + tl.arange(0, TILE)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])
        x_row = x_ptr + tl.cast(tl.program_id(0), tl.int64) * X_STRIDE
        acc = _multiply_left(
            x_row, tl.program_id(0) < tokens, left_ptr, left, 0, 0, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH, LEFT, COLUMNS,
            COLUMNS, TILE, DEPTH, STEPS, IN_TERMS,
        )  # fmt: skip
        for turn in range(tl.program_id(0), tokens, tl.num_programs(0)):
            token = tl.cast(turn, tl.int64)
            parts = _add_slices(_multiply_right(acc, right, normaliser, SLICES, OUT_TERMS), SLICES)
            _store_token(
                x_ptr + token * X_STRIDE, outlier_ptr + token * OUTLIER_WIDTH, y_ptr + token * SIZE, scale_ptr + token,
                parts, clip_ratio, WIDTH, OUTLIERS, BLOCK, LEFT, SLICES, RIGHT, TILE, TILES, JOINED, BITS, SYMMETRIC,
                RANK,
            )  # fmt: skip
            after = turn + tl.num_programs(0)
            acc = _multiply_left(
                x_ptr + tl.cast(after, tl.int64) * X_STRIDE, after < tokens, left_ptr, left, 0, 0, WIDTH, OUTLIERS,
                BLOCK, KEEP_WIDTH, LEFT, COLUMNS, COLUMNS, TILE, DEPTH, STEPS, IN_TERMS,
            )  # fmt: skip
    else:
        token = tl.cast(tl.program_id(0), tl.int64)
        x_row = x_ptr + token * X_STRIDE
        products = ()
        right = None
        for tile in tl.static_range(TILES):
            parts = ()
            for first in tl.static_range(0, COLUMNS, LOADED):
                acc = _multiply_left(
                    x_row, True, left_ptr, None, tile, first, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH, LEFT, COLUMNS, LOADED,
                    TILE, DEPTH, STEPS, IN_TERMS,
                )  # fmt: skip
                if right is None:
                    right = _load_right(right_ptr, RIGHT, OUT_TERMS)
                parts = parts + _multiply_right(acc, right, normaliser, LOADED // RIGHT, OUT_TERMS)
            products = products + _add_slices(parts, SLICES)
        _store_token(
            x_row, outlier_ptr + token * OUTLIER_WIDTH, y_ptr + token * SIZE, scale_ptr + token, products, clip_ratio,
            WIDTH, OUTLIERS, BLOCK, LEFT, SLICES, RIGHT, TILE, TILES, JOINED, BITS, SYMMETRIC, RANK,
        )  # fmt: skip
