"""Tensors whose memory is a file: what is not worked on takes room on the disk instead of in memory.

Such a tensor is like any other: torch maps its file, and the system reads from it what is looked at. Nothing has to be
brought or taken away by hand, and what reads a model, such as a state dict, needs to know nothing of it. The files have
no name, so none stays behind, however the process ends. docs/developer/larger-than-memory.md has the design.
"""

import ctypes
import gc
import mmap
import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import nn

LEAST = 2**18
"""Bytes of a tensor that is worth a file."""

_MADV_PAGEOUT = 21  # Linux 5.4: unlike MADV_DONTNEED it never loses what was written to a private mapping

_M_MMAP_THRESHOLD = -3  # of mallopt
_MAPPED_FROM = 2**20  # bytes of a temporary that goes back to the system once it is freed

_folder: ContextVar[Path | None] = ContextVar("_folder", default=None)


def can_offload() -> bool:
    """Returns whether this system can say which memory is a file's: Linux."""
    return sys.platform == "linux"


@contextmanager
def offloading(folder: Path | None) -> Iterator[None]:
    """Lets `on_disk`, `rest` and `let_go` inside do what they say, with files in `folder`; None turns them off.

    From the first one on, the process gives back what it frees at once: left to itself, glibc keeps more and more.
    """
    token = _folder.set(folder)
    if folder is not None:
        with suppress(AttributeError):  # another library than glibc
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
    try:
        yield
    finally:
        _folder.reset(token)


def is_offloading() -> bool:
    """Returns whether an `offloading` with a folder is on."""
    return _folder.get() is not None


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values `[...]` of the same dtype, in a file if they are on the CPU and worth one.

    Raises:
        OSError: if the disk is full, naming the folder.
    """
    folder = _folder.get()
    if folder is None or not _is_worth_it(tensor):
        return tensor
    return _written(tensor, folder)


def rest(module: nn.Module) -> None:
    """Moves the parameters and buffers of a module that are in memory to the disk, and gives their memory back.

    Those that are in a file already, such as a model's as it was loaded, stay there.

    Raises:
        OSError: as `on_disk`.
    """
    folder = _folder.get()
    if folder is None:
        return
    files = _FileMemory()
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not _is_worth_it(tensor):
                    continue
                if tensor in files:
                    let_go(tensor)
                elif isinstance(tensor, nn.Parameter):  # which others may share
                    tensor.data = _written(tensor.data, folder)
                else:
                    tensors[name] = _written(tensor, folder)
    give_back()


def give_back() -> None:
    """Returns the memory of temporaries to the system, many of which are in circles: they would pile up."""
    if not is_offloading():
        return
    gc.collect()
    with suppress(AttributeError):  # another library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # it keeps for itself what is freed


def let_go(tensor: torch.Tensor) -> None:
    """Lets the system take the memory of a tensor that is in a file, whose values stay as they are."""
    if _folder.get() is None or tensor.device.type != "cpu" or not tensor.numel():
        return
    start = tensor.data_ptr()
    first = start - start % mmap.PAGESIZE
    size = start + tensor.numel() * tensor.element_size() - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_PAGEOUT)  # an old system refuses


@contextmanager
def unchanged_kept(module: nn.Module) -> Iterator[None]:
    """Puts the tensors of parameters back that have the same values, dtype and device after the block as before it.

    A module that is only read, in another dtype, stays in the files that it came from.
    """
    if not is_offloading():
        yield
        return
    before = {parameter: parameter.data for parameter in module.parameters()}
    try:
        yield
    finally:
        for parameter in module.parameters():
            old, new = before.get(parameter), parameter.data
            if old is None or old.dtype != new.dtype or old.device != new.device or old.shape != new.shape:
                continue
            if torch.equal(old, new):
                parameter.data = old


def _is_worth_it(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() >= LEAST


def _written(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Returns a tensor of a new file; written, not copied into a mapping, whose pages a full disk could not take."""
    values = tensor.detach().contiguous()
    size = values.numel() * values.element_size()
    handle = _nameless(folder)
    try:
        data = memoryview(values.view(-1).view(torch.uint8).numpy())
        while data:
            data = data[os.write(handle, data) :]
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{handle}", shared=False, nbytes=size)
    except OSError as error:
        raise OSError(f"{folder} has no room for what does not fit in memory ({error.strerror})") from error
    finally:
        os.close(handle)
    return torch.empty(0, dtype=values.dtype).set_(storage, 0, values.shape)


def _nameless(folder: Path) -> int:
    """Opens a file without a name; where a file system has none, one whose name is removed at once."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        handle, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
        return handle


class _FileMemory:
    """The parts of this process's memory that are files, as they are now."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                span, _, _, _, inode = line.split(maxsplit=5)[:5]
                if inode != "0":
                    start, end = span.split("-")
                    self._starts.append(int(start, 16))
                    self._ends.append(int(end, 16))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        place = bisect_right(self._starts, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() < self._ends[place]
