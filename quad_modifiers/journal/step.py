"""One pass over the layers of a model, as far as it is finished."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quad_modifiers.journal.durable import read_tensors, write_tensors

Tensors = Mapping[str, torch.Tensor]

_LAYER, _CARRIED = "layer", "carried"


class Step:
    """The finished layers of one pass, in order.

    A layer has a result, which is kept, and leaves behind what the next layer begins with, of which only the newest is
    kept. Without a folder nothing is: `done` stays 0.

    Args:
        folder: where; None where the run keeps no journal.
        write: calls a function that writes, and returns whether it could.

    Attributes:
        done: number of layers that are finished.
    """

    def __init__(self, folder: Path | None, write: Callable[[Callable[[], None]], bool]) -> None:
        self._folder, self._write = folder, write
        self.done = 0 if folder is None else _finished(folder)

    @property
    def keeps(self) -> bool:
        """Whether what is finished is kept."""
        return self._folder is not None

    def result(self, index: int) -> tuple[dict[str, torch.Tensor], Any]:
        """Returns the tensors, on the CPU, and the facts of a finished layer."""
        assert self._folder is not None
        assert index < self.done
        return read_tensors(_file(self._folder, _LAYER, index))

    def carried(self) -> dict[str, torch.Tensor]:
        """Returns what the last finished layer left for the next one, on the CPU."""
        assert self._folder is not None
        return read_tensors(_file(self._folder, _CARRIED, self.done - 1))[0]

    def finish(self, tensors: Tensors, facts: Any = None, carried: Tensors | None = None) -> None:
        """Adds the next layer: once this returns it need not be computed again, whatever happens.

        Args:
            tensors: its result.
            facts: what else belongs to the result, as JSON takes it.
            carried: what the next layer begins with.
        """
        folder, index = self._folder, self.done
        if folder is None:
            return

        def write() -> None:
            folder.mkdir(exist_ok=True)
            write_tensors(_file(folder, _LAYER, index), tensors, facts)
            write_tensors(_file(folder, _CARRIED, index), carried or {})
            if index:
                _file(folder, _CARRIED, index - 1).unlink(missing_ok=True)

        if self._write(write):
            self.done += 1
        else:
            self._folder = None


def _file(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}-{index:04d}.safetensors"


def _finished(folder: Path) -> int:
    """Number of layers before the first one that lacks its result, or what it left behind."""
    found = [re.fullmatch(rf"{_CARRIED}-(\d+)\.safetensors", each.name) for each in folder.glob("*")]
    done = max((int(match[1]) + 1 for match in found if match), default=0)
    return done if all(_file(folder, _LAYER, index).is_file() for index in range(done)) else 0
