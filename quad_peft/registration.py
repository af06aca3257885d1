"""What PEFT learns when it is imported: which layer carries a LoRA on a `QuadLinear`, and how to read our configs.

PEFT's types of adapters are closed, so some of its methods are wrapped. Models without QUAD layers and configs without
a fingerprint pass unchanged.
"""

import inspect
from collections.abc import Callable
from typing import Any

import wrapt


def connect_peft(_: object = None) -> None:
    """Wraps the methods; called once, after PEFT was imported."""
    wrapt.wrap_function_wrapper("peft.config", "PeftConfigMixin.from_peft_type", _read_config)
    wrapt.wrap_function_wrapper("peft.tuners.tuners_utils", "BaseTuner.inject_adapter", _inject_adapter)
    wrapt.wrap_function_wrapper("peft.tuners.lora.model", "LoraModel.add_weighted_adapter", _add_weighted_adapter)
    wrapt.wrap_function_wrapper("peft.peft_model", "PeftModel.get_nb_trainable_parameters", _count_parameters)
    wrapt.wrap_function_wrapper("peft.peft_model", "PeftModel._setup_prompt_encoder", _set_up_prompts)


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

        prepare_config(config, model, getattr(tuner, "target_module_mapping", None) or {})
    elif isinstance(config, OutlierLoraConfig):
        raise ValueError(
            f"an outlier adapter needs a QUAD checkpoint, but {type(model).__name__} has no QUAD layers; load one with "
            "AutoModelForCausalLM, without dequantize=True"
        )
    return wrapped(*args, **kwargs)


def _add_weighted_adapter(wrapped: Callable[..., Any], tuner: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Combines outlier adapters, whose A nobody can write to."""
    from quad_peft.combination import Combination, combine, is_outlier

    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    adapters, weights, name = (given.pop(key) for key in ("adapters", "weights", "adapter_name"))
    if not any(is_outlier(tuner, adapter) for adapter in adapters):
        return wrapped(*args, **kwargs)
    known = {key: value for key, value in given.items() if key in Combination._fields}
    return combine(tuner, adapters, weights, name, Combination(**known))


def _count_parameters(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Adds the numbers of packed weights, which are no parameters of torch, to those of the model."""
    from quad_modifiers.checkpoint.quad_model import packed_parameters

    trainable, total = wrapped(*args, **kwargs)
    return trainable, total + packed_parameters(model)


def _set_up_prompts(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Finds the embedding of a prompt-learning method by what it is: PEFT looks for a parameter of its size."""
    from quad_modifiers.nn.packed_table import is_packed

    embedding = model.base_model.get_input_embeddings() if hasattr(model.base_model, "get_input_embeddings") else None
    if embedding is None or not is_packed(embedding):
        return wrapped(*args, **kwargs)
    config = model.peft_config[inspect.signature(wrapped).bind(*args, **kwargs).arguments["adapter_name"]]
    start = getattr(config, "prompt_tuning_init", None)
    if config.peft_type == "CPT" or start not in (None, "RANDOM"):
        raise ValueError(
            f"{type(config).__name__} starts from rows of the embedding, which is an 8-bit table; write "
            "prompt_tuning_init='RANDOM', or load the checkpoint with dequantize=True"
        )
    result = wrapped(*args, **kwargs)
    model.word_embeddings = embedding
    return result
