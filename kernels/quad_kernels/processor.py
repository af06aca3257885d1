"""What the processor multiplies fast, and products that go round what it does not."""

import os
from functools import lru_cache

import torch

_LIMIT = "ONEDNN_MAX_CPU_ISA"
_ROWS = 4096  # of a matrix that are widened at a time: small enough to stay in the cache until their product


def multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether `device` multiplies bfloat16 faster than float32.

    A processor without instructions for bfloat16 emulates them: with AVX2 products took 5 to 7 times float32's time.
    """
    if device.type == "cpu":
        return _cpu_multiplies_bfloat16(os.environ.get(_LIMIT, "").upper())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns x weight^T, `[..., out]`, dtype of `x`.

    Of bfloat16 it is computed in float32, some rows of the weight at a time, where that is faster. The sum is float32
    either way and rounded once. Differentiable.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`, dtype of `x`.
    """
    slow = x.dtype == torch.bfloat16 and x.is_cpu and not torch.compiler.is_compiling()
    if not slow or multiplies_bfloat16(x.device):
        return torch.nn.functional.linear(x, weight)
    wide = x.float()
    parts = [torch.nn.functional.linear(wide, part.float()).to(x.dtype) for part in weight.split(_ROWS)]
    return torch.cat(parts, dim=-1)


@lru_cache
def _cpu_multiplies_bfloat16(limit: str) -> bool:
    """`limit` is the largest instruction set that oneDNN, which computes the products, may use."""
    if limit not in ("", "ALL", "DEFAULT") and not any(name in limit for name in ("BF16", "FP16", "AMX")):
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not found:  # torch before 2.11 does not tell
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
