"""Embedding and head as 8-bit tables: one row of integers and one scale per entry of the vocabulary.

On a small model these two are most of the checkpoint. They stay in the words of the checkpoint, which both a look-up
and the head's product read.
"""

import torch
from quad_kernels import table_product
from quad_kernels.packing import pack_int32
from quad_kernels.table_product.reference import unpack_bytes
from torch import nn

from quad_modifiers.nn.computed_weight import ComputedWeight
from quad_modifiers.nn.packed_shapes import refuse_other_shape

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
        self.register_load_state_dict_pre_hook(refuse_other_shape)
        self._name_sizes()

    def _name_sizes(self) -> None:
        """Sets the sizes under the names that the stock module has for them."""

    def fill(self, start: int, integers: torch.Tensor, scale: torch.Tensor) -> None:
        """Stores rows from `start` on: integers `[n, columns]`, int8, and scales `[n, 1]`."""
        rows = slice(start, start + len(integers))
        self.weight_packed[rows] = pack_int32(integers, BITS)
        self.weight_scale[rows] = scale.to(self.weight_scale)

    def resize(self, rows: int) -> None:
        """Cuts rows off at the end, or adds unset ones, which `fill` sets."""
        kept, old = min(rows, self.rows), (self.weight_packed, self.weight_scale)
        self.weight_packed, self.weight_scale = (tensor.new_empty(rows, tensor.shape[1]) for tensor in old)
        self.weight_packed[:kept], self.weight_scale[:kept] = (tensor[:kept] for tensor in old)
        self.weight_shape = self.weight_shape.new_tensor([rows, self.columns])
        self.rows = rows
        self._name_sizes()

    def integers(self, rows: slice) -> torch.Tensor:
        """Unpacks some rows, `[n, columns]`, int8."""
        return unpack_bytes(self.weight_packed[rows], self.columns)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in floating point, for code that expects a stock module; computed anew at every access."""
        values = (self.integers(slice(None)).float() * self.weight_scale.float()).to(self.weight_scale.dtype)
        return ComputedWeight.of(
            values,
            f"the weight of a {type(self).__name__} is computed from its 8-bit integers at every access, so that what "
            "is written to it is lost; use fill, load_state_dict or resize_token_embeddings, or load the model with "
            "dequantize=True",
        )

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{self.rows}, {self.columns}, bits={BITS}"


class PackedEmbedding(PackedTable):
    """Stands in for `nn.Embedding`: dequantizes the rows that are looked up."""

    padding_idx = None

    def _name_sizes(self) -> None:
        self.num_embeddings, self.embedding_dim = self.rows, self.columns

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns `[..., columns]` for ids `[...]`, in the dtype of the scales."""
        integers = unpack_bytes(nn.functional.embedding(ids, self.weight_packed), self.columns)
        scale = nn.functional.embedding(ids, self.weight_scale)
        return (integers.float() * scale.float()).to(scale.dtype)


class PackedHead(PackedTable):
    """Stands in for the head, an `nn.Linear` without bias: weight-only, y = (x V^T) * scale."""

    bias = None

    def _name_sizes(self) -> None:
        self.in_features, self.out_features = self.columns, self.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., rows]` for `[..., columns]`, in the dtype of `x`."""
        return table_product(x, self.weight_packed, self.weight_scale)


class TiedHead(nn.Module):
    """A head that reads the table of the embedding, and has no tensors of its own."""

    bias = None

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.read(embedding)

    def read(self, embedding: PackedEmbedding) -> None:
        """Reads the table of an embedding from now on; again when its size has changed."""
        self.__dict__["table"] = embedding  # no child: its tensors must not appear twice in a state dict
        self.in_features, self.out_features = embedding.columns, embedding.rows

    @property
    def table(self) -> PackedEmbedding:
        """The embedding."""
        embedding: PackedEmbedding = self.__dict__["table"]
        return embedding

    @property
    def weight(self) -> torch.Tensor:
        """See `PackedTable.weight`."""
        return self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `PackedHead.forward`."""
        return table_product(x, self.table.weight_packed, self.table.weight_scale)


def is_packed(module: nn.Module) -> bool:
    """Returns whether an embedding or head is quantized."""
    return isinstance(module, (PackedTable, TiedHead))


def dense_table(module: nn.Module) -> torch.Tensor:
    """Returns the table of an embedding or head, packed or not, `[rows, columns]`, float64."""
    if isinstance(module, TiedHead):
        module = module.table
    if isinstance(module, PackedTable):
        return module.integers(slice(None)).double() * module.weight_scale.double()
    table: torch.Tensor = module.weight.detach().double()
    return table
