"""The residual stream on its way through a decoder, one block at a time.

A block's weights are float32 while it is worked on, so that a model never has to fit in memory at full precision; its
products are bfloat16 where that is fast, the residual stream is float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.on_disk import on_disk, rest, unchanged_kept
from quad_modifiers.ranks import is_own_part, part_of

TOKENS_AT_ONCE = 2048
"""Tokens for which weights are converted and moments summed once; more no longer pays."""


@dataclass
class CalibrationBatch:
    """One batch on its way through the model.

    Attributes:
        hidden: residual stream, `[batch, tokens, hidden]`, float32.
        arguments: per block, the keyword arguments it is called with (positions, masks).
        keep: `[batch, tokens]` bool, False for padding; None if there is none.
        number: which one of the run it is.
        part: of the batches, that is summed up on its own (`quad_modifiers.ranks`).
    """

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]
    keep: torch.Tensor | None
    number: int = 0
    part: int = 0

    def tokens(self, activations: torch.Tensor) -> torch.Tensor:
        """Returns the activations of real tokens, `[n, width]`.

        What a block has picked out of the batch for one of its parts, such as an expert's tokens, is taken whole.
        """
        if self.keep is None or activations.shape[:-1] != self.keep.shape:
            return activations.flatten(0, -2)
        return activations[self.keep.to(activations.device)]


_chosen: ContextVar[str | None] = ContextVar("_chosen", default=None)


def working_device() -> torch.device:
    """The device of `work_on`; without one the GPU if there is one, else the CPU."""
    return torch.device(_chosen.get() or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def work_on(device: str | None) -> Iterator[None]:
    """Runs the passes inside on `device`, on the usual one if it is None."""
    token = _chosen.set(device)
    try:
        yield
    finally:
        _chosen.reset(token)


def fast_products() -> AbstractContextManager[Any]:
    """Linears and attention in bfloat16 where that is fast; the residual stream stays float32."""
    device = working_device()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


@torch.no_grad()
def first_block_inputs(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], shared: bool = False
) -> list[CalibrationBatch]:
    """Returns the inputs of the first decoder block for each batch (`input_ids`, optional `attention_mask`).

    The blocks themselves are passed over: each only records the arguments it is called with, which differ between
    blocks where some attend to a sliding window. Short batches of one length and without padding become one.

    Args:
        decoder: the model.
        batches: of calibration text.
        shared: whether the ranks of the run divide the batches among them; then this is the share of this one.
    """
    layers, backbone = [block.module for block in decoder.blocks], decoder.backbone
    device = decoder.embedding.weight.device
    collected = []
    merged = list(_merged(batches))
    for number, batch in enumerate(merged):
        part = part_of(number, len(merged))
        if shared and not is_own_part(part):
            continue
        mask = batch.get("attention_mask")
        keep = None if mask is None or bool(mask.all()) else mask.bool()
        call: dict[str, Any] = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
        if mask is not None and keep is not None:
            call["attention_mask"] = mask.to(device)
        with _recorded(layers, decoder.final_norm) as seen:
            backbone(**call)
        converted: dict[int, torch.Tensor] = {}  # blocks share their arguments: so do the copies
        arguments = [tree_map(partial(_shared_copy, converted), kwargs) for _, kwargs in seen]
        collected.append(CalibrationBatch(on_disk(_to_working(seen[0][0])), arguments, keep, number, part))
    return collected


def in_parts(stream: Sequence[CalibrationBatch]) -> Iterator[list[int]]:
    """Yields the places in a stream of the batches of each part."""
    for _, places in groupby(range(len(stream)), lambda place: stream[place].part):
        yield list(places)


def _merged(batches: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Neighbours of the same length without padding as one batch of up to `TOKENS_AT_ONCE` tokens."""
    pending: list[torch.Tensor] = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        tokens = sum(each.numel() for each in pending) + ids.numel()
        if pending and (padded or pending[0].shape[1] != ids.shape[1] or tokens > TOKENS_AT_ONCE):
            yield {"input_ids": torch.cat(pending)}
            pending = []
        if padded:
            yield batch
        else:
            pending.append(ids)
    if pending:
        yield {"input_ids": torch.cat(pending)}


@contextmanager
def _recorded(layers: list[nn.Module], norm: nn.Module) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
    """Replaces blocks by identities that record their calls, and the norm behind them, which may multiply, by one."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args, "transformers calls decoder blocks with keyword arguments"
        seen.append((hidden_states, kwargs))
        return hidden_states

    for layer in layers:
        layer.forward = record
    norm.forward = lambda hidden_states: hidden_states
    try:
        yield seen
    finally:
        for module in (*layers, norm):
            del module.forward


def _shared_copy(converted: dict[int, torch.Tensor], value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return converted.setdefault(id(value), _to_working(value))


def _to_working(value: torch.Tensor) -> torch.Tensor:
    return value.to(working_device(), torch.float32 if value.is_floating_point() else value.dtype)


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Holds a decoder block in float32 on the working device; it returns to the dtype, device and disk it had."""
    first = next(layer.parameters())
    dtype, device = first.dtype, first.device
    with unchanged_kept(layer):
        layer.to(device=working_device(), dtype=torch.float32)
        try:
            yield
        finally:
            layer.to(device=device, dtype=dtype)
    rest(layer)
