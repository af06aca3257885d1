"""Rows of token ids from what is tokenized already: tensors, `datasets` tables, DataLoaders."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset


def dataset_rows(dataset: "Dataset") -> Iterator[torch.Tensor]:
    """Yields the token ids of each row of an already tokenized data set, without padding."""
    for row in dataset:
        yield from unpadded(row["input_ids"], row.get("attention_mask"), "a row of the data set")


def loader_rows(loader: Any) -> Iterator[torch.Tensor]:
    """Yields the token ids of each sample of a DataLoader, without padding."""
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = f"a mapping with {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(f"the DataLoader must yield dicts with 'input_ids', but it yields {found}")
        yield from unpadded(batch["input_ids"], batch.get("attention_mask"), "a batch of the DataLoader")


def unpadded(ids: Any, mask: Any | None, where: str) -> Iterator[torch.Tensor]:
    """Yields each sample of `ids` ([tokens] or [batch, tokens]) as [tokens], int64, masked positions removed."""
    rows = torch.as_tensor(ids)
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise TypeError(f"{where} must hold integer token ids, not {rows.dtype}")
    if rows.dim() not in (1, 2):
        raise ValueError(f"{where} must be [tokens] or [batch, tokens], not {list(rows.shape)}")
    keep = torch.ones_like(rows, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    if keep.shape != rows.shape:
        raise ValueError(f"{where} has input_ids {list(rows.shape)} but attention_mask {list(keep.shape)}")
    for row, kept in zip(torch.atleast_2d(rows), torch.atleast_2d(keep), strict=True):
        if kept.any():
            yield row[kept].to(dtype=torch.int64, device="cpu")
