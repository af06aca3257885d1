"""Triton kernels of the integer linear layer; README.md in this folder derives them, launch.py runs them."""

import triton
import triton.language as tl

from quad_kernels.integer_linear.block import add_block, scaled_block


@triton.jit
def _tile_origin(
    tile: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First token and first output of a tile.

    Bands of BAND rows of tiles, column by column: what runs at the same time shares its operands in the L2 cache.
    """
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    band = tile // (BAND * tiles_n)
    band_height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tile - band * BAND * tiles_n
    first_m = (band * BAND + within % band_height) * BLOCK_M
    first_n = within // band_height * BLOCK_N
    return first_m, first_n


@triton.jit
def _add_outliers(
    y: tl.tensor,
    outlier: tl.tensor,
    outlier_weight: tl.tensor,
    first_m: tl.tensor,
    first_n: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    rank: tl.tensor,
    outlier_stride: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """Adds outlier_weight outlier^T to y, `[BLOCK_N, BLOCK_M]`, float32."""
    columns = tl.arange(0, BLOCK_R)
    # Clamped in other words than in the main loop: were it the same expression, the compiler would compute it before
    # that loop, in this one's layout, and carry it along in registers.
    m = first_m + tl.arange(0, y.shape[1])
    m = tl.where(m < tokens, m, tokens - 1)
    n = first_n + tl.arange(0, y.shape[0])
    n = tl.where(n < outputs, n, outputs - 1)
    outlier_rows = outlier + m.to(tl.int64)[:, None] * outlier_stride + columns[None, :]
    weight_rows = outlier_weight + n.to(tl.int64)[:, None] * rank + columns[None, :]
    for start in tl.range(0, rank, BLOCK_R, num_stages=2):
        inside = (start + columns < rank)[None, :]
        weight = tl.load(weight_rows + start, mask=inside, other=0.0)
        coordinates = tl.load(outlier_rows + start, mask=inside, other=0.0)
        y = tl.dot(weight, tl.trans(coordinates), y, input_precision="ieee", out_dtype=tl.float32)
    return y


@triton.jit
def _store_outlier_product(
    slabs: tl.tensor,
    outlier: tl.tensor,
    outlier_weight: tl.tensor,
    first_m: tl.tensor,
    first_n: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    rank: tl.tensor,
    outlier_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """Leaves the outlier product after the SPLIT_K slabs of partial sums, for the program that finishes the tile."""
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    product = _add_outliers(
        product, outlier, outlier_weight, first_m, first_n, tokens, outputs, rank, outlier_stride, BLOCK_R
    )
    # Transposed: the places of the partial sums are computed again after the main loop, not kept during it.
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = first_m + tl.arange(0, BLOCK_M) < tokens
    product = tl.trans(product.to(tl.int32, bitcast=True))
    tl.store(slabs + SPLIT_K * (BLOCK_M * BLOCK_N) + place, product, mask=inside[:, None])


@triton.jit
def _add_partial_sums(
    slabs: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    total: tl.tensor,
    SPLIT_K: tl.constexpr,
    UNROLLED_SLAB: tl.constexpr,
) -> tl.tensor:
    """The sum of what the programs of a tile have written, in their order; shape and dtype of `total`."""
    SLAB: tl.constexpr = total.shape[0] * total.shape[1]
    total = tl.zeros(total.shape, total.dtype)
    if SLAB <= UNROLLED_SLAB:
        for part in tl.static_range(SPLIT_K):  # all loads at once: the wait is what costs in a small tile
            partial = tl.load(slabs + part * SLAB + place, mask=inside, other=0, cache_modifier=".cg")
            total += partial.to(total.dtype, bitcast=True)
    else:
        for part in range(SPLIT_K):
            partial = tl.load(slabs + part * SLAB + place, mask=inside, other=0, cache_modifier=".cg")
            total += partial.to(total.dtype, bitcast=True)
    return total


@triton.jit
def _apply_common_scales(
    total: tl.tensor,
    x_scale: tl.tensor,
    row_sum: tl.tensor,
    weight_scale: tl.tensor,
    zero_point: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    X_GROUPED: tl.constexpr,
    WEIGHT_GROUPED: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """What `scaled_block` has not done: the zero point without groups, and the scales that all groups share."""
    if not (X_GROUPED or WEIGHT_GROUPED):
        total = total >> SHIFT
        if zero_point is not None:
            zero = tl.load(zero_point + n).to(tl.int32)
            total -= zero[:, None] * tl.load(row_sum + m)[None, :]
    result = total.to(tl.float32)
    if not X_GROUPED:
        result = result * tl.load(x_scale + m)[None, :]
    if not WEIGHT_GROUPED:
        result = result * tl.load(weight_scale + n).to(tl.float32)[:, None]
    return result


@triton.jit(do_not_specialize=("tokens",))
def linear_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    row_sum: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    zero_point: tl.tensor,
    outlier: tl.tensor,
    outlier_weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    workspace: tl.tensor,
    counters: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    outlier_stride: tl.tensor,
    rank: tl.tensor,
    x_groups: tl.tensor,
    weight_groups: tl.tensor,
    groups: tl.tensor,
    blocks_per_group: tl.tensor,
    NIBBLES: tl.constexpr,
    X_PACKED: tl.constexpr,
    X_GROUPED: tl.constexpr,
    WEIGHT_GROUPED: tl.constexpr,
    GROUP_MASK: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNROLLED_SLAB: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """One tile of y^T, `[BLOCK_N, BLOCK_M]`, over one of SPLIT_K ranges of the inputs.

    The tile is transposed because a Hopper tensor core reads its left operand, and only that one, from registers.
    """
    GROUPED: tl.constexpr = X_GROUPED or WEIGHT_GROUPED
    SHIFT: tl.constexpr = 4 * NIBBLES + 4 * X_PACKED
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_m, first_n = _tile_origin(tile, tokens, outputs, BLOCK_M, BLOCK_N, BAND)
    # Rows beyond the edge repeat the last one, and are not stored.
    m = tl.minimum(first_m + tl.arange(0, BLOCK_M), tokens - 1)
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N), outputs - 1)

    packed_columns = tl.arange(0, BLOCK_K // 2 if NIBBLES or X_PACKED else BLOCK_K)
    columns = packed_columns // HALF * CHUNK + packed_columns % HALF if NIBBLES or X_PACKED else packed_columns
    x_rows = x + m.to(tl.int64)[:, None] * x_stride + (packed_columns if X_PACKED else columns)[None, :]
    weight_rows = weight + n.to(tl.int64)[:, None] * weight_stride + (packed_columns if NIBBLES else columns)[None, :]

    SLAB: tl.constexpr = BLOCK_M * BLOCK_N
    if SPLIT_K > 1:
        slabs = workspace + tile.to(tl.int64) * ((SPLIT_K + (outlier is not None)) * SLAB)
        if outlier is not None:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
            if split == 0:
                _store_outlier_product(
                    slabs, outlier, outlier_weight, first_m, first_n, tokens, outputs, rank, outlier_stride,
                    BLOCK_M, BLOCK_N, BLOCK_R, SPLIT_K,
                )  # fmt: skip

    blocks = groups * blocks_per_group
    blocks_per_split = tl.cdiv(blocks, SPLIT_K)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUPED else tl.int32)
    for block in range(first, last):
        if GROUPED:
            total += scaled_block(
                block, x_rows, weight_rows, x_scale, row_sum, weight_scale, zero_point, m, n, inputs, weight_stride,
                x_groups, weight_groups, groups, blocks_per_group, NIBBLES, X_PACKED, X_GROUPED, WEIGHT_GROUPED,
                GROUP_MASK, MASK, BLOCK_M, BLOCK_N, BLOCK_K, SHIFT, CHUNK, HALF, ASM,
            )  # fmt: skip
        else:
            total = add_block(
                total, x_rows, weight_rows, block * BLOCK_K, 0, inputs, inputs, weight_stride,
                NIBBLES, X_PACKED, GROUP_MASK, MASK, BLOCK_K, CHUNK, HALF, ASM,
            )  # fmt: skip

    if SPLIT_K > 1:
        place = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        inside = (first_m + tl.arange(0, BLOCK_M) < tokens)[None, :]
        tl.store(slabs + split * SLAB + place, total.to(tl.int32, bitcast=True), mask=inside)
        tl.debug_barrier()  # the stores of all threads come before the arrival that one thread announces
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived < SPLIT_K - 1:
            return
        tl.store(counters + tile, 0)
        total = _add_partial_sums(slabs, place, inside, total, SPLIT_K, UNROLLED_SLAB)

    result = _apply_common_scales(
        total, x_scale, row_sum, weight_scale, zero_point, m, n, X_GROUPED, WEIGHT_GROUPED, SHIFT
    )
    if outlier is not None:
        if SPLIT_K > 1:
            product = tl.load(slabs + SPLIT_K * SLAB + place, mask=inside, other=0, cache_modifier=".cg")
            result += product.to(tl.float32, bitcast=True)
        else:
            result = _add_outliers(
                result, outlier, outlier_weight, first_m, first_n, tokens, outputs, rank, outlier_stride, BLOCK_R
            )
    if bias is not None:
        result += tl.load(bias + n).to(tl.float32)[:, None]
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    y_pointers = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y_pointers, tl.trans(result.to(y.dtype.element_ty)), mask=(m < tokens)[:, None] & (n < outputs)[None, :])


@triton.jit
def row_sum_kernel(
    x: tl.tensor,
    row_sum: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    groups: tl.tensor,
    X_PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Sum of one group of one token, int32: what a zero point is multiplied with."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    size = inputs // groups
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        column = group * size + offsets
        if X_PACKED:
            byte = tl.load(x + token * x_stride + column // CHUNK * HALF + column % HALF, mask=offsets < size, other=0)
            shift = 4 - 4 * (column // HALF % 2)
            value = (byte.to(tl.int32) << (24 + shift)) >> 28
        else:
            value = tl.load(x + token * x_stride + column, mask=offsets < size, other=0).to(tl.int32)
        total += value
    tl.store(row_sum + token * groups + group, tl.sum(total))
