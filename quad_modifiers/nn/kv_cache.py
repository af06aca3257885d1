"""Keys and values in 4 bits, in whatever cache transformers makes.

A hook before each decoder block looks at the cache that the block is called with. A layer of it that is still empty
gets a class of its own, a child of its stock one, which packs what it is given: each vector of one token and one head
becomes its integers, its scale and its zero, a line of a uint8 tensor (`quad_modifiers.nn.kv_lines`).
Growing, cropping, sliding, beams and batches move whole lines, so the stock class does them as ever; only what it hands
to the attention is unpacked. A prompt's attention sees rounded keys and values, as every later token's does: a
perplexity says something.

A cache that cannot hold lines (filled already, of another class, or none at all) is handed rounded keys and values
instead, in their own dtype: the same numbers, and no memory saved.

docs/concepts/kv-cache.md says what is rounded, and why first tokens and means are treated apart.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quad_modifiers.nn.cache_argument import NEW, OLD
from quad_modifiers.nn.kv_lines import Basis, KVCacheFormat, pack_states, unpack_states

STOCK_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
MEANS = ("key_mean", "value_mean")
"""The buffers of a block with what is taken off its keys and values, `[heads, head_dim]` each."""
BASES = ("key_basis", "value_basis")
"""The buffers of a block with the matrices of the bases of its keys and values, `[heads, head_dim, head_dim]` each."""
INVERSES = ("key_inverse", "value_inverse")
"""Those with the inverses of bases that are not orthogonal."""
BUFFERS = (*MEANS, *BASES, *INVERSES)
_STOCK_MODULE = "transformers.cache_utils"
States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, `[batch, heads, positions, head_dim]` each."""
Bases = tuple[Basis | None, Basis | None]
"""Of keys and of values; None for the coordinates as they come."""


@dataclass(frozen=True)
class BlockRounding:
    """How one block rounds.

    Attributes:
        form: the settings.
        means: of keys and of values, `[heads, head_dim]` each, taken off before rounding, put back when read; or None.
        bases: in which they are rounded.
    """

    form: KVCacheFormat
    means: States | None
    bases: Bases = (None, None)

    def pack(self, states: States) -> States:
        """Returns lines of keys and of values."""
        keys, values = states
        if self.means is not None:
            keys, values = keys - self.means[0].unsqueeze(1), values - self.means[1].unsqueeze(1)
        return (
            pack_states(keys, self.form, self.form.key_rank, self.bases[0]),
            pack_states(values, self.form, self.form.value_rank, self.bases[1]),
        )

    def unpack(self, lines: States, dtype: torch.dtype) -> States:
        """Returns the rounded keys and values of lines."""
        keys = unpack_states(lines[0], self.form, dtype, self.form.key_rank, self.bases[0])
        values = unpack_states(lines[1], self.form, dtype, self.form.value_rank, self.bases[1])
        if self.means is None:
            return keys, values
        return keys + self.means[0].unsqueeze(1), values + self.means[1].unsqueeze(1)

    def round(self, states: States, position: int | torch.Tensor) -> States:
        """Returns what a cache would hand back, for states from a position on; gradients pass as if unrounded."""
        keys, values = self.unpack(self.pack((states[0].detach(), states[1].detach())), states[0].dtype)
        if self.form.sink_tokens:
            positions = torch.arange(keys.shape[2], device=keys.device) + position
            exact = (positions < self.form.sink_tokens).unsqueeze(-1)
            keys, values = torch.where(exact, states[0], keys), torch.where(exact, states[1], values)
        if torch.is_grad_enabled() and any(part.requires_grad for part in states):
            keys = states[0] + (keys - states[0]).detach()
            values = states[1] + (values - states[1]).detach()
        return keys, values


class RoundedStates:
    """Stands for a cache that cannot hold lines, or for none, in the call of one block.

    Args:
        past: the cache, or None.
        layer: index of the block.
        rounding: how the block rounds.
    """

    def __init__(self, past: Any, layer: int, rounding: BlockRounding) -> None:
        self._past = past
        self._layer = layer
        self._rounding = rounding

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what the cache makes of rounded states."""
        needs_position = self._past is not None and self._rounding.form.sink_tokens
        position = self._past.get_seq_length(self._layer) if needs_position else 0
        states = self._rounding.round((key_states, value_states), position)
        return states if self._past is None else self._past.update(*states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._past is None:
            raise AttributeError(name)
        return getattr(self._past, name)


class KVCacheHook:
    """What a decoder block calls before its forward.

    Args:
        layer: index of the block, which is that of its layer of a cache.
        form: how keys and values are rounded.
    """

    def __init__(self, layer: int, form: KVCacheFormat) -> None:
        self.layer = layer
        self.form = form

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sees to it that the block gets rounded keys and values."""
        name = NEW if NEW in kwargs else OLD
        past = kwargs.get(name)
        rounding = BlockRounding(self.form, _means(block), _bases(block))
        if past is not None and _holds_lines(past, self.layer, rounding):
            return None
        return args, {**kwargs, name: RoundedStates(past, self.layer, rounding)}


def install_kv_cache(
    blocks: Sequence[nn.Module],
    config: Any,
    form: KVCacheFormat,
    means: Sequence[States] | None = None,
    bases: Sequence[Bases] | None = None,
) -> None:
    """Rounds the keys and values of all blocks of a decoder; what was installed before goes.

    Args:
        blocks: in their order.
        config: of the model, which says where attention slides.
        form: how keys and values are rounded.
        means: of each block's keys and values, `[heads, head_dim]` each, which become its buffers; None for none.
        bases: of each block's keys and values; their matrices become buffers, too.
    """
    from transformers import DynamicCache

    remove_kv_cache(blocks)
    slides = DynamicCache(config=config).is_sliding
    for index, block in enumerate(blocks):
        own = replace(form, sink_tokens=0) if slides[index] else form
        if means is not None:
            for name, mean in zip(MEANS, means[index], strict=True):
                block.register_buffer(name, mean)
        if bases is not None:
            for names, basis in zip(zip(BASES, INVERSES, strict=True), bases[index], strict=True):
                for name, matrix in zip(names, basis or (None, None), strict=True):
                    if matrix is not None:
                        block.register_buffer(name, matrix)
        block.register_forward_pre_hook(KVCacheHook(index, own), with_kwargs=True)


def remove_kv_cache(blocks: Sequence[nn.Module]) -> None:
    """Lets blocks keep keys and values as they are."""
    for block in blocks:
        for name in BUFFERS:
            block._buffers.pop(name, None)
        for number in [number for number, hook in block._forward_pre_hooks.items() if isinstance(hook, KVCacheHook)]:
            del block._forward_pre_hooks[number]
            block._forward_pre_hooks_with_kwargs.pop(number, None)


def _means(block: nn.Module) -> States | None:
    keys, values = (block._buffers.get(name) for name in MEANS)
    return None if keys is None or values is None else (keys, values)


def _bases(block: nn.Module) -> Bases:
    found: list[Basis | None] = []
    for name, inverse in zip(BASES, INVERSES, strict=True):
        matrix = block._buffers.get(name)
        found.append(None if matrix is None else Basis(matrix, block._buffers.get(inverse)))
    return found[0], found[1]


def _holds_lines(past: Any, index: int, rounding: BlockRounding) -> bool:
    """Returns whether a layer of a cache holds lines, having made it do so where it is empty."""
    layers = getattr(past, "layers", None)
    if layers is None:
        return False
    if len(layers) <= index and getattr(past, "layer_class_to_replicate", None) is not None:
        layers += [past.layer_class_to_replicate() for _ in range(index + 1 - len(layers))]
    if len(layers) <= index:
        return False
    layer = layers[index]
    if type(layer).__module__ == __name__:
        return True
    known = type(layer).__name__ in STOCK_LAYERS and type(layer).__module__ == _STOCK_MODULE
    # A graph of torch.compile cannot change a class; `generate` fills a cache before it compiles.
    if not known or torch.compiler.is_compiling() or int(layer.get_seq_length()):
        return False
    if layer.is_sliding and rounding.form.sink_tokens:  # though the config does not say so: its first line moves on
        return False
    layer.__class__ = _packed_class(type(layer))
    layer.rounding, layer.sinks = rounding, None
    layer.is_initialized = False  # what was made beforehand has room for numbers, not for lines
    return True


def _packed_class(stock: Any) -> type:
    """Returns the child of a stock layer that holds lines; it can be found by name in this module, for pickles.

    It has one base class, for an object changes its class only to one of the same layout.

    Its objects have two attributes more: `rounding`, and `sinks`, the keys and values of the first tokens once there
    are any, `[batch, heads, tokens, head_dim]` each.
    """
    name = f"Packed{stock.__name__}"
    if name not in globals():
        members = {"__doc__": f"{stock.__name__} of lines of bytes.", "__module__": __name__, "_layer_type": None}
        methods = {each: method for each, method in _methods(stock).items() if hasattr(stock, each)}
        globals()[name] = type(name, (stock,), {**members, **methods})
    found: type = globals()[name]
    return found


def _methods(stock: Any) -> dict[str, Any]:
    def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> States:
        """Takes `[batch, heads, positions, head_dim]` of new tokens; returns those that they may attend to."""
        states = key_states, value_states
        held = 0 if self.sinks is None else self.sinks[0].shape[2]
        missing = self.rounding.form.sink_tokens - held
        if missing > 0:
            new = [part[:, :, :missing].clone() for part in states]  # a view would hold the whole prompt in memory
            self.sinks = new if held == 0 else [torch.cat(pair, 2) for pair in zip(self.sinks, new, strict=True)]
        lines = stock.update(self, *self.rounding.pack(states), *args, **kwargs)
        found: States = self.rounding.unpack(lines, key_states.dtype)
        if self.sinks is not None:
            for part, sink in zip(found, self.sinks, strict=True):
                part[:, :, : sink.shape[2]] = sink
        return found

    def reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
        stock.reorder_cache(self, beam_idx)
        if self.sinks is not None:
            self.sinks = [sink.index_select(0, beam_idx.to(sink.device)) for sink in self.sinks]

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        stock.batch_repeat_interleave(self, repeats)
        if self.sinks is not None:
            self.sinks = [sink.repeat_interleave(repeats, dim=0) for sink in self.sinks]

    def batch_select_indices(self: Any, indices: torch.Tensor) -> None:
        stock.batch_select_indices(self, indices)
        if self.sinks is not None:
            self.sinks = [sink[indices, ...] for sink in self.sinks]

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.crop(self, *args, **kwargs)
        if self.sinks is not None:
            self.sinks = [sink[:, :, : self.get_seq_length()] for sink in self.sinks]

    def reset(self: Any) -> None:
        stock.reset(self)
        self.sinks = None

    methods = (update, reorder_cache, batch_repeat_interleave, batch_select_indices, crop, reset)
    return {method.__name__: method for method in methods}


def __getattr__(name: str) -> type:
    """Makes a class when a pickle asks for it in a process that has not used it yet."""
    if name.startswith("Packed") and name.removeprefix("Packed") in STOCK_LAYERS:
        return _packed_class(getattr(importlib.import_module(_STOCK_MODULE), name.removeprefix("Packed")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
