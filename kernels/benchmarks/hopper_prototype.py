"""A candidate for many tokens on Hopper, which no GPU has run yet: products that wait for nothing but the ones before.

PYTHONPATH=kernels python -m benchmarks.hopper_prototype --shapes 28672x4096 4160x14336 --output hopper.jsonl

Triton waits for each integer product of tensor cores before it starts the next one. Gluon, Triton's lower language,
does not: here a block's two products are under way while the next block's nibbles are unpacked, in other registers
(`_keep` holds those of a product until it is done), and blocks come through the bulk copy engine. If it is as fast as
its machine code looks, it becomes a configuration of `quad_kernels.integer_linear`; until then nothing else uses it.
Each configuration is compared with the Triton kernel first.
"""

# mypy: ignore-errors

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from quad_kernels import LinearOperands
from quad_kernels.whole_numbers import ceil_div
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from benchmarks.sweep import operands
from benchmarks.sweeping import keep, median_seconds
from benchmarks.timing import describe

BLOCK_K = 128  # inputs of a step: one chunk of nibbles
HALF = 64
_COPIES = 8


class HopperConfig(NamedTuple):
    """One way to launch the kernel.

    Attributes:
        block_m: tokens per tile.
        block_n: outputs per tile.
        stages: blocks in shared memory.
        band: rows of tiles that run at the same time.
        ahead: whether products of a block go on during the next one; for an even number of blocks.
        warps: warps per program, 4 for each 64 outputs or 128.
    """

    block_m: int
    block_n: int
    stages: int
    band: int
    ahead: bool
    warps: int


CONFIGS = [
    HopperConfig(block_m, block_n, stages, band, ahead, warps)
    for block_m, block_n, stages, warps in (
        (128, 128, 4, 4),
        (128, 128, 3, 4),
        (256, 128, 4, 8),
        (256, 128, 3, 8),
        (128, 256, 4, 8),
        (256, 64, 3, 4),
    )
    for ahead in (True, False)
    for band in (8, 16)
]


@gluon.jit
def _low(packed):
    """16 times the low nibbles."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r",
        [packed],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _high(packed):
    """16 times the high nibbles."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def _keep(weights):
    """Registers that a product reads may not be used again before it is done; the compiler does not know that."""
    gl.inline_asm_elementwise("// $0 $1", "=r,r", [weights], dtype=gl.int8, is_pure=False, pack=4)


@gluon.jit
def _fill(x_desc, w_desc, x_blocks, w_blocks, ready, stage, first_m, first_n, block, wanted, BYTES: gl.constexpr):
    """Begins to copy a block into a stage."""
    barrier = ready.index(stage)
    mbarrier.expect(barrier, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(x_desc, [first_m, block * 128], barrier, x_blocks.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(w_desc, [first_n, block * 64], barrier, w_blocks.index(stage), pred=wanted)


@gluon.jit
def _multiply(low, high, x, sums):
    """Begins both products of a block."""
    sums = warpgroup_mma(low, x.slice(0, 64, dim=1).permute((1, 0)), sums, is_async=True)
    return warpgroup_mma(high, x.slice(64, 64, dim=1).permute((1, 0)), sums, is_async=True)


@gluon.jit
def _begin(x_blocks, w_blocks, ready, stage, phase, sums, WEIGHTS: gl.constexpr):
    """Unpacks the block of a stage once it is there, and begins its products."""
    mbarrier.wait(ready.index(stage), phase)
    packed = w_blocks.index(stage).load(WEIGHTS)
    low = _low(packed)
    high = _high(packed)
    return low, high, _multiply(low, high, x_blocks.index(stage), sums)


@gluon.jit
def _refill(
    x_desc, w_desc, x_blocks, w_blocks, ready, stage, first_m, first_n, block, blocks,
    STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Fills the stage before this one, which every warp has done with, with the block STAGES - 1 further on."""
    gl.thread_barrier()
    free = gl.where(stage == 0, STAGES - 1, stage - 1)
    following = block + STAGES - 1
    _fill(x_desc, w_desc, x_blocks, w_blocks, ready, free, first_m, first_n, following, following < blocks, BYTES)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage of the next block, and the phase of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def hopper_kernel(
    x_desc,
    w_desc,
    outlier_desc,
    outlier_weight_desc,
    y_desc,
    x_scale,
    weight_scale,
    tokens,
    outputs,
    blocks,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
    RANK: gl.constexpr,
    AHEAD: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One tile of y^T, `[BLOCK_N, BLOCK_M]`, as in `quad_kernels.integer_linear.kernel`."""
    WIDTH: gl.constexpr = min(BLOCK_M, 128)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, WIDTH, 32]
    )
    RESULT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, WIDTH, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=4)
    x_blocks = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_blocks = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N, 64], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    outliers_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    mbarrier.init(outliers_ready, count=1)
    fence_async_shared()

    tile = gl.program_id(0)
    tiles_n = gl.cdiv(outputs, BLOCK_N)
    band = tile // (BAND * tiles_n)
    height = gl.minimum(gl.cdiv(tokens, BLOCK_M) - band * BAND, BAND)
    within = tile - band * BAND * tiles_n
    first_m = (band * BAND + within % height) * BLOCK_M
    first_n = within // height * BLOCK_N

    BYTES: gl.constexpr = BLOCK_M * 128 + BLOCK_N * 64
    for s in gl.static_range(STAGES - 1):
        _fill(x_desc, w_desc, x_blocks, w_blocks, ready, s, first_m, first_n, s, s < blocks, BYTES)
    sums = gl.zeros((BLOCK_N, BLOCK_M), gl.int32, layout=SUMS)
    stage = 0
    phase = 0
    if AHEAD:
        low_0, high_0, sums = _begin(x_blocks, w_blocks, ready, 0, 0, sums, WEIGHTS)
        last = STAGES - 1
        _fill(x_desc, w_desc, x_blocks, w_blocks, ready, last, first_m, first_n, last, last < blocks, BYTES)
        stage = 1
        # Two blocks a turn, each with registers of its own: no copy of one that a product reads.
        for block in range(1, blocks - 1, 2):
            low_1, high_1, sums = _begin(x_blocks, w_blocks, ready, stage, phase, sums, WEIGHTS)
            sums = warpgroup_mma_init(warpgroup_mma_wait(2, deps=[sums]))
            _keep(low_0)
            _keep(high_0)
            _refill(x_desc, w_desc, x_blocks, w_blocks, ready, stage, first_m, first_n, block, blocks, STAGES, BYTES)
            stage, phase = _next(stage, phase, STAGES)
            low_0, high_0, sums = _begin(x_blocks, w_blocks, ready, stage, phase, sums, WEIGHTS)
            sums = warpgroup_mma_init(warpgroup_mma_wait(2, deps=[sums]))
            _keep(low_1)
            _keep(high_1)
            _refill(
                x_desc, w_desc, x_blocks, w_blocks, ready, stage, first_m, first_n, block + 1, blocks, STAGES, BYTES
            )
            stage, phase = _next(stage, phase, STAGES)
        low_1, high_1, sums = _begin(x_blocks, w_blocks, ready, stage, phase, sums, WEIGHTS)
        sums = warpgroup_mma_wait(0, deps=[sums])
        _keep(low_0)
        _keep(high_0)
        _keep(low_1)
        _keep(high_1)
    else:
        for block in range(blocks):
            low_0, high_0, sums = _begin(x_blocks, w_blocks, ready, stage, phase, sums, WEIGHTS)
            _refill(x_desc, w_desc, x_blocks, w_blocks, ready, stage, first_m, first_n, block, blocks, STAGES, BYTES)
            sums = warpgroup_mma_wait(0, deps=[sums])
            _keep(low_0)
            _keep(high_0)
            stage, phase = _next(stage, phase, STAGES)
    gl.thread_barrier()

    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
    token_scale = gl.load(x_scale + m, mask=m < tokens, other=0.0)
    channel_scale = gl.load(weight_scale + n, mask=n < outputs, other=0.0).to(gl.float32)
    result = (sums >> 4).to(gl.float32) * token_scale[None, :] * channel_scale[:, None]
    result = gl.convert_layout(result, RESULT)
    if RANK > 0:
        coordinates = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, RANK], outlier_desc.layout)
        weights = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_N, RANK], outlier_weight_desc.layout)
        mbarrier.expect(outliers_ready, (BLOCK_M + BLOCK_N) * RANK * 2)
        tma.async_copy_global_to_shared(outlier_desc, [first_m, 0], outliers_ready, coordinates)
        tma.async_copy_global_to_shared(outlier_weight_desc, [first_n, 0], outliers_ready, weights)
        mbarrier.wait(outliers_ready, 0)
        result = warpgroup_mma(weights, coordinates.permute((1, 0)), result, is_async=True)
        result = warpgroup_mma_wait(0, deps=[result])
    y = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], y_desc.layout)
    y.permute((1, 0)).store(result.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(y_desc, [first_m, first_n], y)
    tma.store_wait(0)


def launch(given: LinearOperands, config: HopperConfig) -> torch.Tensor:
    """The product of nibbles with bfloat16 outliers, `[tokens, out]`; without bias, groups and zero points."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def described(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        bits = 8 * tensor.element_size()
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * bits // 8), element_bitwidth=bits, rank=2)
        return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)

    weight, (tokens, inputs) = given.weight, given.x.shape
    y = torch.empty(tokens, weight.out_features, dtype=torch.bfloat16, device=given.x.device)
    rank = given.outlier.shape[1]
    grid = (ceil_div(tokens, config.block_m) * ceil_div(weight.out_features, config.block_n),)
    hopper_kernel[grid](
        described(given.x, config.block_m, BLOCK_K),
        described(weight.integers, config.block_n, HALF),
        described(given.outlier, config.block_m, rank),
        described(given.outlier_weight, config.block_n, rank),
        described(y, config.block_m, config.block_n),
        given.x_scale,
        weight.scale,
        tokens,
        weight.out_features,
        inputs // BLOCK_K,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        BAND=config.band,
        RANK=rank,
        AHEAD=config.ahead and inputs // BLOCK_K % 2 == 0,
        num_warps=config.warps,
    )
    return y


def difference(config: HopperConfig, shape: tuple[int, int, int] = (300, 320, 1024)) -> float | str:
    """Largest difference from the Triton kernel over its largest result, or why there is none."""
    from quad_kernels.integer_linear.launch import integer_linear

    try:
        given = operands(*shape, 64, "nibbles", torch.device("cuda:0"))
        wanted, got = integer_linear(given).float(), launch(given, config).float()
        return float((got - wanted).abs().max() / wanted.abs().max())
    except Exception as error:
        return describe(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hopper_prototype",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=["28672x4096", "4160x14336", "6144x4096"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--seconds", type=float, default=40.0, help="after which no further configuration is measured")
    parser.add_argument("--output", type=Path, help="a file of JSON lines")
    options = parser.parse_args(argv)
    from quad_kernels.integer_linear.launch import integer_linear

    start, rows, device = time.monotonic(), [], torch.device("cuda:0")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(zip(CONFIGS, pool.map(difference, CONFIGS), strict=True))
    right = [config for config in CONFIGS if isinstance(found[config], float) and found[config] < 0.01]
    for config in CONFIGS:
        print(tuple(config), found[config], "" if config in right else "WRONG", flush=True)
    for shape in options.shapes:
        outputs, inputs = map(int, shape.split("x"))
        for tokens in options.tokens:
            first = operands(tokens, outputs, inputs, 64, "nibbles", device)
            copies = [first] + [
                replace(first, weight=replace(first.weight, integers=first.weight.integers.clone()))
                for _ in range(_COPIES - 1)
            ]
            calls = {"triton": integer_linear} | {str(tuple(c)): partial(launch, config=c) for c in right}
            for name, call in calls.items():
                if time.monotonic() - start > options.seconds:
                    break
                seconds = median_seconds(lambda i, call=call, copies=copies: call(copies[i]), _COPIES)
                rows.append({"tokens": tokens, "shape": shape, "config": name, "seconds": seconds})
            here = [row for row in rows if (row["tokens"], row["shape"]) == (tokens, shape)]
            for row in sorted(here, key=lambda row: row["seconds"])[:5]:
                rate = 2 * tokens * outputs * inputs / row["seconds"] / 1e12
                print(
                    f"{tokens} x {shape} {row['config']}: {row['seconds'] * 1e6:.1f} us, {rate:.0f} TOP/s", flush=True
                )
    keep(rows, options.output)
    return 0 if len(right) == len(CONFIGS) else 1


if __name__ == "__main__":
    sys.exit(main())
