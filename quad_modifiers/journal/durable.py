"""Files of tensors that are complete after a crash, or absent."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_FACTS = "facts"  # the one entry of a file's metadata, which holds texts only


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], facts: Any = None) -> None:
    """Writes tensors and something that JSON can hold; on disk when it returns, not in a buffer of the system.

    Raises:
        OSError: if it cannot be written; nothing of it stays.
    """
    hidden = file.with_name(f".{file.name}")
    try:
        try:
            save_file({name: _alone(value) for name, value in tensors.items()}, hidden, {_FACTS: json.dumps(facts)})
        except Exception as error:  # safetensors has its own type for a full disk
            if isinstance(error, OSError):
                raise
            raise OSError(str(error)) from error
        _sync(hidden)
        hidden.replace(file)
        _sync(file.parent)
    finally:
        hidden.unlink(missing_ok=True)


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Returns what `write_tensors` wrote, the tensors on the CPU."""
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()[_FACTS])
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, facts  # noqa: SIM118


def _alone(value: torch.Tensor) -> torch.Tensor:
    """Returns the values on the CPU in a storage of their own: safetensors takes no views."""
    value = value.detach().cpu().contiguous()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    with suppress(OSError):  # a file system that cannot; a folder on some systems
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
