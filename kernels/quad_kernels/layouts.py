"""How the integers of a weight are stored: layouts by name, each with the two functions that convert it.

Layout `int8` is the one that all others convert from and to. A backend brings the layouts that only its kernels read
(`quad_kernels.Backend.layouts`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from quad_kernels.packing import pack_nibbles, unpack_nibbles


class WeightForm(Protocol):
    """What a layout may ask about a weight before it accepts it; a `quad_kernels.QuantizedWeight` has it all."""

    @property
    def scale(self) -> torch.Tensor:
        """Scales, `[out, groups]`."""

    @property
    def zero_point(self) -> torch.Tensor | None:
        """Zero points, `[out, groups]`, int8, or None on a symmetric grid."""

    @property
    def in_features(self) -> int:
        """Input width."""

    @property
    def out_features(self) -> int:
        """Number of output channels."""

    @property
    def bits(self) -> int:
        """Width of the integers."""

    @property
    def number_format(self) -> str:
        """`int`, or that of doubled floating-point numbers."""

    @property
    def factors(self) -> torch.Tensor | None:
        """Sub-scales that the integers are still to be multiplied by, `[groups, out]`, int8, or None."""


@dataclass(frozen=True)
class WeightLayout:
    """One way to store the integers of a weight.

    Attributes:
        pack: function from integers `[out, in]`, int8, to the stored tensor, of any shape and dtype.
        unpack: inverse of `pack`, called with the stored tensor and the input width; its result is contiguous and
            may have more rows at its end.
        accepts: function that tells whether a weight may be stored this way; one that may not stays int8.
        linear: function that computes a whole layer in one call with weights that are stored this way: it has the
            arguments of `quad_kernels.Backend.quad_linear`, and returns None for dtypes or groups that it does not
            take. Compiled graphs call it directly. None if a layer is computed part by part.
    """

    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int], torch.Tensor]
    accepts: Callable[[WeightForm], bool]
    linear: Callable[..., torch.Tensor | None] | None = None


_layouts = {
    "int8": WeightLayout(
        pack=lambda integers: integers, unpack=lambda stored, in_features: stored, accepts=lambda weight: True
    ),
    "nibbles": WeightLayout(pack=pack_nibbles, unpack=unpack_nibbles, accepts=lambda weight: weight.bits <= 4),
}


def find_layout(name: str) -> WeightLayout:
    """Returns the layout of a name.

    Raises:
        ValueError: if there is none of that name.
    """
    found = _layouts.get(name)
    if found is None:
        raise ValueError(
            f"there is no weight layout {name!r}; there are {', '.join(sorted(_layouts))}. Others come with their "
            "backend: register that first"
        )
    return found


def register_layout(name: str, layout: WeightLayout) -> None:
    """Adds a layout; `quad_kernels.register_backend` does it for the layouts of a backend.

    Raises:
        ValueError: if another layout has its name.
    """
    if _layouts.setdefault(name, layout) != layout:
        raise ValueError(f"a weight layout named {name!r} exists already; choose another name")


@contextmanager
def temporary_layouts() -> Iterator[None]:
    """Removes at its end what was registered inside it."""
    before = dict(_layouts)
    try:
        yield
    finally:
        _layouts.clear()
        _layouts.update(before)
