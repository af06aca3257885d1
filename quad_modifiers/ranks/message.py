"""A value as tensors of bytes, its own tensors without a copy of them in the pickle."""

import io
import pickle
from typing import Any

import torch


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        """Leaves tensors out: their number, dtype and shape stand for them."""
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensors.append(obj.detach().cpu().contiguous().flatten().view(torch.uint8))
        return len(self.tensors), obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parts: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.parts = parts

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Returns the tensor that an id stands for."""
        number, dtype, shape = pid
        return self.parts[number].view(dtype).reshape(shape)


def packed(value: Any) -> list[torch.Tensor]:
    """Returns a value that can be pickled as one-dimensional uint8 tensors: the pickle, then the value's tensors."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return [torch.frombuffer(file.getbuffer(), dtype=torch.uint8), *pickler.tensors]


def unpacked(parts: list[torch.Tensor]) -> Any:
    """Returns the value that `packed` was given, its tensors on the CPU."""
    return _Unpickler(io.BytesIO(parts[0].numpy().tobytes()), parts).load()
