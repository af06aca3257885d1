"""Memory for packed weights in pages of 2 MiB instead of 4 KiB, where Linux gives them.

A decode step reads every weight once, so it meets every page once, and in small pages finding them takes about a tenth
of the time (in a virtual machine, where a look-up is two of them). A weight by itself is often smaller than a large
page; they are therefore laid one after the other into chunks.
"""

import contextlib
import mmap
import threading

import torch

CHUNK_BYTES = 32 << 20
_LINE = 64
_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the newest one


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a contiguous CPU tensor in large pages, at the start of a cache line.

    A chunk is freed with the last of its tensors. Where there are no large pages it is ordinary memory.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    copy = _take(size).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _take(size: int) -> torch.Tensor:
    """Returns unset memory, `[size]`, uint8."""
    global _chunk
    whole = -(-size // _LINE) * _LINE
    if whole >= CHUNK_BYTES // 2:
        return _map(whole)[:size]
    with _lock:
        if len(_chunk) < whole:
            _chunk = _map(CHUNK_BYTES)
        taken, _chunk = _chunk[:size], _chunk[whole:]
    return taken


def _map(size: int) -> torch.Tensor:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
