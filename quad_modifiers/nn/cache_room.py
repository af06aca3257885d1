"""Where a native decode step puts a token's keys and values: behind those of a cache of transformers."""

import weakref
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # whoever imports transformers first gets the loader, which imports this package
    from transformers import DynamicCache
    from transformers.cache_utils import StaticLayer

_LEAST_ROOM = 256  # positions


class CacheShape(NamedTuple):
    """What a cache is made of."""

    depth: int  # number of blocks
    heads: int
    head_dim: int


class DynamicRoom:
    """Room for more positions behind the keys and values of a `DynamicCache`.

    A position is only ever written behind the views that the cache's layers hold, and only while they hold these very
    views: whoever crops, reorders or copies a cache gets another buffer, and keeps what he has.
    """

    def __init__(self, past: "DynamicCache", position: int, like: torch.Tensor) -> None:
        batch, heads, _, head_dim = like.shape
        capacity = max(_LEAST_ROOM, (position + 1) * 3 // 2)
        layers = past.layers
        self._layers = layers
        self._buffer = like.new_empty(2 * len(layers), batch, heads, capacity, head_dim)
        for i, tensor in enumerate(_tensors(layers)):
            self._buffer[i, :, :, :position] = tensor
        self.position = position
        self.capacity = capacity
        whole = self._buffer.unbind()
        self.keys, self.values = list(whole[: len(layers)]), list(whole[len(layers) :])
        self._views: list[torch.Tensor] = []

    def is_current(self, past: "DynamicCache", x: torch.Tensor) -> bool:
        """True if the cache holds what was put there last, and there is room for another position of `x`."""
        same = self._layers is past.layers and self.position < self.capacity and len(self._views) > 0
        alike = self._buffer.dtype == x.dtype and self._buffer.shape[1] == x.shape[0]
        return same and alike and all(map(is_, self._views, _tensors(self._layers)))

    def lengthen(self) -> None:
        """Hands the cache its keys and values with the position that was written."""
        self.position += 1
        self._views = list(self._buffer.narrow(3, 0, self.position).unbind())
        for layer, keys, values in zip(self._layers, self._views, self._views[len(self._layers) :], strict=False):
            layer.keys, layer.values = keys, values


class StaticRoom:
    """The tensors of a `StaticCache`, which have room as they are."""

    def __init__(self, layers: "list[StaticLayer]", position: int) -> None:
        self._layers = layers
        self.position = position
        self.keys, self.values = [layer.keys for layer in layers], [layer.values for layer in layers]

    def lengthen(self) -> None:
        """Counts the position that was written."""
        for layer in self._layers:
            layer.cumulative_length.add_(1)


_rooms: "weakref.WeakKeyDictionary[DynamicCache, DynamicRoom]" = weakref.WeakKeyDictionary()


def room_for(past: Any, shape: CacheShape, x: torch.Tensor) -> DynamicRoom | StaticRoom | None:
    """Returns where the token's keys and values go; None for a cache of another kind, dtype or shape."""
    from transformers import DynamicCache

    dynamic = type(past) is DynamicCache
    if dynamic:
        room = _rooms.get(past)
        if room is not None and room.is_current(past, x):
            return room
    layers = fitting_layers(past, shape, x)
    if layers is None:
        return None
    position = int(layers[0].get_seq_length())
    if dynamic and position:
        room = _rooms[past] = DynamicRoom(past, position, layers[0].keys)
        return room
    same = all(int(layer.get_seq_length()) == position for layer in layers)
    return StaticRoom(layers, position) if same and 0 < position < layers[0].keys.shape[2] else None


def fitting_layers(past: Any, shape: CacheShape, x: torch.Tensor) -> list[Any] | None:
    """Returns the layers of a dynamic or static cache that holds keys and values as the blocks write them for `x`."""
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicLayer, StaticLayer

    kind = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}.get(type(past))
    if kind is None or past.offloading or len(past.layers) != shape.depth:
        return None
    layers = past.layers
    if not all(type(layer) is kind and layer.is_initialized for layer in layers):
        return None
    wanted = (x.shape[0], shape.heads, layers[0].keys.shape[-2], shape.head_dim)
    fits = all(t.shape == wanted and t.dtype == x.dtype and t.device.type == "cpu" for t in _tensors(layers))
    return layers if fits else None


def _tensors(layers: list[Any]) -> list[torch.Tensor]:
    """The keys of all layers, then their values."""
    return [layer.keys for layer in layers] + [layer.values for layer in layers]
