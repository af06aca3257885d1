"""Which linears of a decoder a modifier would reach, told from its `targets` and `ignore` without a model.

The names are those of the supported architectures. After a projection, a linear that reads the residual
stream is a container whose children `outlier` and `residual` are linears.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers import Modifier

U_TYPE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
D_TYPE = ("self_attn.o_proj", "mlp.down_proj")
LAYERS = 64
"""Layers in the sample; targets that name one layer beyond it are taken to reach nothing."""


@functools.cache
def layer_names(roles: tuple[str, ...], child: str = "") -> tuple[str, ...]:
    """Return the names of the given linears in every layer, or of their children `child`."""
    end = f".{child}" if child else ""
    return tuple(f"model.layers.{layer}.{role}{end}" for layer in range(LAYERS) for role in roles)


@functools.cache
def weight_names() -> tuple[str, ...]:
    """Return the names of the linears that hold the weights to quantize, in containers or not, and `lm_head`."""
    return (*layer_names(U_TYPE + D_TYPE), *layer_names(U_TYPE + D_TYPE, "residual"), "lm_head")


def outlier_names(projection: Modifier) -> tuple[str, ...]:
    """Return the names of the full-precision outlier linears that a projection adds.

    `rank` above zero adds them to U-type linears, `down_proj_rank` to down_proj, and so on; a projection with
    no field of that kind is taken to add them to U-type linears.
    """
    ranks = [name for name in type(projection).model_fields if name == "rank" or "_rank" in name]
    roles: tuple[str, ...] = () if ranks and not getattr(projection, "rank", 0) else U_TYPE
    for role in D_TYPE:
        linear = role.rpartition(".")[2]
        if any(name.startswith(f"{linear}_rank") and getattr(projection, name) for name in ranks):
            roles += (role,)
    return layer_names(roles, "outlier")


def matching(names: Iterable[str], targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    """Return the names that compressed-tensors would match, each taken to be a `torch.nn.Linear`."""
    import torch
    from compressed_tensors.utils.match import is_match

    linear = torch.nn.Linear(1, 1, device="meta")
    targets, ignore = list(targets), list(ignore)
    return {name for name in names if is_match(name, linear, targets, ignore)}


def matching_containers(targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    """Return the names of the containers that a projection makes and that the targets name themselves.

    A target that matches the children as well ("re:.*q_proj.*") is not counted: it is meant for them.
    """
    import torch
    from compressed_tensors.utils.match import is_match

    container, ignore = torch.nn.Module(), list(ignore)
    residual = layer_names(U_TYPE + D_TYPE, "residual")
    own = [target for target in targets if not matching(residual, [target], [])]
    return {name for name in layer_names(U_TYPE + D_TYPE) if is_match(name, container, own, ignore)}


def stock_schemes(modifier: Modifier) -> list[QuantizationScheme]:
    """Return the quantization schemes of one of llm-compressor's quantizing modifiers, none for any other."""
    from llmcompressor.modifiers.quantization import QuantizationMixin

    if not isinstance(modifier, QuantizationMixin):
        return []
    return list(modifier.resolved_config.config_groups.values())


def covered(modifier: Modifier, part: str, names: tuple[str, ...]) -> set[str]:
    """Return which of `names` a modifier quantizes; `part` is "weights" or "input_activations"."""
    from llmcompressor.modifiers.quantization import QuantizationMixin

    ignore = getattr(modifier, "ignore", None)
    if isinstance(modifier, QuantizationMixin):
        targets = [target for each in stock_schemes(modifier) if getattr(each, part) for target in each.targets]
        return matching(names, targets, ignore or [])
    if ignore is None:  # ours: without the field, lm_head is not touched
        ignore = ["lm_head"]
    return matching(names, getattr(modifier, "targets", None) or ["Linear"], ignore)
