"""Products of the head and of what is like it: for one position a matter of reading the matrix."""

import torch
from quad_kernels import processor
from quad_kernels.native.lines import DTYPES

_FEW_TOKENS = 8


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns x weight^T, `[..., out]`, dtype of `x`.

    PyTorch's own product reads a bfloat16 matrix at a third of the memory's speed on a processor with AVX2; the native
    kernels read its rows as they are. They take one position of up to 8 sequences, without gradients. For more
    positions such a processor multiplies in float32.

    Args:
        x: `[batch, positions, in]`, or of other dimensions.
        weight: `[out, in]`.
    """
    few = x.dim() == 3 and x.shape[1] == 1 and x.shape[0] <= _FEW_TOKENS
    if few and weight.dtype == torch.bfloat16 and weight.is_contiguous() and runs_natively(x, weight):
        return torch.ops.quad_native.dense_head(x, weight)
    return processor.linear(x, weight)


def runs_natively(*tensors: torch.Tensor) -> bool:
    """True for floating-point tensors on the CPU whose gradients nobody wants."""
    if not tensors[0].is_cpu or tensors[0].dtype not in DTYPES:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
