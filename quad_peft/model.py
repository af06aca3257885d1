"""From a QUAD checkpoint to a PEFT model that trains its outlier weights."""

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft.config import OutlierLoraConfig
from quad_peft.fingerprint import base_fingerprint
from quad_peft.layer import QuadLoraLayer
from quad_peft.targets import check_targets, set_usual_targets

logger = logging.getLogger(__name__)


def get_outlier_model(
    model: nn.Module, config: OutlierLoraConfig | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Adds an outlier adapter to a QUAD model and freezes everything else (QUAD paper, section 4.3).

    The result is a stock `PeftModel`; it works with `Trainer` and saves a PEFT LoRA folder.

    Args:
        model: QUAD checkpoint loaded with `AutoModelForCausalLM`.
        config: config of the adapter; all outlier weights by default. It is not changed.
        adapter_name: name of the adapter.

    Raises:
        ValueError: if the model is not a QUAD checkpoint, or has no outlier weights.
    """
    if not any(isinstance(module, QuadLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no QUAD layers; load a QUAD checkpoint with AutoModelForCausalLM (without "
            "dequantize=True), or make one with quad_modifiers.oneshot"
        )
    config = OutlierLoraConfig() if config is None else replace(config)
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    trainable, total = peft_model.get_nb_trainable_parameters()
    logger.info("trainable parameters: %s (%.2f %% of %s)", f"{trainable:,}", 100 * trainable / total, f"{total:,}")
    return peft_model


def prepare_config(config: Any, model: nn.Module, usual: dict[str, Any]) -> None:
    """Gives an adapter's config what PEFT needs to put it into a QUAD model; PEFT calls this through registration.

    Args:
        config: config of any PEFT method.
        model: model with QUAD layers.
        usual: PEFT's targets by model type, of that method.

    Raises:
        ValueError: if the model cannot take the adapter; it is unchanged then.
    """
    if isinstance(config, OutlierLoraConfig):
        _check_base(config, model)
        _fit(config, model)
    set_usual_targets(config, model, usual)
    check_targets(config, model)
    if isinstance(config, LoraConfig):
        config._register_custom_module({QuadLinear: QuadLoraLayer})


def _check_base(config: OutlierLoraConfig, model: nn.Module) -> None:
    found = base_fingerprint(model)
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif found is None:
        logger.warning("the model's weights are not in memory: whether the adapter belongs to it was not checked")
    elif config.base_fingerprint != found:
        raise ValueError(
            f"the adapter was trained on another checkpoint (fingerprint {config.base_fingerprint}, "
            f"{config.base_model_name_or_path or 'of no name'}); this one has {found}. "
            "Outlier coordinates mean nothing on a checkpoint other than their own"
        )


def _fit(config: OutlierLoraConfig, model: nn.Module) -> None:
    """Fills in targets and ranks."""
    layers = [module for module in model.modules() if isinstance(module, QuadLinear)]
    ranks = {layer.role: layer.split.rank for layer in layers if layer.split.rank}
    if not ranks:
        raise ValueError(
            "the checkpoint has no outlier weights to train (rank 0, as in quarot_w4a4); compress with a recipe of "
            "rank 16 or more, or train a LoraConfig, which works on it too"
        )
    if config.target_modules is None:
        config.target_modules = set(ranks)
    if isinstance(config.target_modules, str):
        raise ValueError(
            f"target_modules ({config.target_modules!r}) of an outlier adapter is a list of roles; choose from "
            f"{', '.join(sorted(ranks))}"
        )
    unknown = sorted(set(config.target_modules) - set(ranks))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no outlier weights there; choose from {', '.join(sorted(ranks))}")
    wanted = {role: rank for role, rank in ranks.items() if role in config.target_modules}
    common = Counter(wanted.values()).most_common(1)[0][0]
    if config.r not in (0, common):
        raise ValueError(
            f"r ({config.r}) must be the model's rank ({', '.join(f'{k} {v}' for k, v in sorted(wanted.items()))}); "
            "leave it out"
        )
    others = {role: rank for role, rank in wanted.items() if rank != common}
    taken: tuple[tuple[str, Any, Any], ...] = (
        ("lora_alpha", config.lora_alpha, common),
        ("rank_pattern", config.rank_pattern, others),
        ("alpha_pattern", config.alpha_pattern, others),
    )
    for name, given, found in taken:
        if given and given != found:
            raise ValueError(
                f"{name} ({given}) of an outlier adapter comes from the model, where it is {found}: the adapter has "
                "the model's ranks and is not scaled; leave it out"
            )
    config.r = config.lora_alpha = common
    config.rank_pattern, config.alpha_pattern = dict(others), dict(others)
