"""The mean key and value of each head, over calibration tokens."""

from typing import Any

import torch
from torch import nn

from quad_modifiers.journal import open_step
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.cache_argument import NEW, OLD
from quad_modifiers.reporting import layer_progress

_KINDS = ("keys", "values")


class _Recorder:
    """Takes the place of the cache of one block, and adds up the keys and values that it is given."""

    def __init__(self) -> None:
        self.totals: list[torch.Tensor] = []
        self.count = 0
        self.mask: torch.Tensor | None = None  # of the window that runs, `[batch, positions]`

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook of the block."""
        return args, {**kwargs, NEW if NEW in kwargs else OLD: self}

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds up `[batch, heads, positions, head_dim]` of both, without each sequence's first token."""
        counted = torch.ones(keys.shape[0], keys.shape[2], device=keys.device) if self.mask is None else self.mask
        counted = (counted.cumsum(1) > 1) & (counted > 0)
        sums = [(part.double() * counted[:, None, :, None]).sum((0, 2)) for part in (keys, values)]
        self.totals = [a + b for a, b in zip(self.totals, sums, strict=True)] if self.count else sums
        self.count += int(counted.sum())
        return keys, values


@torch.no_grad()
def cache_means(decoder: Decoder, batches: list[dict[str, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the mean key, behind the rotary embedding, and the mean value of each block.

    They are `[heads, head_dim]`, in the model's dtype. The first token of a sequence, which is unlike all others, does
    not count.

    Args:
        decoder: the model.
        batches: `input_ids`, `[batch, positions]`, and optional `attention_mask` of padding.

    Raises:
        ValueError: if a block hands no keys to a cache, or no sequence has two tokens.
    """
    log = open_step("cache-means")
    device, dtype = decoder.model.device, decoder.model.dtype
    if log.done:
        kept = {name: mean.to(device) for name, mean in log.result(0)[0].items()}
        return [(kept[f"{_KINDS[0]}.{index}"], kept[f"{_KINDS[1]}.{index}"]) for index in range(len(decoder.blocks))]
    recorders = [_Recorder() for _ in decoder.blocks]
    hooks = [
        block.module.register_forward_pre_hook(recorder.before, with_kwargs=True)
        for block, recorder in zip(decoder.blocks, recorders, strict=True)
    ]
    try:
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
    means = [[(total / recorder.count).to(dtype) for total in recorder.totals] for recorder in recorders]
    log.finish({f"{name}.{i}": mean for i, both in enumerate(means) for name, mean in zip(_KINDS, both, strict=True)})
    return [(keys, values) for keys, values in means]
