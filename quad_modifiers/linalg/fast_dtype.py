"""Which dtype this processor multiplies fastest where float32's precision is not needed."""

import os
from functools import lru_cache

import torch

_LIMIT = "ONEDNN_MAX_CPU_ISA"


def fast_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where the device multiplies it faster than float32, else float32.

    A processor without instructions for bfloat16 emulates them: with AVX2 its products took 7 times float32's time.
    """
    if device.type == "cpu":
        fast = _cpu_multiplies_bfloat16(os.environ.get(_LIMIT, "").upper())
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


@lru_cache
def _cpu_multiplies_bfloat16(limit: str) -> bool:
    """`limit` is the largest instruction set that oneDNN, which computes the products, may use."""
    if limit not in ("", "ALL", "DEFAULT") and not any(name in limit for name in ("BF16", "FP16", "AMX")):
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not found:  # torch before 2.11 does not tell
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
