"""Triton kernels of the cache entries."""

import torch
import triton
import triton.language as tl

from quad_kernels.triton_grid import magnitude_bits, round_to_grid
from quad_kernels.whole_numbers import ceil_div, next_power_of_2

_COORDINATES_PER_PROGRAM = 2048
_WARPS = 2


@triton.jit
def quantize_kv_kernel(
    x_ptr: tl.tensor,  # [vectors, 2 * HALF]
    integers_ptr: tl.tensor,  # [vectors, HALF] uint8, or in 8 bits [vectors, 2 * HALF]
    scale_ptr: tl.tensor,  # [vectors]
    zero_ptr: tl.tensor,  # [vectors]
    vectors: tl.tensor,
    clip_ratio: tl.tensor,
    margin: tl.tensor,  # (1 - clip_ratio) / 2
    X_STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS vectors; COLUMNS is HALF rounded up to a power of two."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = row < vectors
    valid = in_rows & (column < HALF)
    x_row = x_ptr + row.to(tl.int64) * X_STRIDE
    first = tl.load(x_row + column, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x_row + HALF + column, mask=valid, other=0.0).to(tl.float32)
    magnitude = tl.maximum(magnitude_bits(first), magnitude_bits(second))
    magnitude = tl.max(magnitude, 1, keep_dims=True).to(tl.float32, bitcast=True)
    inside = column < HALF
    low = tl.min(tl.where(inside, tl.minimum(first, second), float("inf")), 1, keep_dims=True)
    high = tl.max(tl.where(inside, tl.maximum(first, second), float("-inf")), 1, keep_dims=True)
    span = high - low
    span = tl.where((magnitude < float("inf")) & (span < float("inf")), span, float("nan"))
    LARGEST: tl.constexpr = 2.0**BITS - 1
    scale = tl.div_rn(span * clip_ratio, LARGEST).to(scale_ptr.dtype.element_ty)
    zero = (low + span * margin).to(zero_ptr.dtype.element_ty)
    tl.store(scale_ptr + row, scale, mask=in_rows)
    tl.store(zero_ptr + row, zero, mask=in_rows)
    scale, zero = scale.to(tl.float32), zero.to(tl.float32)
    first_integer = round_to_grid(first - zero, scale, 0.0, LARGEST) & 0xFF
    second_integer = round_to_grid(second - zero, scale, 0.0, LARGEST) & 0xFF
    if BITS == 8:
        integers_row = integers_ptr + row.to(tl.int64) * (2 * HALF)
        tl.store(integers_row + column, first_integer.to(tl.uint8), mask=valid)
        tl.store(integers_row + HALF + column, second_integer.to(tl.uint8), mask=valid)
    else:
        packed = ((first_integer & 0xF) | ((second_integer & 0xF) << 4)).to(tl.uint8)
        tl.store(integers_ptr + row.to(tl.int64) * HALF + column, packed, mask=valid)


@triton.jit
def dequantize_kv_kernel(
    integers_ptr: tl.tensor,  # [vectors, HALF] uint8, or in 8 bits [vectors, 2 * HALF]
    scale_ptr: tl.tensor,  # [vectors]
    zero_ptr: tl.tensor,  # [vectors]
    x_ptr: tl.tensor,  # [vectors, 2 * HALF]
    vectors: tl.tensor,
    STRIDE: tl.constexpr,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS vectors; COLUMNS is HALF rounded up to a power of two."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    in_rows = row < vectors
    valid = in_rows & (column < HALF)
    integers_row = integers_ptr + row.to(tl.int64) * STRIDE
    integer = tl.load(integers_row + column, mask=valid, other=0).to(tl.int32)
    if BITS == 8:
        second_integer = tl.load(integers_row + HALF + column, mask=valid, other=0).to(tl.int32)
    else:
        second_integer = integer >> 4
        integer = integer & 0xF
    scale = tl.load(scale_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
    x_row = x_ptr + row.to(tl.int64) * (2 * HALF)
    first = integer.to(tl.float32) * scale + zero
    second = second_integer.to(tl.float32) * scale + zero
    tl.store(x_row + column, first.to(x_ptr.dtype.element_ty), mask=valid)
    tl.store(x_row + HALF + column, second.to(x_ptr.dtype.element_ty), mask=valid)


def quantize_kv(
    x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_kv`; `x` is `[vectors, head_dim]`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    vectors, half = x.shape[0], x.shape[1] // 2
    integers = torch.empty(vectors, half * bits // 4, dtype=torch.uint8, device=x.device)
    scale = torch.empty(vectors, dtype=scale_dtype, device=x.device)
    zero = torch.empty(vectors, dtype=scale_dtype, device=x.device)
    if vectors:
        rows, columns = _tile(half)
        quantize_kv_kernel[(ceil_div(vectors, rows),)](
            x,
            integers,
            scale,
            zero,
            vectors,
            clip_ratio,
            (1 - clip_ratio) / 2,
            X_STRIDE=x.stride(0),
            HALF=half,
            BITS=bits,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return integers, scale, zero


def dequantize_kv(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, bits: int = 4
) -> torch.Tensor:
    """See `quad_kernels.dequantize_kv`; `integers` is `[vectors, head_dim / 2]`, in 8 bits `[vectors, head_dim]`."""
    if integers.stride(1) != 1:
        integers = integers.contiguous()
    vectors, half = integers.shape[0], integers.shape[1] * 4 // bits
    x = torch.empty(vectors, 2 * half, dtype=dtype, device=integers.device)
    if vectors:
        rows, columns = _tile(half)
        dequantize_kv_kernel[(ceil_div(vectors, rows),)](
            integers,
            scale.contiguous(),
            zero.contiguous(),
            x,
            vectors,
            STRIDE=integers.stride(0),
            HALF=half,
            BITS=bits,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return x


def _tile(half: int) -> tuple[int, int]:
    columns = next_power_of_2(half)
    return max(1, _COORDINATES_PER_PROGRAM // (2 * columns)), columns
