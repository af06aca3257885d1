"""Triton kernels of the activation quantizer; the README has the layout and the division."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quad_kernels.early_launch import starts_early
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.packing import nibble_bytes, pack_nibbles
from quad_kernels.packing.nibbles import CHUNK
from quad_kernels.triton_grid import (
    above_zero,
    asymmetric_grid,
    below_zero,
    common_scale,
    drop_outliers,
    e2m1_cost,
    e2m1_grid,
    magnitude_bits,
    outlier_source,
    residual_source,
    round_to_grid,
    symmetric_grid,
)
from quad_kernels.whole_numbers import ceil_div, next_power_of_2

MAX_COLUMNS = 32768  # of a row, or of a group of it: one program holds them in its registers

_ELEMENTS_PER_THREAD = 32
_ELEMENTS_PER_PROGRAM = 2048  # short rows share a program up to here


@triton.jit
def _normalise(
    x: tl.tensor, inverse_rms: tl.tensor, weight_ptr: tl.tensor, source: tl.tensor, valid: tl.tensor
) -> tl.tensor:
    y = (x.to(tl.float32) * inverse_rms).to(x.dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + source, mask=valid, other=0.0)
        y = (y.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    return y


@triton.jit
def _sum_of_squares(x: tl.tensor) -> tl.tensor:
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1, keep_dims=True)


@triton.jit
def _inverse_rms(x: tl.tensor, x_2: tl.tensor, outlier: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Of rows of WIDTH coordinates in three parts, the last two of which may be None."""
    total = _sum_of_squares(x)
    if x_2 is not None:
        total += _sum_of_squares(x_2)
    if outlier is not None:
        total += _sum_of_squares(outlier)
    return tl.rsqrt(tl.div_rn(total, WIDTH * 1.0) + eps)


@triton.jit
def _load_tile(
    x_row: tl.tensor,
    start: tl.tensor,
    column: tl.tensor,
    in_rows: tl.tensor,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Columns of a group that begins at `start`, the input coordinates that they are, and which of them exist."""
    valid = in_rows & (column < GROUP)
    source = residual_source(start + column, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH)
    return tl.load(x_row + source, mask=valid, other=0.0), source, valid


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,  # [tokens, WIDTH]
    norm_weight_ptr: tl.tensor,  # [WIDTH] or None
    outlier_ptr: tl.tensor,  # [tokens, outliers of all blocks]
    integers_ptr: tl.tensor,  # [tokens, COLUMNS] int8, or PACKED: [tokens, nibble_bytes(COLUMNS)] uint8
    scale_ptr: tl.tensor,  # [tokens, COLUMNS // GROUP] float32, with MOST [tokens]
    rows: tl.tensor,  # tokens * groups
    clip_ratio: tl.tensor,
    eps: tl.tensor,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MOST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NUMBERS: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RANK: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
) -> None:
    """ROWS rows of one group of one token each, as two tiles of FIRST and SECOND columns; see `_tiles`.

    NUMBERS is `InputQuantization.kernel_format`. With sub-scales up to MOST, 0 without, the rows are all
    groups of one token.
    """
    if NEXT_EARLY:
        gdc_launch_dependents()
    GROUPS: tl.constexpr = COLUMNS // GROUP
    local = tl.arange(0, ROWS)[:, None]
    if MOST > 0:
        row = tl.program_id(0) * GROUPS + local
        in_rows = local < GROUPS
    else:
        row = tl.program_id(0) * ROWS + local
        in_rows = row < rows
    token = (row // GROUPS).to(tl.int64)
    start = row % GROUPS * GROUP
    x_row = x_ptr + token * X_STRIDE

    index = tl.arange(0, FIRST)[None, :]
    column = index // 64 * 128 + index % 64 if PACKED else index
    x, source, valid = _load_tile(x_row, start, column, in_rows, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH, GROUP)
    if SECOND > 0:
        column_2 = column + 64 if PACKED else FIRST + tl.arange(0, SECOND)[None, :]
        x_2, source_2, valid_2 = _load_tile(x_row, start, column_2, in_rows, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH, GROUP)
    if RANK > 0:
        OUTLIER_WIDTH: tl.constexpr = WIDTH // BLOCK * OUTLIERS
        outlier_index = tl.arange(0, RANK)[None, :]
        outlier_valid = in_rows & (start == 0) & (outlier_index < OUTLIER_WIDTH)
        outlier_column = outlier_source(outlier_index, WIDTH, OUTLIERS, BLOCK)
        outlier = tl.load(x_row + outlier_column, mask=outlier_valid, other=0.0)

    if NORM:
        inverse_rms = _inverse_rms(
            x, x_2 if SECOND > 0 else None, outlier if RANK > 0 and not KEEP_WIDTH else None, eps, WIDTH
        )
        x = _normalise(x, inverse_rms, norm_weight_ptr, source, valid)
        if SECOND > 0:
            x_2 = _normalise(x_2, inverse_rms, norm_weight_ptr, source_2, valid_2)
        if RANK > 0:
            outlier = _normalise(outlier, inverse_rms, norm_weight_ptr, outlier_column, outlier_valid)
    if RANK > 0:
        tl.store(outlier_ptr + token * OUTLIER_WIDTH + outlier_index, outlier, mask=outlier_valid)

    x = drop_outliers(x, start + column, OUTLIERS, BLOCK, KEEP_WIDTH)
    largest = tl.max(magnitude_bits(x), 1, keep_dims=True)
    if SECOND > 0:
        x_2 = drop_outliers(x_2, start + column_2, OUTLIERS, BLOCK, KEEP_WIDTH)
        largest = tl.maximum(largest, tl.max(magnitude_bits(x_2), 1, keep_dims=True))
    E2M1: tl.constexpr = NUMBERS > 0
    if E2M1:
        scale, low, high = e2m1_grid(largest, clip_ratio, 12.0, NUMBERS == 2)
        if NUMBERS == 3:
            four, low, high = e2m1_grid(largest, clip_ratio, 8.0, False)
            scale = tl.where(e2m1_cost(x, four) < e2m1_cost(x, scale), four, scale)
    elif SYMMETRIC:
        scale, low, high = symmetric_grid(largest, clip_ratio, BITS)
    else:
        least = tl.min(below_zero(x), 1, keep_dims=True)
        most = tl.max(above_zero(x), 1, keep_dims=True)
        if SECOND > 0:
            least = tl.minimum(least, tl.min(below_zero(x_2), 1, keep_dims=True))
            most = tl.maximum(most, tl.max(above_zero(x_2), 1, keep_dims=True))
        scale, low, high = asymmetric_grid(least, most, largest, clip_ratio, BITS)
    if MOST > 0:
        common, factor = common_scale(tl.max(scale, 0, keep_dims=True), scale, MOST)
        tl.store(scale_ptr + token, common + scale * 0.0, mask=local == 0)
        scale = common * factor
    else:
        tl.store(scale_ptr + row, scale, mask=in_rows)

    integer = round_to_grid(x, scale, low, high, E2M1)
    if PACKED:
        integer = (integer & 0xF) | ((round_to_grid(x_2, scale, low, high, E2M1) & 0xF) << 4)
        BYTES: tl.constexpr = (GROUP + 127) // 128 * 64
        tl.store(integers_ptr + row.to(tl.int64) * BYTES + index, integer.to(tl.uint8), mask=in_rows & (index < BYTES))
    else:
        out_row = integers_ptr + token * COLUMNS + start
        integer = integer.to(tl.int8)
        if MOST > 0:
            integer = (integer * factor).to(tl.int8)
        tl.store(out_row + column, integer, mask=valid)
        if SECOND > 0:
            integer_2 = round_to_grid(x_2, scale, low, high, E2M1).to(tl.int8)
            if MOST > 0:
                integer_2 = (integer_2 * factor).to(tl.int8)
            tl.store(out_row + column_2, integer_2, mask=valid_2)


def _tiles(columns: int, packed: bool) -> tuple[int, int]:
    """Columns of a row's two tiles: powers of two that waste little (11008 = 8192 + 4096 instead of 16384).

    Packed: the coordinates of low and of high nibbles.
    """
    if packed:
        size = next_power_of_2(nibble_bytes(columns))
        return size, size
    whole = next_power_of_2(columns)
    first = whole // 2
    second = next_power_of_2(columns - first) if columns > first else 0
    return (whole, 0) if columns < 128 or second in (0, first) else (first, second)


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit,
    norm: RMSNorm | None,
    packed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_activations`, without the Hadamard; groups, or rows without groups or with sub-scales,
    of up to `MAX_COLUMNS`.
    """
    columns = split.residual_width
    group = quantization.group_size or columns
    if norm is not None and (group != columns or (norm.weight is not None and norm.weight.dtype != x.dtype)):
        x, norm = norm(x), None
    if packed and group != columns and group % CHUNK:
        outlier, integers, scale = quantize_activations(x, quantization, split, norm, packed=False)
        return outlier, pack_nibbles(integers), scale
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, groups = x.shape[0], columns // group
    outlier = torch.empty(tokens, split.rank, dtype=x.dtype, device=x.device) if split.rank else None
    width, dtype = (nibble_bytes(columns), torch.uint8) if packed else (columns, torch.int8)
    integers = torch.empty(tokens, width, dtype=dtype, device=x.device)
    most = quantization.largest_sub_scale
    scale = torch.empty(tokens, 1 if most else groups, dtype=torch.float32, device=x.device)
    if tokens:
        first, second = _tiles(group, packed)
        rows = max(1, _ELEMENTS_PER_PROGRAM // next_power_of_2(first + second))
        if most:
            rows = next_power_of_2(groups)
        warps = max(1, min(32, next_power_of_2(rows * (first + second)) // (32 * _ELEMENTS_PER_THREAD)))
        quantize_kernel[(tokens if most else ceil_div(tokens * groups, rows),)](
            x,
            None if norm is None else norm.weight,
            x if outlier is None else outlier,
            integers,
            scale,
            tokens * groups,
            quantization.clip_ratio,
            0.0 if norm is None else norm.eps,
            X_STRIDE=x.stride(0),
            WIDTH=split.width,
            OUTLIERS=split.outliers,
            BLOCK=split.block,
            KEEP_WIDTH=split.keep_width,
            COLUMNS=columns,
            GROUP=group,
            BITS=quantization.bits,
            MOST=most,
            SYMMETRIC=quantization.symmetric,
            NUMBERS=quantization.kernel_format,
            NORM=norm is not None,
            PACKED=packed,
            ROWS=rows,
            FIRST=first,
            SECOND=second,
            RANK=next_power_of_2(split.rank) if split.rank else 0,
            NEXT_EARLY=starts_early(x.device),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return outlier, integers, scale
