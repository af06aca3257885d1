"""Outlier adapters of random values, and what a model says with each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def random_adapters(
    model: Any, folder: Path, scale: float, ask: Callable[[Any], torch.Tensor]
) -> dict[str, tuple[Path, torch.Tensor]]:
    """Save two adapters, "first" and "second", and return for each its folder and `ask` of the model that has it."""
    from quad_peft import OutlierLoraConfig, get_outlier_model

    adapted = get_outlier_model(model, adapter_name="first")
    adapted.add_adapter("second", OutlierLoraConfig())
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)  # a folder for each, by its name
    found = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        found[name] = (folder / name, ask(adapted))
    adapted.unload()
    return found
