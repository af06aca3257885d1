"""The innermost part of the Triton kernel: a block of inputs, unpacked in registers, multiplied and scaled."""

import triton
import triton.language as tl


@triton.jit
def _sixteen_times_low(
    packed: tl.tensor,
    ASM: tl.constexpr,
) -> tl.tensor:
    """16 times the low nibbles of bytes, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 shifted; shl.b32 shifted, $1, 4; and.b32 $0, shifted, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (packed << 4).to(tl.int8, bitcast=True)


@triton.jit
def _sixteen_times_high(
    packed: tl.tensor,
    ASM: tl.constexpr,
) -> tl.tensor:
    """16 times the high nibbles of bytes, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def _load(
    rows: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    end: tl.tensor,
    MASK: tl.constexpr,
) -> tl.tensor:
    """The block of `rows` that begins `start` columns further on; zeros from column `end` on, if MASK."""
    if MASK:
        return tl.load(rows + start, mask=(start + columns < end)[None, :], other=0)
    else:
        return tl.load(rows + start)


@triton.jit
def add_block(
    sums: tl.tensor,
    x_rows: tl.tensor,
    weight_rows: tl.tensor,
    start: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    inputs: tl.tensor,
    weight_stride: tl.tensor,
    NIBBLES: tl.constexpr,
    X_PACKED: tl.constexpr,
    GROUP_MASK: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Adds W x^T over the inputs from `start` to `start + BLOCK_K`, of a group only those from `low` to `high`."""
    if NIBBLES or X_PACKED:
        packed_columns = tl.arange(0, BLOCK_K // 2)
        columns = packed_columns // HALF * CHUNK + packed_columns % HALF
        packed_start = start // 2
        if NIBBLES:
            packed = _load(weight_rows, packed_start, packed_columns, weight_stride, MASK)
            low_weight = _sixteen_times_low(packed, ASM)
            high_weight = _sixteen_times_high(packed, ASM)
        else:
            low_weight = _load(weight_rows, start, columns, inputs, MASK)
            high_weight = _load(weight_rows, start + HALF, columns, inputs, MASK)
        if X_PACKED:
            packed_end = tl.cdiv(inputs, CHUNK) * HALF
            packed = _load(x_rows, packed_start, packed_columns, packed_end, MASK)
            low_x = _sixteen_times_low(packed, ASM)
            high_x = _sixteen_times_high(packed, ASM)
        else:
            low_x = _load(x_rows, start, columns, high, MASK)
            high_x = _load(x_rows, start + HALF, columns, high, MASK)
        if GROUP_MASK:
            inside = (start + columns >= low) & (start + columns < high)
            low_x = tl.where(inside[None, :], low_x, 0)
            inside = (start + HALF + columns >= low) & (start + HALF + columns < high)
            high_x = tl.where(inside[None, :], high_x, 0)
        sums = tl.dot(low_weight, tl.trans(low_x), sums, out_dtype=tl.int32)
        sums = tl.dot(high_weight, tl.trans(high_x), sums, out_dtype=tl.int32)
    else:
        columns = tl.arange(0, BLOCK_K)
        wide_weight = _load(weight_rows, start, columns, inputs, MASK)
        wide_x = _load(x_rows, start, columns, high, MASK)
        if GROUP_MASK:
            wide_x = tl.where((start + columns >= low)[None, :], wide_x, 0)
        sums = tl.dot(wide_weight, tl.trans(wide_x), sums, out_dtype=tl.int32)
    return sums


@triton.jit
def scaled_block(
    block: tl.tensor,
    x_rows: tl.tensor,
    weight_rows: tl.tensor,
    x_scale: tl.tensor,
    row_sum: tl.tensor,
    weight_scale: tl.tensor,
    zero_point: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    inputs: tl.tensor,
    weight_stride: tl.tensor,
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
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """W x^T over a block of one group, less its zero point, times the scales that have groups; float32."""
    group = block // blocks_per_group
    if GROUP_MASK:
        low = group * (inputs // groups)
        high = low + inputs // groups
        start = (low // BLOCK_K + block % blocks_per_group) * BLOCK_K
    else:
        low = 0
        high = inputs
        start = block * BLOCK_K
    if X_GROUPED:
        x_factor = tl.load(x_scale + m * x_groups + group // (groups // x_groups))
    if WEIGHT_GROUPED:
        factor = tl.load(weight_scale + n * weight_groups + group // (groups // weight_groups))
    if zero_point is not None:
        zero = tl.load(zero_point + n * weight_groups + group // (groups // weight_groups)).to(tl.int32)
        x_sum = tl.load(row_sum + m * groups + group)
        x_sum = tl.where(block % blocks_per_group == 0, x_sum, 0)  # once for a group
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    sums = add_block(
        sums, x_rows, weight_rows, start, low, high, inputs, weight_stride,
        NIBBLES, X_PACKED, GROUP_MASK, MASK, BLOCK_K, CHUNK, HALF, ASM,
    )  # fmt: skip
    sums = sums >> SHIFT
    if zero_point is not None:
        sums -= zero[:, None] * x_sum[None, :]
    scaled = sums.to(tl.float32)
    if X_GROUPED:
        scaled = scaled * x_factor[None, :]
    if WEIGHT_GROUPED:
        scaled = scaled * factor.to(tl.float32)[:, None]
    return scaled
