"""Launches of the Triton kernel of the Hadamard transform."""

from functools import lru_cache

import torch
import triton

from quad_kernels.early_launch import starts_early
from quad_kernels.formats import InputQuantization, InputSplit
from quad_kernels.hadamard.construct import plan_hadamard
from quad_kernels.hadamard.kernel import hadamard_kernel
from quad_kernels.hadamard.tiling import Tiling, factors, tiling

_ELEMENTS_PER_MULTIPROCESSOR = 32768  # two programs of the largest tile: what fits into registers beside each other
_SCRATCH_BYTES = 12 * 1024  # shared memory beside the left factor and the input: right factor, reductions, layouts
_INTERPRETED_PROGRAMS = 2


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
        left, right = factors(plan, tiles, torch.float16 if x.dtype == torch.float16 else torch.bfloat16, x.device)
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
            SYMMETRIC=quantization is None or quantization.symmetric,
            RANK=triton.next_power_of_2(split.rank) if split.rank else 0,
            NEXT_EARLY=starts_early(x.device),
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
