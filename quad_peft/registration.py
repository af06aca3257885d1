"""What PEFT learns when it is imported: which layer carries a LoRA on a `QuadLinear`, and how to read our configs.

PEFT's types of adapters are closed, so two of its methods are wrapped. Models without QUAD layers and configs without a
fingerprint pass unchanged.
"""

import inspect
from collections.abc import Callable
from typing import Any

import wrapt


def connect_peft(_: object = None) -> None:
    """Wraps the methods; called once, after PEFT was imported."""
    wrapt.wrap_function_wrapper("peft.config", "PeftConfigMixin.from_peft_type", _read_config)
    wrapt.wrap_function_wrapper("peft.tuners.lora.model", "LoraModel.inject_adapter", _inject_adapter)


def _read_config(wrapped: Callable[..., Any], cls: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Reads an adapter_config.json that names its base as an `OutlierLoraConfig`."""
    if "base_fingerprint" not in kwargs:
        return wrapped(*args, **kwargs)
    from quad_peft.config import OutlierLoraConfig

    return OutlierLoraConfig(**kwargs)


def _inject_adapter(wrapped: Callable[..., Any], tuner: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Prepares an adapter's config before PEFT puts its layers into a model."""
    from quad_modifiers.nn.quad_linear import QuadLinear
    from quad_peft.config import OutlierLoraConfig

    bound = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    model, config = bound["model"], tuner.peft_config[bound["adapter_name"]]
    if any(isinstance(module, QuadLinear) for module in model.modules()):
        from quad_peft.model import prepare_config

        prepare_config(config, model)
    elif isinstance(config, OutlierLoraConfig):
        raise ValueError(
            f"an outlier adapter needs a QUAD checkpoint, but {type(model).__name__} has no QUAD layers; load one with "
            "AutoModelForCausalLM, without dequantize=True"
        )
    return wrapped(*args, **kwargs)
