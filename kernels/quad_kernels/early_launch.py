"""Programmatic dependent launch: a kernel that begins before the one in front of it has ended.

The quantizers let the next kernel begin at once. Only one that is launched so does: the linear layer for few tokens,
which loads weights, then waits for the quantizer to end. All others begin in the order of the stream.
"""

import os

import torch

VARIABLE = "QUAD_KERNELS_EARLY_LAUNCH"


def starts_early(device: torch.device) -> bool:
    """Whether kernels on `device` begin early: with QUAD_KERNELS_EARLY_LAUNCH=1, from compute capability 9.0 on."""
    return (
        os.environ.get(VARIABLE) == "1" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    )
