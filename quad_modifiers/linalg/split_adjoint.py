"""The transpose of what a split makes of an input's residual part."""

import torch
from quad_kernels import InputSplit, apply_hadamard
from quad_kernels.hadamard import plan_hadamard


def unsplit_residual(residual: torch.Tensor, split: InputSplit) -> torch.Tensor:
    """Returns J^T of residual vectors, where J takes an input to its residual part, the online transform included.

    A weight on residual coordinates becomes the one on the unsplit input, with zeros for outliers: W J.

    Args:
        residual: `[..., split.residual_width]`, floating point.
        split: the division.

    Returns:
        `[..., split.width]`, zero at outlier coordinates.
    """
    if split.hadamard:
        residual = apply_hadamard(residual, plan_hadamard(split.residual_width), transpose=True)
    if not split.outliers:
        return residual
    blocks = residual.unflatten(-1, (split.width // split.block, -1))
    if split.keep_width:
        blocks = blocks[..., split.outliers :]
    return torch.nn.functional.pad(blocks, (split.outliers, 0)).flatten(-2)
