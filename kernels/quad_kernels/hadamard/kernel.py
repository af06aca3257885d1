"""Triton kernel of the online Hadamard transform, alone or with the quantizer after it; launch.py runs it.

README.md in this folder has the factors and the error.
"""

# Tuples of tiles grow in the unrolled loops of the kernel: no static type follows them, and Triton knows no (*a, b).
# mypy: disable-error-code="assignment, misc, unreachable"
# ruff: noqa: RUF005

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quad_kernels.triton_grid import (
    above_zero,
    asymmetric_grid,
    below_zero,
    drop_outliers,
    magnitude_bits,
    outlier_source,
    residual_source,
    round_to_grid,
    symmetric_grid,
)


@triton.jit
def _dot_split(
    a: tl.tensor, b: tl.tensor, acc: tl.tensor, LEFT_TERMS: tl.constexpr, RIGHT_TERMS: tl.constexpr
) -> tl.tensor:
    """Returns acc + a b; the operand with terms is taken apart into bfloat16, 8 bits each, the other one is exact."""
    if LEFT_TERMS > 0:
        for term in tl.static_range(LEFT_TERMS):
            high = a.to(tl.bfloat16)
            acc = tl.dot(high, b, acc)
            if term + 1 < LEFT_TERMS:
                a -= high.to(tl.float32)
    elif RIGHT_TERMS > 0:
        for term in tl.static_range(RIGHT_TERMS):
            high = b.to(tl.bfloat16)
            acc = tl.dot(a, high, acc)
            if term + 1 < RIGHT_TERMS:
                b -= high.to(tl.float32)
    else:
        acc = tl.dot(a, b, acc)
    return acc


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
def _multiply_slice(
    x_row: tl.tensor,
    left_ptr: tl.tensor,
    left: tl.tensor,  # loaded already if there is only one tile and step, else None
    right: tl.tensor,
    normaliser: tl.tensor,
    tile: tl.constexpr,
    part: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    SLICES: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    IN_TERMS: tl.constexpr,
    OUT_TERMS: tl.constexpr,
) -> tl.tensor:
    """Rows of one tile of left^T x_part right, normalised, `[TILE, RIGHT]`, float32."""
    depth = tl.arange(0, DEPTH)
    right_column = tl.arange(0, RIGHT)
    tile_row = tl.arange(0, TILE)
    acc = tl.zeros([TILE, RIGHT], tl.float32)
    for step in range(STEPS):
        row = step * DEPTH + depth[:, None]
        column = (row * SLICES + part) * RIGHT + right_column[None, :]
        source = residual_source(column, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH)
        x = tl.load(x_row + source, mask=row < LEFT, other=0.0)
        x = drop_outliers(x, column, OUTLIERS, BLOCK, KEEP_WIDTH)
        if left is None:
            left_row = (tile * TILE + tile_row[:, None]) * (STEPS * DEPTH)
            acc = _dot_split(tl.load(left_ptr + left_row + row.trans(1, 0)), x, acc, 0, IN_TERMS)
        else:
            acc = _dot_split(left, x, acc, 0, IN_TERMS)
    y = tl.zeros([TILE, RIGHT], tl.float32)
    return _dot_split(acc * normaliser, right, y, OUT_TERMS, 0)


@triton.jit
def _add_slices(parts: tl.tuple, SLICES: tl.constexpr) -> tl.tuple:
    """The middle factor, of order SLICES: butterflies between whole tiles."""
    for bit in tl.static_range(3):
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
def _store_tile(
    y_row: tl.tensor,
    y: tl.tensor,
    tile: tl.constexpr,
    part: tl.constexpr,
    LEFT: tl.constexpr,
    SLICES: tl.constexpr,
    RIGHT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Stores one slice of one tile, `[TILE, RIGHT]`, in its place in the row."""
    row = tile * TILE + tl.arange(0, TILE)[:, None]
    column = (row * SLICES + part) * RIGHT + tl.arange(0, RIGHT)[None, :]
    tl.store(y_row + column, y, mask=row < LEFT)


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
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
) -> None:
    """Quantizes a whole row, held in the tuple tile by tile and slice by slice, and stores integers and scale."""
    largest = magnitude_bits(rounded[0])
    for i in tl.static_range(1, TILES * SLICES):
        largest = tl.maximum(largest, magnitude_bits(rounded[i]))
    largest = tl.max(tl.max(largest, 1), 0)
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
        for part in tl.static_range(SLICES):
            integer = round_to_grid(rounded[tile * SLICES + part], scale, low, high)
            _store_tile(y_row, integer.to(tl.int8), tile, part, LEFT, SLICES, RIGHT, TILE)


@triton.jit
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
    IN_TERMS: tl.constexpr,
    OUT_TERMS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    RANK: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
) -> None:
    """Transforms every num_programs-th token and, unless BITS is 0, quantizes it."""
    if NEXT_EARLY:
        gdc_launch_dependents()
    SIZE: tl.constexpr = LEFT * SLICES * RIGHT
    OUTLIER_WIDTH: tl.constexpr = WIDTH // BLOCK * OUTLIERS
    right_index = tl.arange(0, RIGHT)
    right = tl.load(right_ptr + right_index[:, None] * RIGHT + right_index[None, :])
    left = None
    if TILES * STEPS == 1:
        left = tl.load(left_ptr + tl.arange(0, TILE)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        x_row = x_ptr + tl.cast(token, tl.int64) * X_STRIDE
        y_row = y_ptr + tl.cast(token, tl.int64) * SIZE
        if RANK > 0:
            outlier_row = outlier_ptr + tl.cast(token, tl.int64) * OUTLIER_WIDTH
            _copy_outliers(x_row, outlier_row, WIDTH, OUTLIERS, BLOCK, OUTLIER_WIDTH, RANK)
        rounded = ()
        for tile in tl.static_range(TILES):
            parts = ()
            for part in tl.static_range(SLICES):
                y = _multiply_slice(
                    x_row, left_ptr, left, right, normaliser, tile, part, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH,
                    LEFT, SLICES, RIGHT, TILE, DEPTH, STEPS, IN_TERMS, OUT_TERMS,
                )  # fmt: skip
                parts = parts + (y,)
            parts = _add_slices(parts, SLICES)
            for part in tl.static_range(SLICES):
                y = parts[part].to(x_ptr.dtype.element_ty)
                if BITS > 0:
                    rounded = rounded + (y,)
                else:
                    _store_tile(y_row, y, tile, part, LEFT, SLICES, RIGHT, TILE)
        if BITS > 0:
            _store_quantized(
                y_row, scale_ptr + token, rounded, clip_ratio, LEFT, SLICES, RIGHT, TILE, TILES, BITS, SYMMETRIC
            )
