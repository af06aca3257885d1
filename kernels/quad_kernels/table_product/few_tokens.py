"""On the CPU, PyTorch's own weight-only int8 product is the fastest of its products for a few tokens."""

import torch

from quad_kernels.table_product import reference

_FEW_TOKENS = 8
_COLUMNS = 64  # that product reads whole vectors: past the end of a row of any other width


def table_product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See `quad_kernels.table_product`; `x` is `[tokens, columns]`."""
    few = x.shape[0] <= _FEW_TOKENS and x.shape[1] % _COLUMNS == 0
    if not few or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return reference.table_product(x, words, scale)
    return reference.by_slices(x, words, scale, _product)


def _product(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), integers, scale.to(x.dtype))
