"""Weighted combinations of outlier adapters, behind PEFT's `add_weighted_adapter`.

The A of all outlier adapters picks the same coordinates. Their changes can be added up exactly, therefore, where those
of other LoRAs need a higher rank or an approximation.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from peft.utils import merge_utils

from quad_peft.config import OutlierLoraConfig
from quad_peft.layer import QuadLoraLayer

_SUMS = ("linear", "svd", "cat")  # all exact, and the same
_PRUNED = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
_ALIKE = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Combination(NamedTuple):
    """How changes are combined; the fields are the arguments of PEFT's `add_weighted_adapter`.

    Attributes:
        combination_type: "linear", "svd" and "cat" are the weighted sum; the others prune each change before that, and
            their variants "..._svd" are the same here.
        svd_rank: must be None: the rank is the model's.
        svd_clamp: must be None.
        density: share of each change that pruning keeps, 0 to 1.
        majority_sign_method: how "ties" elects signs.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"

    @property
    def method(self) -> str:
        """The combination type without the way in which PEFT approximates it."""
        return self.combination_type if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: for settings that outlier adapters cannot honour.
        """
        if self.method not in (*_SUMS, *_PRUNED):
            raise ValueError(
                f"combination_type is {self.combination_type!r}; outlier adapters have {', '.join((*_SUMS, *_PRUNED))}"
            )
        for name in ("svd_rank", "svd_clamp"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"outlier adapters are added up exactly, without {name} ({getattr(self, name)}); leave it out"
                )
        if self.method in _PRUNED and not (self.density is not None and 0 <= self.density <= 1):
            raise ValueError(f"combination_type {self.combination_type!r} needs a density from 0 to 1: {self.density}")

    def of(self, changes: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        """Returns the combination of changes of one shape, float32."""
        factors = torch.tensor(weights, device=changes[0].device)
        if self.method in _SUMS:
            return merge_utils.task_arithmetic(changes, factors)
        options = {"majority_sign_method": self.majority_sign_method} if self.method.endswith("ties") else {}
        return getattr(merge_utils, self.method)(changes, factors, self.density, **options)


def is_outlier(tuner: Any, adapter: str) -> bool:
    """Returns whether an adapter of a PEFT model is an outlier adapter."""
    return isinstance(tuner.peft_config.get(adapter), OutlierLoraConfig)


def combine(tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str, combination: Combination) -> None:
    """Adds an outlier adapter that is a combination of others; it is not active and not trained.

    Args:
        tuner: PEFT's LoraModel.
        adapters: names of outlier adapters.
        weights: a factor for each, of either sign.
        name: name of the new adapter.
        combination: how they are combined.

    Raises:
        ValueError: if they cannot be combined so; the model is unchanged then.
    """
    combination.check()
    tuner.peft_config[name] = _config(tuner, adapters, weights, name)
    try:
        tuner.inject_adapter(tuner.model, name)
    except BaseException:
        del tuner.peft_config[name]
        raise
    factors = dict(zip(adapters, weights, strict=True))
    for layer in tuner.model.modules():
        if isinstance(layer, QuadLoraLayer) and name in layer.lora_B:
            _fill(layer, factors, name, combination)


def _config(tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str) -> OutlierLoraConfig:
    """Returns the config of the new adapter."""
    if name in tuner.peft_config:
        raise ValueError(f"there is an adapter {name!r} already; choose another name, or delete it first")
    if len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(f"{len(weights)} weights for adapters {list(adapters)}; each is named once and has one weight")
    unknown = [adapter for adapter in adapters if adapter not in tuner.peft_config]
    if unknown:
        raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(tuner.peft_config)}")
    others = [adapter for adapter in adapters if not is_outlier(tuner, adapter)]
    if others:
        raise ValueError(
            f"adapter {others[0]!r} is no outlier adapter, and cannot be combined with one; activate both instead, "
            f"with model.base_model.set_adapter({list(adapters)})"
        )
    configs = [tuner.peft_config[adapter] for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        if config.train_weights:
            raise ValueError(
                f"adapter {adapter!r} changes the integers of the weights, which cannot be combined; merge it"
            )
        if config.modules_to_save or config.trainable_token_indices:
            raise ValueError(f"adapter {adapter!r} has modules_to_save or trainable tokens, which cannot be combined")
        differing = [field for field in _ALIKE if getattr(config, field) != getattr(configs[0], field)]
        if differing:
            raise ValueError(f"adapters {adapters[0]!r} and {adapter!r} differ in {differing[0]}: not combined")
    return replace(
        configs[0],
        r=0,
        lora_alpha=0,
        rank_pattern={},
        alpha_pattern={},
        target_modules=set().union(*(config.target_modules for config in configs)),
        train_weight_scales=any(config.train_weight_scales for config in configs),
    )


@torch.no_grad()
def _fill(layer: QuadLoraLayer, factors: dict[str, float], name: str, combination: Combination) -> None:
    """Sets the new adapter of one layer."""
    present = [adapter for adapter in factors if adapter in layer.lora_B]
    scaled = [adapter for adapter in present if adapter in layer.lora_weight_scale]
    weights = [factors[adapter] for adapter in present]
    changes = [layer.outlier_change(adapter) for adapter in present]
    layer.lora_B[name].weight.copy_(combination.of(changes, weights))
    layer.lora_B[name].weight.requires_grad_(False)
    if name in layer.lora_weight_scale:
        target = layer.lora_weight_scale[name].requires_grad_(False)
        if scaled:
            changes = [layer.scale_change(adapter) for adapter in scaled]
            target.copy_(combination.of(changes, [factors[adapter] for adapter in scaled]))
