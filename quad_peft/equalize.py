"""Gives the outlier coordinates of a layer like weight in training.

They are principal directions, so their magnitudes differ tenfold. Adam moves every number of B alike, regardless of its
input is: without this, the largest coordinates would take most of the change, and most of the noise of small batches.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from quad_peft.layer import QuadLoraLayer
from quad_peft.selector import OutlierSelector

_SMALLEST = 2.0**-10  # of the largest coordinate: what is smaller counts as this


@torch.no_grad()
def equalize_outliers(model: nn.Module, samples: Iterable[torch.Tensor], adapter_name: str = "default") -> None:
    """Scales the rows of A, so that every outlier coordinate has about the median magnitude of its layer.

    The scales are powers of two, exact in every dtype. A fresh adapter still changes nothing, and the saved one is
    still a LoRA: A holds the scales.

    Args:
        model: model with a fresh outlier adapter; other models and adapters are left as they are.
        samples: token ids `[tokens]`; a few hundred tokens are enough.
        adapter_name: name of the adapter.

    Raises:
        ValueError: if the adapter is trained already: other scales would change what it does.
    """
    adapted = [each for each in model.modules() if isinstance(each, QuadLoraLayer) and adapter_name in each.lora_A]
    layers = [layer for layer in adapted if isinstance(layer.lora_A[adapter_name], OutlierSelector)]
    if not layers:
        return
    if any(bool(layer.lora_B[adapter_name].weight.any()) for layer in layers):
        raise ValueError(f"adapter {adapter_name!r} is trained already; its inputs can be scaled only before")
    squares: dict[QuadLoraLayer, torch.Tensor] = {}
    hooks = [layer.register_forward_pre_hook(partial(_add_squares, squares)) for layer in layers]
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for sample in samples:
            model(input_ids=sample.unsqueeze(0).to(device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for layer, total in squares.items():
        if not total.max() > 0:
            continue  # dead inputs: nothing to equalize
        magnitude = total.sqrt().clamp(min=float(total.max()) ** 0.5 * _SMALLEST)
        layer.lora_A[adapter_name].scale = (magnitude.median() / magnitude).log2().round().exp2().cpu()


def _add_squares(squares: dict[QuadLoraLayer, torch.Tensor], layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    outlier, _ = layer.get_base_layer().split.divide(inputs[0])
    squares[layer] = squares.get(layer, 0.0) + outlier.float().flatten(0, -2).pow(2).sum(0)
