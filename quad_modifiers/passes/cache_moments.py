"""The mean key and value of each head, and second moments of keys, values and queries, over calibration tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from quad_modifiers.journal import open_step
from quad_modifiers.model.decoder import Block, Decoder
from quad_modifiers.nn.cache_argument import NEW, OLD
from quad_modifiers.nn.native_block import attention_function, calls_attention_function
from quad_modifiers.reporting import layer_progress

_KINDS = ("keys", "values")
_QUERIES = "queries.squares"
_SEEN = "quad_modifiers_seen"


class CacheMoments(NamedTuple):
    """Moments of the keys, behind the rotary embedding, and of the values of one block, in this order.

    Attributes:
        means: `[heads, head_dim]` each, float64.
        squares: mean of x^T x, `[heads, head_dim, head_dim]` each, float64; None where they were not asked for.
        queries: the same of the queries that read a head of keys, behind the rotary embedding.
    """

    means: tuple[torch.Tensor, torch.Tensor]
    squares: tuple[torch.Tensor, torch.Tensor] | None
    queries: torch.Tensor | None = None


class _Recorder:
    """Takes the place of the cache of one block, and adds up the keys and values that it is given, and queries."""

    def __init__(self, squares: bool) -> None:
        self.squares = squares
        self.totals: list[torch.Tensor] = []
        self.queries: torch.Tensor | None = None
        self.count = 0
        self.mask: torch.Tensor | None = None  # of the window that runs, `[batch, positions]`

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook of the block."""
        return args, {**kwargs, NEW if NEW in kwargs else OLD: self}

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds up `[batch, heads, positions, head_dim]` of both, without each sequence's first token."""
        counted = self._counted(keys)
        wide = [part.double() * counted[:, None, :, None] for part in (keys, values)]
        sums = [part.sum((0, 2)) for part in wide]
        if self.squares:
            sums += [(part.mT @ part).sum(0) for part in wide]
        self.totals = [a + b for a, b in zip(self.totals, sums, strict=True)] if self.count else sums
        self.count += int(counted.sum())
        return keys, values

    def see(self, queries: torch.Tensor, heads: int) -> None:
        """Adds up queries, `[batch, query heads, positions, head_dim]`, for each of so many heads of keys."""
        wide = (queries.double() * self._counted(queries)[:, None, :, None]).unflatten(1, (heads, -1))
        total = (wide.mT @ wide).sum((0, 2)) / wide.shape[2]
        self.queries = total if self.queries is None else self.queries + total

    def _counted(self, states: torch.Tensor) -> torch.Tensor:
        """True for the tokens that count, `[batch, positions]`: not for the first of a sequence, nor for padding."""
        known = torch.ones(states.shape[0], states.shape[2], device=states.device) if self.mask is None else self.mask
        return (known.cumsum(1) > 1) & (known > 0)


@torch.no_grad()
def cache_moments(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], squares: bool = False, queries: bool = False
) -> list[CacheMoments]:
    """Returns the moments of the keys and values of each block.

    The first token of a sequence, which is unlike all others, does not count.

    Args:
        decoder: the model.
        batches: `input_ids`, `[batch, positions]`, and optional `attention_mask` of padding.
        squares: whether second moments are wanted as well.
        queries: whether those of queries are; `shows_queries` must hold for every block.

    Raises:
        ValueError: if a block hands no keys to a cache, or shows no queries though they are wanted, or no sequence has
            two tokens.
    """
    log = open_step("cache-moments")
    device = decoder.model.device
    if log.done:
        kept = {name: tensor.to(device) for name, tensor in log.result(0)[0].items()}
    else:
        kept = {}
        for index, recorder in enumerate(_recorded(decoder, batches, squares, queries)):
            found = [total / recorder.count for total in recorder.totals]
            kept |= {f"{kind}.{index}": mean for kind, mean in zip(_KINDS, found[:2], strict=True)}
            if squares:
                kept |= {f"{kind}.squares.{index}": each for kind, each in zip(_KINDS, found[2:], strict=True)}
            if recorder.queries is not None:
                kept[f"{_QUERIES}.{index}"] = recorder.queries / recorder.count
        log.finish(kept)
    return [
        CacheMoments(
            _both(kept, "", index),
            _both(kept, ".squares", index) if squares else None,
            kept.get(f"{_QUERIES}.{index}"),
        )
        for index in range(len(decoder.blocks))
    ]


def _both(kept: dict[str, torch.Tensor], what: str, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (kept[f"{kind}{what}.{index}"] for kind in _KINDS)
    return keys, values


def _recorded(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], squares: bool, queries: bool
) -> list[_Recorder]:
    """Runs the model, and returns what each block handed to its cache."""
    recorders, device = [_Recorder(squares) for _ in decoder.blocks], decoder.model.device
    hooks = [
        block.module.register_forward_pre_hook(recorder.before, with_kwargs=True)
        for block, recorder in zip(decoder.blocks, recorders, strict=True)
    ]
    seers = {_attention_of(block): recorder.see for block, recorder in zip(decoder.blocks, recorders, strict=True)}
    try:
        with _queries_seen(decoder, seers) if queries else nullcontext():
            for batch in layer_progress(batches, "mean keys and values", "batch"):
                mask = batch.get("attention_mask")
                mask = None if mask is None else mask.to(device)
                for recorder in recorders:
                    recorder.mask = mask
                decoder.backbone(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for block, recorder in zip(decoder.blocks, recorders, strict=True):
        if not recorder.count:
            raise ValueError(f"{block.name} hands no keys to a cache, or the calibration data has no second token")
        if queries and recorder.queries is None:
            raise ValueError(f"{block.name} did not call transformers' attention function; its queries are unknown")
    return recorders


def shows_queries(block: Block) -> bool:
    """Returns whether the attention of a block is one of transformers' attention functions, which get its queries."""
    return calls_attention_function(_attention_of(block))


def _attention_of(block: Block) -> nn.Module:
    return next(group.parent for group in block.groups if group.group.reads == "values")


@contextmanager
def _queries_seen(decoder: Decoder, seers: Mapping[nn.Module, Callable[[torch.Tensor, int], None]]) -> Iterator[None]:
    """Hands what attention modules ask with to `seers`, with the number of heads of keys."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = {module: attention_function(module) for module in seers}
    configs: list[Any] = [decoder.backbone.config, *(module.config for module in seers)]
    configs = list({id(config): config for config in configs}.values())
    names = [config._attn_implementation for config in configs]
    mask = ALL_MASK_ATTENTION_FUNCTIONS[names[0]]

    def attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seers[module](query, key.shape[1])
        return stock[module](module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS[_SEEN], ALL_MASK_ATTENTION_FUNCTIONS[_SEEN] = attention, mask
    try:
        for config in configs:
            config._attn_implementation = _SEEN
        yield
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        del ALL_ATTENTION_FUNCTIONS[_SEEN], ALL_MASK_ATTENTION_FUNCTIONS[_SEEN]
