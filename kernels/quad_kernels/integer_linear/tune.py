"""Tuning of the Triton kernel for chosen shapes, before they are served."""

from collections.abc import Iterable

import torch

from quad_kernels.integer_linear.autotune import SECONDS, tune_problem
from quad_kernels.integer_linear.config import Config, Problem, token_bucket
from quad_kernels.integer_linear.launch import Launch
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.weight import QuantizedWeight


def tune(
    shapes: Iterable[tuple[int, int, int]],
    *,
    rank: int = 64,
    group_size: int | None = None,
    weight_bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seconds: float = SECONDS,
) -> dict[Problem, Config]:
    """Measures configurations for the given problems and keeps the fastest in the cache.

    `shapes` are tokens, rounded up to a power of two, output channels and input width. At least one configuration of a
    problem is measured, more within `seconds`.
    """
    device = torch.device(device)
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    tuned, half = {}, 2 ** (weight_bits - 1)
    for tokens, outputs, inputs in shapes:
        tokens = token_bucket(tokens)
        integers = torch.randint(-half, half, (outputs, inputs), dtype=torch.int8, device=device)
        groups = inputs // group_size if group_size else 1
        scale = torch.rand(outputs, groups, device=device).to(dtype)
        operands = LinearOperands(
            x=torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8, device=device),
            x_scale=torch.rand(tokens, 1, device=device),
            weight=QuantizedWeight(integers, scale, None, inputs, outputs, weight_bits).to_layout("nibbles"),
            outlier=torch.randn(tokens, rank, device=device, dtype=dtype) if rank else None,
            outlier_weight=torch.randn(outputs, rank, device=device, dtype=dtype) if rank else None,
            bias=None,
            out_dtype=dtype,
        )
        launch = Launch(operands)
        tuned[launch.problem] = tune_problem(launch.problem, device, launch, seconds)
    return tuned
