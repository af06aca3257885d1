"""Triton kernel of the online Hadamard transform, alone or with the quantizer behind it; see the README."""

# Tuples of tiles grow in the unrolled loops of the kernel: no static type follows them, and Triton knows no (*a, b).
# mypy: disable-error-code="assignment, misc, unreachable"
# ruff: noqa: RUF005

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from quad_kernels.formats import InputQuantization, InputSplit
from quad_kernels.hadamard.construct import HadamardPlan, hadamard_factor, plan_hadamard
from quad_kernels.quantize_activations.kernel import (
    drop_outliers,
    magnitude_bits,
    outlier_source,
    residual_source,
    round_to_grid,
    scale_of,
)

MAX_SIZE = 32768
MAX_LEFT = 512
MAX_SLICES = 8

_TILE = 128
_ELEMENTS_PER_MULTIPROCESSOR = 32768  # two programs of the largest tile: what fits into registers beside each other
_SCRATCH_BYTES = 12 * 1024  # shared memory beside the left factor and the input: right factor, reductions, layouts
_INTERPRETED_PROGRAMS = 2


@dataclass(frozen=True)
class Tiling:
    """How a transform of `left * slices * right` coordinates, read as a matrix per slice, is computed.

    Attributes:
        left: order of the factor multiplied from the left: blocks, Paley orders and some of the power of two.
        slices: order of the factor applied by additions of whole tiles, a power of two.
        right: order of the factor multiplied from the right, a power of two.
        tile: rows of a tile of the result.
        tiles: tiles that cover `left`.
        depth: rows of the input multiplied at a time.
        steps: multiples of `depth` that cover `left`.
    """

    left: int
    slices: int
    right: int
    tile: int
    tiles: int
    depth: int
    steps: int

    @property
    def elements(self) -> int:
        """Coordinates of the tiles, padding included."""
        return self.tiles * self.tile * self.slices * self.right


@lru_cache(maxsize=64)
def tiling(plan: HadamardPlan) -> Tiling | None:
    """The tiles of a plan, or None if the kernel does not fit it (no power of two, or too large)."""
    power = math.prod(plan.factors[_leading_factors(plan) :])
    left = plan.size // power
    right = min(32, power)
    if plan.size > MAX_SIZE or right < 16:
        return None
    slices = power // right
    while (slices > 1 and 2 * left <= _TILE) or (slices > 2 and left > _TILE):
        left, slices = 2 * left, slices // 2
    if left > MAX_LEFT or slices > MAX_SLICES:
        return None
    if left <= _TILE:
        tile = max(16, triton.next_power_of_2(left))
        return Tiling(left, slices, right, tile, 1, tile, 1)
    tile = min((128, 64), key=lambda size: -(-left // size) * size)
    return Tiling(left, slices, right, tile, -(-left // tile), 64, -(-left // 64))


@lru_cache(maxsize=64)
def _factors(
    plan: HadamardPlan, tiles: Tiling, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs of both factors: the left one transposed and filled up with zeros in `dtype`, the right one in bfloat16."""
    count = plan.size // plan.block
    with torch.inference_mode(False), torch.device("cpu"):
        left = torch.eye(count)
        for order in plan.factors[: _leading_factors(plan)]:
            left = torch.kron(left, _signs(order))
        left = torch.kron(left, _signs(tiles.left // left.shape[0]))
        padded = torch.zeros(tiles.tiles * tiles.tile, tiles.steps * tiles.depth)
        padded[: tiles.left, : tiles.left] = left.T
        return padded.to(device, dtype), _signs(tiles.right).to(device, torch.bfloat16)


def _leading_factors(plan: HadamardPlan) -> int:
    """Number of factors up to the last one that is no power of two."""
    return max((i + 1 for i, order in enumerate(plan.factors) if order & (order - 1)), default=0)


def _signs(order: int) -> torch.Tensor:
    return hadamard_factor(order, torch.float32, torch.device("cpu")).sign()


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
    RANK: tl.constexpr,
) -> None:
    """Transforms every num_programs-th token and, unless BITS is 0, quantizes it."""
    SIZE: tl.constexpr = LEFT * SLICES * RIGHT
    depth = tl.arange(0, DEPTH)
    right_column = tl.arange(0, RIGHT)
    tile_row = tl.arange(0, TILE)
    right = tl.load(right_ptr + right_column[:, None] * RIGHT + right_column[None, :])
    if TILES * STEPS == 1:
        left = tl.load(left_ptr + tile_row[:, None] * DEPTH + depth[None, :])
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        x_row = x_ptr + tl.cast(token, tl.int64) * X_STRIDE
        y_row = y_ptr + tl.cast(token, tl.int64) * SIZE
        if RANK > 0:
            OUTLIER_WIDTH: tl.constexpr = WIDTH // BLOCK * OUTLIERS
            index = tl.arange(0, RANK)
            outlier = tl.load(x_row + outlier_source(index, WIDTH, OUTLIERS, BLOCK), mask=index < OUTLIER_WIDTH)
            outlier_row = outlier_ptr + tl.cast(token, tl.int64) * OUTLIER_WIDTH
            tl.store(outlier_row + index, outlier, mask=index < OUTLIER_WIDTH)

        rounded = ()
        for tile in tl.static_range(TILES):
            parts = ()
            for part in tl.static_range(SLICES):
                acc = tl.zeros([TILE, RIGHT], tl.float32)
                for step in range(STEPS):
                    row = step * DEPTH + depth[:, None]
                    column = (row * SLICES + part) * RIGHT + right_column[None, :]
                    source = residual_source(column, WIDTH, OUTLIERS, BLOCK, KEEP_WIDTH)
                    x = tl.load(x_row + source, mask=row < LEFT, other=0.0)
                    x = drop_outliers(x, column, OUTLIERS, BLOCK, KEEP_WIDTH)
                    if TILES * STEPS > 1:
                        left_row = (tile * TILE + tile_row[:, None]) * (STEPS * DEPTH)
                        left = tl.load(left_ptr + left_row + row.trans(1, 0))
                    acc = _dot_split(left, x, acc, 0, IN_TERMS)
                y = tl.zeros([TILE, RIGHT], tl.float32)
                parts = parts + (_dot_split(acc * normaliser, right, y, OUT_TERMS, 0),)
            # The middle factor, of order SLICES: butterflies between tiles.
            for bit in tl.static_range(3):
                if (1 << bit) < SLICES:
                    sums = ()
                    for part in tl.static_range(SLICES):
                        if (part >> bit) & 1:
                            sums = sums + (parts[part - (1 << bit)] - parts[part],)
                        else:
                            sums = sums + (parts[part] + parts[part + (1 << bit)],)
                    parts = sums
            for part in tl.static_range(SLICES):
                y = parts[part].to(x_ptr.dtype.element_ty)
                if BITS > 0:
                    rounded = rounded + (y,)
                else:
                    out_row = tile * TILE + tile_row[:, None]
                    out_column = (out_row * SLICES + part) * RIGHT + right_column[None, :]
                    tl.store(y_row + out_column, y, mask=out_row < LEFT)

        if BITS > 0:
            largest = magnitude_bits(rounded[0])
            for i in tl.static_range(1, TILES * SLICES):
                largest = tl.maximum(largest, magnitude_bits(rounded[i]))
            scale = scale_of(tl.max(tl.max(largest, 1), 0), clip_ratio, BITS)
            tl.store(scale_ptr + token, scale)
            SMALLEST: tl.constexpr = -(2.0 ** (BITS - 1))
            LARGEST: tl.constexpr = 2.0 ** (BITS - 1) - 1.0
            for tile in tl.static_range(TILES):
                for part in tl.static_range(SLICES):
                    out_row = tile * TILE + tile_row[:, None]
                    out_column = (out_row * SLICES + part) * RIGHT + right_column[None, :]
                    integer = round_to_grid(rounded[tile * SLICES + part], scale, SMALLEST, LARGEST)
                    tl.store(y_row + out_column, integer.to(tl.int8), mask=out_row < LEFT)


def supports(x: torch.Tensor, size: int) -> bool:
    """True if the kernel transforms `size` coordinates of the dtype of `x`."""
    return x.dtype != torch.float64 and tiling(plan_hadamard(size)) is not None


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal transform of `[tokens, n]`, dtype of `x`; `supports(x, n)` must hold."""
    _, y, _ = _launch(x, InputSplit(x.shape[1], hadamard=True), None)
    return y


def hadamard_quantize(
    x: torch.Tensor, quantization: InputQuantization, split: InputSplit
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Outliers, integers (int8) and one scale per token of the transformed residual."""
    outlier, integers, scale = _launch(x, split, quantization)
    assert scale is not None
    return outlier, integers, scale


def _launch(
    x: torch.Tensor, split: InputSplit, quantization: InputQuantization | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    size, tokens = split.residual_width, x.shape[0]
    plan = plan_hadamard(size)
    tiles = tiling(plan)
    assert tiles is not None
    if x.stride(1) != 1:
        x = x.contiguous()
    outlier = torch.empty(tokens, split.rank, dtype=x.dtype, device=x.device) if split.rank else None
    y = torch.empty(tokens, size, dtype=x.dtype if quantization is None else torch.int8, device=x.device)
    scale = None if quantization is None else torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        left, right = _factors(plan, tiles, torch.float16 if x.dtype == torch.float16 else torch.bfloat16, x.device)
        hadamard_kernel[(min(tokens, _programs(x.device, tiles)),)](
            x,
            left,
            right,
            x if outlier is None else outlier,
            y,
            x if scale is None else scale,
            tokens,
            plan.block**-0.5,
            1.0 if quantization is None else quantization.clip_ratio,
            X_STRIDE=x.stride(0),
            WIDTH=split.width,
            OUTLIERS=split.outliers,
            BLOCK=split.block,
            KEEP_WIDTH=split.keep_width,
            LEFT=tiles.left,
            SLICES=tiles.slices,
            RIGHT=tiles.right,
            TILE=tiles.tile,
            TILES=tiles.tiles,
            DEPTH=tiles.depth,
            STEPS=tiles.steps,
            IN_TERMS=3 if x.dtype == torch.float32 else 0,
            OUT_TERMS=3 if x.dtype == torch.float32 else 2,
            BITS=0 if quantization is None else quantization.bits,
            RANK=triton.next_power_of_2(split.rank) if split.rank else 0,
            num_warps=max(1, tiles.tile // 16),
            num_stages=_stages(x.device, tiles, x.element_size()),
            enable_fp_fusion=False,
        )
    return outlier, y, scale


@lru_cache(maxsize=64)
def _programs(device: torch.device, tiles: Tiling) -> int:
    """Programs that take turns with the tokens: as many as run at a time, so that each loads the factors once."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return multiprocessors * max(1, min(8, _ELEMENTS_PER_MULTIPROCESSOR // tiles.elements))


@lru_cache(maxsize=64)
def _stages(device: torch.device, tiles: Tiling, element_size: int) -> int:
    """2 if the next token's input is fetched during a token's arithmetic; two such programs must fit on a processor."""
    if tiles.tiles > 1:
        return 1
    shared = 228 * 1024  # an H100's, for the interpreter and for inspection
    if device.type == "cuda":
        shared = int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
    needed = 2 * tiles.tile * tiles.depth + 2 * tiles.elements * element_size + _SCRATCH_BYTES
    return 2 if 2 * needed <= shared else 1
