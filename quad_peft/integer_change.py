"""Trained changes of a quantized weight's integers.

A change is counted in steps of the grid, a real number that is rounded where it is used. Zero is the checkpoint, and a
weight moves to the next integer once its change has gone half a step: see docs/developer/finetuning.md.
"""

from typing import Any

import torch
from quad_kernels import QuantizedWeight, choose_backend
from torch import nn

from quad_modifiers.nn.forward import changed_integers
from quad_modifiers.nn.packed_linear import PackedLinear


class IntegerChanges(nn.ParameterDict):
    """The changes of one weight by adapter, `[out, in]`, float32.

    Whole numbers, as `fix` leaves them, are saved in int8: a quarter of the bytes.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, change in self.items():
            held = change.detach()
            if not held.is_meta and bool((held == held.round()).all()) and bool((held.abs() < 128).all()):
                destination[f"{prefix}{name}"] = held.to(torch.int8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self:
            loaded = state_dict.get(f"{prefix}{name}")
            if loaded is not None:
                state_dict[f"{prefix}{name}"] = loaded.float()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ChangedWeight:
    """The weight of a `PackedLinear` with changes, as the kernels read it.

    It is made anew at every forward pass that trains the changes, since optimizers may write to parameters unnoticed,
    and kept otherwise.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._kept: QuantizedWeight | None = None

    def of(self, linear: PackedLinear, changes: list[torch.Tensor]) -> QuantizedWeight:
        """Returns the weight with the sum of the changes, each rounded; its scale is that of `linear`."""
        if torch.is_grad_enabled() and any(change.requires_grad for change in changes):
            self._kept = None
            return prepared(linear, changes)
        key = (id(linear), *((id(change), change.data_ptr(), change._version) for change in changes))
        if self._kept is None or key != self._key:
            self._key, self._kept = key, prepared(linear, changes)
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernels' layouts cannot be copied."""
        return {"_key": (), "_kept": None}


@torch.no_grad()
def prepared(linear: PackedLinear, changes: list[torch.Tensor]) -> QuantizedWeight:
    """Returns the changed weight in the layout of the kernels."""
    weight = stored(linear, changes)
    return choose_backend(weight.integers.device).prepare_weight(weight, linear.input_quantization)


@torch.no_grad()
def stored(linear: PackedLinear, changes: list[torch.Tensor]) -> QuantizedWeight:
    """Returns the changed weight in layout int8."""
    total = changes[0] if len(changes) == 1 else sum((change.round() for change in changes[1:]), changes[0].round())
    return changed_integers(linear.quantized_weight(), total)


@torch.no_grad()
def fix_integers(model: nn.Module) -> int:
    """Rounds all changes of a model, which alters nothing that it computes, and ends their training.

    Returns:
        Number of integers that differ from the checkpoint's.
    """
    moved = 0
    for module in model.modules():
        if isinstance(module, IntegerChanges):
            for change in module.values():
                change.round_()
                change.requires_grad_(False)
                moved += int(change.count_nonzero())
    return moved


@torch.no_grad()
def scatter_changes(model: nn.Module, seed: int = 0) -> None:
    """Spreads changes that are all zero evenly over (-0.5, 0.5), which is still no change of an integer.

    Adam moves every number alike. From zero, all of them would reach the next integer in the same step; so a step of
    length d moves the share d of the integers, and the weight on average by what it would without rounding.

    Args:
        model: model with changes of integers; those that are not zero are left alone.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for change in integer_changes(model):
        if not bool(change.any()):
            spread = torch.rand(change.shape, generator=generator).sub_(0.5).clamp_(-0.499, 0.499)
            change.copy_(spread)


def integer_changes(model: nn.Module) -> list[nn.Parameter]:
    """Returns all changes of integers in a model, `[out, in]` each."""
    return [change for module in model.modules() if isinstance(module, IntegerChanges) for change in module.values()]
