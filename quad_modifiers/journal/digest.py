"""A digest of the weights that a step begins with, and of anything else that a run is made from."""

import hashlib
from collections.abc import Iterable

import torch

from quad_modifiers.on_disk import let_go


def digest_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns the SHA-256 of tensors with their names, dtypes and shapes, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        let_go(value)
    return digest.hexdigest()
