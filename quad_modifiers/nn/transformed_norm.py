"""A final norm behind which a head may share the embedding's table, although the stream has changed its basis.

The embedding writes to the stream and the head reads the normalized stream: after a projection they need two different
tables, T and T M. M is square in the width of the stream and small beside a table, which has a row for each entry of
the vocabulary; the norm multiplies by M, and the head reads T itself. docs/concepts/projection.md has the derivation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quad_modifiers.nn.class_change import become

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class TransformedNorm(nn.Module):
    """The forward of a norm, times M; the first of two base classes, the other is the norm's own.

    Attributes:
        head_transform: M, `[width, width]`, dtype of the norm's weight.
        product: x M^T of x and M; the norm's own, if its class has one.
    """

    head_transform: torch.Tensor
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Returns what the norm returns; its first result, `[..., width]`, is multiplied by M."""
        y = super().forward(*arguments, **options)
        if isinstance(y, tuple):  # vLLM's norm adds the residual itself, and returns it too
            return self.product(y[0], self.head_transform), *y[1:]
        return self.product(y, self.head_transform)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For pickles and copies: the class is made when it is needed, and no module has it by name."""
        return _unset, (norm_class(self),), self.__dict__


def transformed_class(norm: type[nn.Module]) -> type[nn.Module]:
    """Returns the child of a norm's class that multiplies by M."""
    if norm not in _classes:
        product = staticmethod(getattr(norm, "product", nn.functional.linear))
        doc = f"{norm.__name__}, and what the head shares a table by."
        members = {"__doc__": doc, "__module__": __name__, "product": product}
        _classes[norm] = type(f"Transformed{norm.__name__}", (TransformedNorm, norm), members)
    return _classes[norm]


def norm_class(module: TransformedNorm) -> type[nn.Module]:
    """Returns the class that the norm has without M."""
    return type(module).__bases__[1]


def add_head_transform(norm: nn.Module, matrix: torch.Tensor) -> None:
    """Makes a norm multiply by `matrix`, `[width, width]`, in the dtype and on the device of its weight."""
    weight: Any = norm.weight
    become(norm, transformed_class(type(norm)))
    norm.head_transform = nn.Parameter(matrix.to(weight), requires_grad=False)


def remove_head_transform(norm: TransformedNorm) -> torch.Tensor:
    """Makes a `TransformedNorm` what it was, and returns its matrix."""
    matrix = norm.head_transform.detach()
    del norm.head_transform
    become(norm, norm_class(norm))
    return matrix


def _unset(norm: type[nn.Module]) -> nn.Module:
    kind: Any = transformed_class(norm)
    made: nn.Module = kind.__new__(kind)
    return made
