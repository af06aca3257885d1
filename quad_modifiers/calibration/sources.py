"""Turn what a user calls a data set into documents (strings) or rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from quad_modifiers.text.local_files import LOCAL_SUFFIXES, check_column, local_texts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Splits: TypeAlias = str | Sequence[str] | Mapping[str, str]

_DEFAULT_SPLITS = ("calibration", "train")


def is_local_file(name: str | Path) -> bool:
    """Return whether `name` means a text file here, rather than a data set of the hub or a folder of one."""
    path = Path(name)
    return path.is_file() or (path.suffix.lower() in LOCAL_SUFFIXES and not path.is_dir())


def read_local(name: str | Path, text_column: str) -> list[str]:
    """Return the documents of a local text file; the errors are those of `local_texts`."""
    return local_texts(name, text_column)


def load_named(name: str | Path, config_name: str | None, splits: Splits | None) -> Dataset:
    """Return the named data set, from the hub, its local cache or a local folder.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: it cannot be loaded, or `splits` does not choose one split.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"loading the data set {str(name)!r} needs the package datasets; install it with "
            "`pip install quad-modifiers[compress]`"
        ) from error
    split = chosen_split(splits)
    try:
        loaded = load_dataset(str(name), config_name, split=split)
    except Exception as error:
        # Whatever the loader raises (network, authentication, unknown name), the user needs the same three remedies.
        raise ValueError(
            f"{str(name)!r} is neither a local file nor a data set that can be loaded "
            f"({type(error).__name__}: {error}); correct the name, the dataset_config_name or "
            "the splits, or give a local .txt or .jsonl file"
        ) from error
    return single_split(loaded, None)


def chosen_split(splits: Splits | None) -> str | None:
    """Return the one split that `splits` names: a string, a list of one, or the "calibration" entry of a mapping.

    Raises:
        ValueError: it names none or several.
    """
    if splits is None or isinstance(splits, str):
        return splits
    if isinstance(splits, Mapping):
        if "calibration" in splits:
            return splits["calibration"]
        splits = list(splits.values())
    if len(splits) != 1:
        raise ValueError(f"splits must name one calibration split, not {list(splits)}; for example splits='train[:5%]'")
    return splits[0]


def single_split(dataset: Dataset | DatasetDict, splits: Splits | None) -> Dataset:
    """Return the split of `dataset` to calibrate with; without `splits`, "calibration", "train" or the only one.

    Raises:
        ValueError: no such split, or several and none of the usual names.
    """
    if not isinstance(dataset, Mapping):
        return dataset
    wanted = chosen_split(splits)
    candidates = [wanted] if wanted is not None else [*_DEFAULT_SPLITS, *(list(dataset) if len(dataset) == 1 else [])]
    for name in candidates:
        if name in dataset:
            return dataset[name]
    raise ValueError(f"the data set has the splits {sorted(dataset)}, none of them {candidates}; name one with splits")


def dataset_texts(dataset: Dataset, text_column: str) -> Sequence[str]:
    """Return the text column of `dataset`, read from disk as it is indexed.

    Raises:
        ValueError: no such column (the columns are named), or it does not hold strings.
    """
    check_column(text_column, dataset.column_names, "the data set")
    column: Sequence[str] = dataset[text_column]
    if len(column) and not isinstance(column[0], str):
        raise ValueError(
            f"the column {text_column!r} must hold strings, but its first row is a {type(column[0]).__name__}"
        )
    return column


def dataset_rows(dataset: Dataset) -> Iterator[torch.Tensor]:
    """Yield the token ids of each row of an already tokenized data set, without padding."""
    for row in dataset:
        yield from unpadded(row["input_ids"], row.get("attention_mask"), "a row of the data set")


def loader_rows(loader: Any) -> Iterator[torch.Tensor]:
    """Yield the token ids of each sample of a DataLoader, without padding.

    Raises:
        TypeError: it does not yield mappings with `input_ids`.
    """
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = f"a mapping with {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(f"the DataLoader must yield dicts with 'input_ids', but it yields {found}")
        yield from unpadded(batch["input_ids"], batch.get("attention_mask"), "a batch of the DataLoader")


def unpadded(ids: Any, mask: Any | None, where: str) -> Iterator[torch.Tensor]:
    """Yield each sample of `ids` ([tokens] or [batch, tokens]) as [tokens], int64, masked positions removed.

    Raises:
        TypeError: the ids are not integers.
        ValueError: the shape is neither of the two, or differs from the mask's.
    """
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
