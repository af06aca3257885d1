"""Launches of the Triton kernel of the Hadamard transform."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from quad_kernels.early_launch import starts_early
from quad_kernels.formats import InputQuantization, InputSplit
from quad_kernels.hadamard.construct import plan_hadamard
from quad_kernels.hadamard.kernel import hadamard_kernel
from quad_kernels.hadamard.tiling import factors, tiling
from quad_kernels.whole_numbers import next_power_of_2

_INTERPRETED_PROGRAMS = 2
_ELEMENTS_PER_MULTIPROCESSOR = 32768  # what programs that take turns hold in registers beside each other
_OTHER_BYTES = 4 * 1024  # shared memory of a program for the right factor, reductions and the system


class Configuration(NamedTuple):
    """How a transform is computed.

    Attributes:
        rows: largest number of rows of a tile of the left factor, 64 or 128.
        right: largest order of the right factor.
        programs: programs per multiprocessor, which take turns with the tokens; 0 for programs of one turn.
        stages: 2 to fetch the input of the next turn during the arithmetic of one.
        registers: most registers of a thread, 0 for what the compiler chooses.
        joined: bytes of a row that are stored together; they go through shared memory.
        loaded: columns that are multiplied by the left factor at a time.
    """

    rows: int = 128
    right: int = 32
    programs: int = 0
    stages: int = 1
    registers: int = 0
    joined: int = 256
    loaded: int = 512


@lru_cache(maxsize=256)
def configuration(device: torch.device, size: int, tokens: int, dtype: torch.dtype) -> Configuration:
    """What a size and a number of tokens are launched with."""
    if dtype == torch.float32:
        return Configuration(loaded=32)
    config = Configuration(rows=64 if size <= 4096 else 128)
    tiles = tiling(plan_hadamard(size), config.rows, config.right)
    if tiles is None or tiles.tiles > 1:
        return Configuration(rows=64, stages=2)
    programs = max(1, min(8, _ELEMENTS_PER_MULTIPROCESSOR // tiles.elements))
    if tokens <= programs * _multiprocessors(device):
        return config
    config = config._replace(programs=programs, joined=64)
    needed = 2 * tiles.tile * tiles.depth + 2 * 2 * tiles.elements + tiles.tile * config.joined + _OTHER_BYTES
    return config._replace(stages=2 if programs * needed <= _shared_memory(device) else 1)


def supports(x: torch.Tensor, size: int) -> bool:
    """True if the kernel transforms `size` coordinates of the dtype of `x`."""
    return x.dtype != torch.float64 and tiling(plan_hadamard(size)) is not None


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal transform of `[tokens, n]`, dtype of `x`; `supports(x, n)` must hold."""
    _, y, _ = _launch(x, InputSplit(x.shape[1], hadamard=True), None, None)
    return y


def hadamard_quantize(
    x: torch.Tensor, quantization: InputQuantization, split: InputSplit, config: Configuration | None = None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Outliers, integers (int8) and one scale per token of the transformed residual."""
    outlier, integers, scale = _launch(x, split, quantization, config)
    assert scale is not None
    return outlier, integers, scale


def _launch(
    x: torch.Tensor, split: InputSplit, quantization: InputQuantization | None, config: Configuration | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    size, tokens = split.residual_width, x.shape[0]
    plan = plan_hadamard(size)
    config = config or configuration(x.device, size, tokens, x.dtype)
    tiles = tiling(plan, config.rows, config.right)
    assert tiles is not None
    if x.stride(1) != 1:
        x = x.contiguous()
    outlier = torch.empty(tokens, split.rank, dtype=x.dtype, device=x.device) if split.rank else None
    y = torch.empty(tokens, size, dtype=x.dtype if quantization is None else torch.int8, device=x.device)
    scale = None if quantization is None else torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        left, right = factors(plan, tiles, torch.float16 if x.dtype == torch.float16 else torch.bfloat16, x.device)
        turns = config.programs > 0 and tiles.tiles * tiles.steps == 1
        programs = tokens
        if turns:
            programs = min(tokens, config.programs * _multiprocessors(x.device))
        options: dict[str, Any] = {"maxnreg": config.registers} if config.registers else {}
        hadamard_kernel[(programs,)](
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
            LOADED=max(tiles.right, min(tiles.slices * tiles.right, config.loaded)),
            JOINED=max(1, min(tiles.slices, config.joined // (y.element_size() * tiles.right))),
            TURNS=turns,
            IN_TERMS=3 if x.dtype == torch.float32 else 0,
            OUT_TERMS=3 if x.dtype == torch.float32 else 2,
            BITS=0 if quantization is None else quantization.bits,
            SYMMETRIC=quantization is None or quantization.symmetric,
            RANK=next_power_of_2(split.rank) if split.rank else 0,
            NEXT_EARLY=starts_early(x.device),
            num_warps=max(1, tiles.tile // 16),
            num_stages=config.stages,
            enable_fp_fusion=False,
            **options,
        )
    return outlier, y, scale


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=8)
def _shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor; an H100's for the interpreter and for inspection."""
    if device.type != "cuda":
        return 228 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
