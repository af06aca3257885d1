"""What a model in memory must be to be compressed or to teach: whole, plain, and all of it in memory."""

from typing import Any

from torch import nn


def check_source_model(model: nn.Module) -> None:
    """Refuses a model whose weights are elsewhere or that carries adapters.

    Raises:
        ValueError: with the remedy.
    """
    check_no_adapters(model)
    check_in_memory(model)


def check_in_memory(model: nn.Module) -> None:
    """Refuses a model that accelerate has offloaded, in part, to the disk or to another device.

    Raises:
        ValueError: naming the first such tensor and how the model is to be loaded.
    """
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"{away[0]} and {len(away) - 1} other weights are offloaded (device_map), but all have to be in memory; "
            'load the model without device_map, or with device_map="cpu"'
        )


def check_no_adapters(model: Any) -> None:
    """Refuses a model with adapters, by PEFT or by transformers' own `add_adapter`.

    Raises:
        ValueError: naming how they are merged.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the model has adapters ({', '.join(adapters or ['default'])}); merge them first: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload() is a plain model"
        )
