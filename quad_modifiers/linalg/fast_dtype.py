"""Which dtype this processor multiplies fastest where float32's precision is not needed."""

import torch
from quad_kernels.processor import multiplies_bfloat16


def fast_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where the device multiplies it faster than float32, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
