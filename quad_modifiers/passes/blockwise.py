"""Runs a decoder one block at a time, in segments that end at the inputs of its linears.

A block's weights are float32 while it is worked on, so that a model never has to fit in memory at full precision; its
products are bfloat16 where that is fast, the residual stream is float32. Each segment is computed once: the captured
input of a linear is reused to continue after the linear has been changed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from quad_modifiers.model.architecture import Architecture


@dataclass
class CalibrationBatch:
    """One batch on its way through the model.

    Attributes:
        hidden: residual stream, `[batch, tokens, hidden]`, float32.
        arguments: per block, the keyword arguments it is called with (positions, masks).
        keep: `[batch, tokens]` bool, False for padding; None if there is none.
    """

    hidden: torch.Tensor
    arguments: list[dict[str, Any]]
    keep: torch.Tensor | None

    def tokens(self, activations: torch.Tensor) -> torch.Tensor:
        """Returns the activations of real tokens, `[n, width]`."""
        if self.keep is None:
            return activations.flatten(0, -2)
        return activations[self.keep.to(activations.device)]


class _Stop(Exception):
    """Ends a forward pass once the wanted input was seen."""


def _capture(module: nn.Module, run: Callable[[], Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the first positional input and the keyword arguments of `module` while `run` executes."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        first = args[0] if args else rest.pop("hidden_states")
        seen.append((first, rest))
        raise _Stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def working_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cuda.is_bf16_supported()


@torch.no_grad()
def first_block_inputs(
    model: nn.Module, architecture: Architecture, batches: list[dict[str, torch.Tensor]]
) -> list[CalibrationBatch]:
    """Returns the inputs of the first decoder block for each batch (`input_ids`, optional `attention_mask`).

    The blocks themselves are passed over: each only records the arguments it is called with, which differ between
    blocks where some attend to a sliding window.
    """
    layers = list(model.get_submodule(architecture.layers).children())
    decoder = model.get_submodule(architecture.layers.rpartition(".")[0])
    device = model.get_submodule(architecture.embedding).weight.device
    collected = []
    for batch in batches:
        mask = batch.get("attention_mask")
        keep = None if mask is None or bool(mask.all()) else mask.bool()
        call: dict[str, Any] = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
        if mask is not None and keep is not None:
            call["attention_mask"] = mask.to(device)
        with _recorded(layers) as seen:
            decoder(**call)
        converted: dict[int, torch.Tensor] = {}  # blocks share their arguments: so do the copies
        arguments = [tree_map(partial(_shared_copy, converted), kwargs) for _, kwargs in seen]
        collected.append(CalibrationBatch(_to_working(seen[0][0]), arguments, keep))
    return collected


@contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
    """Replaces blocks by identities that record their calls."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args, "transformers calls decoder blocks with keyword arguments"
        seen.append((hidden_states, kwargs))
        return hidden_states

    for layer in layers:
        layer.forward = record
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.forward


def _shared_copy(converted: dict[int, torch.Tensor], value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return converted.setdefault(id(value), _to_working(value))


def _to_working(value: torch.Tensor) -> torch.Tensor:
    return value.to(working_device(), torch.float32 if value.is_floating_point() else value.dtype)


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Holds a decoder block in float32 on the working device; it returns to the dtype and device it had."""
    first = next(layer.parameters())
    dtype, device = first.dtype, first.device
    layer.to(device=working_device(), dtype=torch.float32)
    try:
        yield
    finally:
        layer.to(device=device, dtype=dtype)


class BlockSegments:
    """The computation of one pre-norm decoder block, cut at the inputs of its linears."""

    def __init__(self, layer: nn.Module, architecture: Architecture) -> None:
        self.attention = layer.get_submodule(architecture.attention)
        self.mlp = layer.get_submodule(architecture.mlp)
        self.attention_norm = layer.get_submodule(architecture.attention_norm)
        self.mlp_norm = layer.get_submodule(architecture.mlp_norm)
        self.attention_output = self.attention.get_submodule(architecture.attention_output)
        self.mlp_output = self.mlp.get_submodule(architecture.mlp_output)

    def _compute(self) -> AbstractContextManager[Any]:
        """Linears and attention in bfloat16 where that is fast; the residual stream stays float32."""
        device = working_device()
        return torch.autocast(device.type, torch.bfloat16, enabled=_fast_bfloat16(device))

    def attention_core(self, normed: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Input of o_proj from the output of the attention norm."""
        with self._compute():
            return _capture(self.attention_output, lambda: self.attention(hidden_states=normed, **arguments))[0].float()

    def after_attention(self, hidden: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
        """The stream after o_proj."""
        with self._compute():
            return hidden + self.attention_output(core)

    def mlp_core(self, normed: torch.Tensor) -> torch.Tensor:
        """Input of down_proj from the output of the MLP norm."""
        with self._compute():
            return _capture(self.mlp_output, lambda: self.mlp(normed))[0].float()

    def after_mlp(self, hidden: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
        """The stream after down_proj."""
        with self._compute():
            return hidden + self.mlp_output(core)

    def forward(self, hidden: torch.Tensor, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The whole block: inputs of all linears, the stream after attention (`middle`) and the block's `output`."""
        attention_input = self.attention_norm(hidden)
        attention_core = self.attention_core(attention_input, arguments)
        middle = self.after_attention(hidden, attention_core)
        mlp_input = self.mlp_norm(middle)
        mlp_core = self.mlp_core(mlp_input)
        return {
            "attention_input": attention_input,
            "attention_core": attention_core,
            "middle": middle,
            "mlp_input": mlp_input,
            "mlp_core": mlp_core,
            "output": self.after_mlp(middle, mlp_core),
        }
