"""Rows of token ids from what is tokenized already: tensors, `datasets` tables, DataLoaders."""

from collections.abc import Iterable, Iterator, Mapping
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


def check_vocabulary(rows: Iterable[torch.Tensor], size: int, what: str) -> None:
    """Refuses token ids that a model does not embed.

    Args:
        rows: token ids, any shape.
        size: number of tokens that the model embeds.
        what: the data, for the message.

    Raises:
        ValueError: naming the first row that holds such an id.
    """
    for index, row in enumerate(rows):
        if row.numel() and not 0 <= int(row.min()) <= int(row.max()) < size:
            bad = int(row[(row < 0) | (row >= size)].flatten()[0])
            raise ValueError(
                f"{what} has the token id {bad} (window {index}), but the model embeds the ids 0 to {size - 1}; use "
                "the tokenizer of this model without added tokens, or call model.resize_token_embeddings first"
            )
