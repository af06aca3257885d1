"""One token through all blocks of a decoder, in one native call.

With its blocks in two calls each, most of a small model's decode step is still Python: the cache, the attention and the
way from block to block. The decoder (`LlamaModel` and its like) therefore gets a forward of its own. Where a token of
each sequence follows what a cache of transformers holds, and nothing can see into the blocks, one call computes them
all, attention included. Everything else, prompts too, takes the forward of the decoder's class. With a static cache, a
graph of torch.compile holds that call as one operator.

The cache stays transformers': its layers get the grown keys and values as ever. They are views of a buffer with room
for more positions (`cache_room.py`), so that a token is written, and what was there is not copied for it.
"""

import weakref
from collections.abc import Callable, Iterator
from itertools import chain, count
from operator import getitem, is_
from typing import Any, NamedTuple

import torch
from quad_kernels import QuantizedWeight
from quad_kernels.native.block import Blocks
from torch import nn
from torch.nn.modules import module as torch_module

from quad_modifiers.nn.cache_argument import cache_argument, output_field
from quad_modifiers.nn.cache_room import CacheShape, fitting_layers, room_for
from quad_modifiers.nn.native_attention import is_stock_sdpa
from quad_modifiers.nn.native_block import NativeBlock, has_listeners, native_groups
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear

STOCK_DECODERS = ("LlamaModel", "MinistralModel", "MistralModel", "Qwen2Model", "Qwen3Model")
_INERT = {"return_dict": (None, True), "output_attentions": (None, False), "output_hidden_states": (None, False)}


class NativeDecode:
    """The forward of a decoder whose blocks run natively.

    Args:
        model: the decoder, such as a `LlamaModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.model = model
        self._cache_argument = cache_argument(type(model).forward)
        self._output_field = output_field(BaseModelOutputWithPast)
        self._plan: _Plan | None = None
        self._number = next(_numbers)
        _by_number[self._number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: their plan is made when they run."""
        return NativeDecode, (self.model,)

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what the forward of the decoder's class returns; the arguments are that one's.

        `past_key_values` and `cache` are the same thing, by its older and its newer name.
        """
        model: Any = self.model
        past = cache if past_key_values is None else past_key_values
        cached = past is not None and use_cache is not False
        if cached and _is_one_token(input_ids, inputs_embeds) and _is_plain(model, kwargs):
            if inputs_embeds is None:  # once, for whoever computes the rest
                inputs_embeds, input_ids = model.embed_tokens(input_ids), None
            decode = self._decode_in_graph if torch.compiler.is_compiling() else self._decode
            output = decode(inputs_embeds, attention_mask, position_ids, past)
            if output is not None:
                from transformers.modeling_outputs import BaseModelOutputWithPast

                return BaseModelOutputWithPast(last_hidden_state=model.norm(output), **{self._output_field: past})
        return type(model).forward(
            model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{self._cache_argument: past},
            **kwargs,
        )

    def _decode(self, x: torch.Tensor, mask: Any, position_ids: torch.Tensor | None, past: Any) -> torch.Tensor | None:
        """Returns hidden states behind the last block and lengthens the cache; None, and nothing done, if it cannot."""
        plan = self._current_plan(x)
        room = None if plan is None else room_for(past, plan.shape, x)
        if plan is None or room is None:
            return None
        position = room.position
        fits, mask = _seen(mask, x.shape[0], position + 1)
        if not fits:
            return None
        if position_ids is None:
            position_ids = torch.tensor([[position]])
        model: Any = self.model
        cosine, sine = model.rotary_emb(x, position_ids)
        output = plan.blocks.decode(x, cosine, sine, room.keys, room.values, position, mask)
        room.lengthen()
        return output

    def _decode_in_graph(self, x: torch.Tensor, mask: Any, position_ids: Any, past: Any) -> torch.Tensor | None:
        """As `_decode`, for a static cache, as one operator of a graph of torch.compile."""
        from transformers import StaticCache

        shape = self._cache_shape(x.dtype)
        layers = None if shape is None or type(past) is not StaticCache else fitting_layers(past, shape, x)
        if layers is None:
            return None
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, 1, layers[0].max_cache_len):
                return None
            mask = mask[:, 0, 0].expand(x.shape[0], -1)
        position = layers[0].cumulative_length
        if position_ids is None:
            position_ids = position.view(1, 1)
        model: Any = self.model
        cosine, sine = model.rotary_emb(x, position_ids)
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        output: torch.Tensor = _decode_operator(x, cosine, sine, keys, values, position, mask, self._number)
        for layer in layers:
            layer.cumulative_length.add_(1)
        return output

    @torch.compiler.assume_constant_result
    def _cache_shape(self, dtype: torch.dtype) -> "CacheShape | None":
        """The cache that the blocks write, None if the decoder cannot run so; looked at when a graph is made."""
        plan = self._current_plan(torch.empty(0, dtype=dtype))
        return None if plan is None else plan.shape

    def _current_plan(self, x: torch.Tensor) -> "_Plan | None":
        """Returns the plan, made anew where anything has changed; None if the decoder cannot run so now."""
        plan = self._plan
        if plan is None or not plan.holds(x.dtype):
            me = weakref.ref(self)

            def drop(_: Any) -> None:
                decode = me()
                if decode is not None:
                    decode._plan = None

            plan = self._plan = _make_plan(self.model, x, drop)
        return plan


_numbers = count()
_by_number: "weakref.WeakValueDictionary[int, NativeDecode]" = weakref.WeakValueDictionary()


@torch.library.custom_op("quad_modifiers::decode", mutates_args=("keys", "values"), device_types="cpu")
def _decode_operator(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    position: torch.Tensor,
    mask: torch.Tensor | None,
    number: int,
) -> torch.Tensor:
    """All blocks of a decoder, for a graph of torch.compile.

    The decoder is named by its number: a graph that held the weights would check every one of them at each token.

    Args:
        x: as `Blocks.decode` takes it, like the next four.
        cosine: of the angles.
        sine: likewise.
        keys: of each block, written at `position`.
        values: likewise.
        position: number of tokens in the caches, int64, no dimension.
        mask: `[batch, capacity]`, bool.
        number: of the `NativeDecode`.
    """
    decode = _by_number[number]
    plan = decode._current_plan(x)
    filled = int(position)
    seen = None if mask is None else mask[:, : filled + 1]
    if plan is not None:
        return plan.blocks.decode(x, cosine, sine, keys, values, filled, seen)
    return _decode_by_layers(decode.model, x, (cosine, sine), _Columns(keys, values, filled), seen)


@_decode_operator.register_fake
def _(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return torch.empty_like(x)


class _Columns:
    """A cache for one token of each sequence, in the keys and values that the operator was given."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], position: int) -> None:
        self._caches = list(zip(keys, values, strict=True))
        self._position = position

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Writes the token's `[batch, heads, 1, head_dim]` and returns what the token may see."""
        for cache, state in zip(self._caches[layer], (key, value), strict=True):
            cache[:, :, self._position : self._position + 1] = state
        return tuple(cache[:, :, : self._position + 1] for cache in self._caches[layer])


def _decode_by_layers(
    model: Any, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], past: _Columns, seen: torch.Tensor | None
) -> torch.Tensor:
    """What the operator does when the model has changed since its graph was made: hooks and adapters are heard."""
    mask = None
    if seen is not None:  # added to the scores, which every attention understands
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None, None]
    for layer in model.layers[: model.config.num_hidden_layers]:
        named = {cache_argument(type(layer).forward): past}
        x = layer(x, attention_mask=mask, position_embeddings=angles, use_cache=True, **named)
    return x


def install_native_decode(model: nn.Module) -> None:
    """Gives a decoder of a known class, all of whose blocks are native, the forward of this module."""
    layers = getattr(model, "layers", ())
    known = type(model).__name__ in STOCK_DECODERS and layers and all(isinstance(x, NativeBlock) for x in layers)
    own = model.__dict__.get("forward")  # llm-compressor leaves the one of the class behind, bound
    if known and (own is None or getattr(own, "__func__", None) is type(model).forward):
        model.forward = NativeDecode(model)


def remove_native_decode(model: nn.Module) -> None:
    """Gives every decoder below `model` the forward of its class back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NativeDecode):
            del module.forward


def _is_one_token(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> bool:
    """True for one token of each sequence, given in one of the two ways."""
    if (input_ids is None) == (inputs_embeds is None):
        return False  # an error, which the decoder's class knows
    given = inputs_embeds if input_ids is None else input_ids
    return given is not None and given.dim() > 1 and given.shape[1] == 1


def _is_plain(model: Any, kwargs: dict[str, Any]) -> bool:
    """True if nobody asks for more than the hidden states and the cache, in inference."""
    config = model.config
    if torch.is_grad_enabled() or model.training or config.output_attentions or config.output_hidden_states:
        return False
    if not all(name in _INERT and value in _INERT[name] for name, value in kwargs.items()):
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return config._attn_implementation == "eager" or is_stock_sdpa(config)


# --- the blocks ---


class _Plan(NamedTuple):
    """The blocks as the kernels take them, and what must not change while that is so."""

    blocks: Blocks
    shape: CacheShape
    dtype: torch.dtype
    hooks: list[dict[Any, Any]]
    dicts: list[dict[str, Any]]
    sizes: list[int]
    contents: list[dict[str, Any]]
    seen: list[Any]  # what is in `contents`
    attributes: list[dict[str, Any]]
    names: list[str]
    ids: list[int]  # of `attributes`; no references, for a weight that was repacked must not stay in memory
    weights: list[weakref.ref[QuantizedWeight]]

    def holds(self, dtype: torch.dtype) -> bool:
        """True if no part was replaced, and nobody listens, since the plan was made."""
        return (
            self.dtype == dtype
            and not any(map(has_listeners, filter(None, self.hooks)))
            and list(map(len, self.dicts)) == self.sizes
            and all(map(is_, self.seen, _values(self.contents)))
            and list(map(id, map(getitem, self.attributes, self.names))) == self.ids
        )


def _make_plan(model: Any, x: torch.Tensor, when_repacked: Callable[[Any], None]) -> _Plan | None:
    """Returns the plan of a decoder, None if it cannot run so; calls `when_repacked` when a weight is dropped."""
    layers = list(model.layers)[: model.config.num_hidden_layers]
    first = layers[0].self_attn
    blocks = Blocks(layers[0].input_layernorm.variance_epsilon, first.scaling)
    for layer in layers:
        attention = layer.self_attn
        if not isinstance(layer, NativeBlock) or "forward" in layer.__dict__ or "_hf_hook" in layer.__dict__:
            return None
        if layer._forward_pre_hooks:  # one that rounds keys and values, for example
            return None
        groups = native_groups(layer, x)
        head_norms = [module for name in ("q_norm", "k_norm") if (module := attention._modules.get(name)) is not None]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if groups is None or getattr(attention, "sliding_window", None) is not None:
            return None
        if any(norm.variance_epsilon != blocks.eps for norm in (*norms, *head_norms)):
            return None
        if (attention.head_dim, attention.scaling) != (first.head_dim, first.scaling):
            return None
        blocks.append(groups, (norms[0].weight, norms[1].weight), [norm.weight for norm in head_norms])
    modules = [module for layer in layers for module in layer.modules()]
    hooks = [d for module in modules for d in (module._forward_hooks, module._forward_pre_hooks)]
    if any(map(has_listeners, hooks)):  # the blocks are not called either
        return None
    contents = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
    dicts = contents + [module.__dict__ for module in modules]
    watched = list(_watched(modules))
    packed = [module for module in modules if isinstance(module, PackedLinear)]
    return _Plan(
        blocks=blocks,
        shape=CacheShape(len(layers), first.k_proj.out_features // first.head_dim, first.head_dim),
        dtype=x.dtype,
        hooks=hooks,
        dicts=dicts,
        sizes=[len(d) for d in dicts],
        contents=contents,
        seen=list(_values(contents)),
        attributes=[d for d, _ in watched],
        names=[name for _, name in watched],
        ids=[id(d[name]) for d, name in watched],
        weights=[weakref.ref(module.prepared_weight(), when_repacked) for module in packed],
    )


def _watched(modules: list[nn.Module]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields where the linears keep what is neither a module nor a tensor."""
    for module in modules:
        if isinstance(module, QuadLinear):
            yield from ((module.__dict__, name) for name in ("split", "input_quantization", "quantize_input"))
        elif isinstance(module, PackedLinear):
            yield module.__dict__, "_prepared"


def _values(dicts: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


# --- the mask ---


def _seen(mask: Any, batch: int, positions: int) -> tuple[bool, torch.Tensor | None]:
    """Returns whether a mask is understood, and which positions each sequence may see, None for all.

    The mask is one of the tokenizer's, `[batch, positions]`, or one that transformers made of it for its attention:
    bool, `[batch or 1, 1, 1, positions or more]`.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return True, None
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0, :positions].expand(batch, -1)
    if mask.shape != (batch, positions) or mask.is_floating_point():
        return False, None
    return True, None if bool(mask.all()) else mask.bool()
