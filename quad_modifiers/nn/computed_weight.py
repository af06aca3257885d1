"""The `weight` of a stand-in: computed from what the module stores, so that writing to it must not seem to work."""

from collections.abc import Callable
from typing import Any

import torch

_ASSIGNMENTS = ("__set__", "__setitem__")


class ComputedWeight(torch.Tensor):
    """A tensor that can be read like any other and refuses to be written to, in place or through `data`.

    Results of operations are ordinary tensors; views are computed weights too.

    Raises:
        ValueError: on writing to it.
    """

    _why: str

    @staticmethod
    def of(tensor: torch.Tensor, why: str) -> torch.Tensor:
        """Returns `tensor` as a computed weight; as it is while a graph is compiled, which takes no such subclass.

        Args:
            tensor: computed anew for this call.
            why: what it is and what to do instead of writing to it, for the error.
        """
        if torch.compiler.is_compiling():
            return tensor
        weight = tensor.as_subclass(ComputedWeight)
        weight._why = why
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation that only reads."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        values = (*args, *kwargs.values())
        target = values[0] if _writes(name, args, kwargs) else kwargs.get("out")
        if isinstance(target, cls):
            raise ValueError(f"{target._why} ({name.strip('_')})")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        source = next((value for value in values if isinstance(value, cls)), None)
        if source is None:
            return result
        if isinstance(result, (tuple, list)) and all(type(part) is torch.Tensor for part in result):
            return type(result)(_kept(part, source) for part in result)
        return _kept(result, source)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """An ordinary tensor: the copy is nobody's weight."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickles, which hold an ordinary tensor too."""
        return self.clone().__reduce_ex__(protocol)


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "requires_grad_":  # nothing is lost by switching it off
        return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _ASSIGNMENTS


def _kept(result: Any, source: ComputedWeight) -> Any:
    """A view of a computed weight is one, too."""
    if type(result) is not torch.Tensor or result.untyped_storage()._cdata != source.untyped_storage()._cdata:
        return result
    return ComputedWeight.of(result, source._why)
