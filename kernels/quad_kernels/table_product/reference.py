"""Plain PyTorch product with an 8-bit table: some rows at a time are widened to the dtype of the input."""

from collections.abc import Callable

import torch

from quad_kernels import processor

_SLICE = 4096  # rows at a time: small enough to stay in the cache until their product
_FLIP = -0x7F7F7F80  # 0x80808080: in each byte, from the stored offset of 128 to two's complement

SliceProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def unpack_bytes(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns the 8-bit integers of packed rows, `[..., columns]`, int8, from `[..., ceil(columns / 4)]`, int32."""
    return (words ^ _FLIP).view(torch.int8)[..., :columns]


def table_product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """See `quad_kernels.table_product`; `x` is `[tokens, columns]`. Differentiable."""
    return by_slices(x, words, scale, _product)


def by_slices(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, product: SliceProduct) -> torch.Tensor:
    """Joins the products of slices of the table; `product` takes `x`, integers `[n, columns]` and scales `[n]`."""
    rows = words.shape[0]
    slices = [slice(start, start + _SLICE) for start in range(0, rows, _SLICE)]
    parts = [product(x, unpack_bytes(words[part], x.shape[1]), scale[part, 0]) for part in slices]
    return torch.cat(parts, dim=-1)


def _product(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Integers of 8 bits are exact in every floating dtype; the scale comes last.
    y = processor.linear(x, integers.to(x.dtype))
    return (y * scale.to(y.dtype) if y.dtype == torch.float64 else y.float() * scale.float()).to(x.dtype)
