"""Embedding and head as 8-bit tables: one row of integers and one scale per entry of the vocabulary.

On a small model these two are most of the checkpoint. They stay in the words of the checkpoint; a look-up unpacks the
rows it needs, and the head unpacks a slice of rows at a time, small enough to stay in the cache until its product.
"""

import torch
from quad_kernels.packing import pack_int32
from torch import nn

BITS = 8
_SLICE = 4096  # rows of the vocabulary at a time
_FEW_TOKENS = 8  # up to here PyTorch's weight-only int8 product is faster than a matrix product in the model's dtype
_INT8_COLUMNS = 64  # that product reads whole vectors: past the end of a row of any other width
_FLIP = -0x7F7F7F80  # 0x80808080: in each byte, from the stored offset of 128 to two's complement


class PackedTable(nn.Module):
    """A table of `rows` x `columns` 8-bit integers, packed as compressed-tensors does it, with a scale per row.

    Args:
        rows: entries of the vocabulary.
        columns: width of the residual stream.
        dtype: of the scales.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.register_buffer("weight_packed", torch.empty(rows, -(-columns * BITS // 32), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(rows, 1, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([rows, columns], dtype=torch.int64))

    def fill(self, start: int, integers: torch.Tensor, scale: torch.Tensor) -> None:
        """Stores rows from `start` on: integers `[n, columns]`, int8, and scales `[n, 1]`."""
        rows = slice(start, start + len(integers))
        self.weight_packed[rows] = pack_int32(integers, BITS)
        self.weight_scale[rows] = scale.to(self.weight_scale)

    def integers(self, rows: slice) -> torch.Tensor:
        """Unpacks some rows, `[n, columns]`, int8."""
        return self._unpacked(self.weight_packed[rows])

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        return (words ^ _FLIP).view(torch.int8)[..., : self.columns]

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in floating point, for code that expects a stock module; computed anew at every access."""
        return (self.integers(slice(None)).float() * self.weight_scale.float()).to(self.weight_scale.dtype)

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{self.rows}, {self.columns}, bits={BITS}"


class PackedEmbedding(PackedTable):
    """Stands in for `nn.Embedding`: dequantizes the rows that are looked up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns `[..., columns]` for ids `[...]`, in the dtype of the scales."""
        integers = self._unpacked(nn.functional.embedding(ids, self.weight_packed))
        scale = nn.functional.embedding(ids, self.weight_scale)
        return (integers.float() * scale.float()).to(scale.dtype)


class PackedHead(PackedTable):
    """Stands in for the head, an `nn.Linear` without bias: weight-only, y = (x V^T) * scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., rows]` for `[..., columns]`, in the dtype of `x`."""
        return table_product(x, self)


class TiedHead(nn.Module):
    """A head that reads the table of the embedding, and has no tensors of its own."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.__dict__["table"] = embedding  # no child: its tensors must not appear twice in a state dict

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedTable.weight`."""
        return self.__dict__["table"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `PackedHead.forward`."""
        return table_product(x, self.__dict__["table"])


def table_product(x: torch.Tensor, table: PackedTable) -> torch.Tensor:
    """Returns x V^T times the scale of each row, `[..., rows]` for `[..., columns]`, in the dtype of `x`."""
    flat = x.flatten(0, -2)
    product = _int8_product if _takes_int8_product(flat) else _product
    slices = [slice(start, start + _SLICE) for start in range(0, table.rows, _SLICE)]
    parts = [product(flat, table.integers(rows), table.weight_scale[rows, 0]) for rows in slices]
    return torch.cat(parts, dim=-1).unflatten(0, x.shape[:-1])


def _takes_int8_product(x: torch.Tensor) -> bool:
    few = x.is_cpu and x.shape[0] <= _FEW_TOKENS and x.shape[1] % _INT8_COLUMNS == 0
    differentiable = torch.is_grad_enabled() and x.requires_grad
    return few and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and not differentiable


def _int8_product(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), integers, scale.to(x.dtype))


def _product(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Integers of 8 bits are exact in every floating dtype; the scale comes last, as in the int8 product.
    y = nn.functional.linear(x, integers.to(x.dtype))
    return (y * scale.to(y.dtype) if y.dtype == torch.float64 else y.float() * scale.float()).to(x.dtype)
