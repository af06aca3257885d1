"""Embedding and head as 8-bit tables: one row of integers and one scale per entry of the vocabulary.

On a small model these two are most of the checkpoint. They stay in the words of the checkpoint, which both a look-up
and the head's product read.
"""

import torch
from quad_kernels import table_product
from quad_kernels.packing import pack_int32
from quad_kernels.table_product.reference import unpack_bytes
from torch import nn

BITS = 8


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
        return unpack_bytes(self.weight_packed[rows], self.columns)

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
        integers = unpack_bytes(nn.functional.embedding(ids, self.weight_packed), self.columns)
        scale = nn.functional.embedding(ids, self.weight_scale)
        return (integers.float() * scale.float()).to(scale.dtype)


class PackedHead(PackedTable):
    """Stands in for the head, an `nn.Linear` without bias: weight-only, y = (x V^T) * scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., rows]` for `[..., columns]`, in the dtype of `x`."""
        return table_product(x, self.weight_packed, self.weight_scale)


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
        table = self.__dict__["table"]
        return table_product(x, table.weight_packed, table.weight_scale)
