"""A modifier that clips far-out weights of linears, so that a quantizer after it spends no range on them."""

from typing import Any

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field


class WeightClip(Modifier):
    """Clip each output channel of every linear to `sigmas` standard deviations around its mean.

    Lifecycle:
        - on_initialize: clips in place; needs no calibration data
    """

    sigmas: float = Field(default=6.0, gt=0, description="half width of the range kept, in standard deviations")
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"], description="names of linears left alone")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Clip the weights of `state.model`."""
        for name, module in state.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in self.ignore:
                self._clip(module.weight)
        return True

    @torch.no_grad()
    def _clip(self, weight: torch.Tensor) -> None:
        """Clip `weight` [out, in] in place."""
        mean = weight.mean(dim=1, keepdim=True)
        reach = self.sigmas * weight.std(dim=1, keepdim=True)
        weight.copy_(torch.clamp(weight, mean - reach, mean + reach))
