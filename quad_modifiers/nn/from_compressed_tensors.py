"""What a stock quantizer of llm-compressor leaves on a linear, in our terms.

The only module that knows compressed-tensors' marks on a module: scheme, status, scales.
"""

from typing import Any

import torch
from quad_kernels import QuantizedWeight
from quad_kernels.weight import expand_scales
from torch import nn


def reallocate_parameters(model: nn.Module) -> None:
    """Allocates scales for the new shapes where a stock quantizer had allocated them for the old ones."""
    from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization

    for module in model.modules():
        if type(module) is nn.Linear and scheme_of(module) is not None:
            initialize_module_for_quantization(module, scheme_of(module))


def scheme_of(module: nn.Module) -> Any:
    """Returns the quantization scheme that a stock modifier attached to a module, None without one."""
    return getattr(module, "quantization_scheme", None)


def is_frozen(module: nn.Module) -> bool:
    """Returns whether a stock modifier has quantized the weight of a module."""
    scheme = scheme_of(module)
    return scheme is not None and scheme.weights is not None and module.quantization_status == "frozen"


def stock_quantized_weight(linear: nn.Module) -> QuantizedWeight | None:
    """Returns the integers of a linear whose weight llm-compressor has frozen, None for one that it has not.

    llm-compressor keeps the rounded weight as floating point; the integers are found by dividing by the scales, which
    is exact for up to 4 bits, and for 8 without zero points.
    """
    if not is_frozen(linear):
        return None
    weights, columns = scheme_of(linear).weights, linear.in_features
    zero_point = None if weights.symmetric else linear.weight_zero_point
    scale = expand_scales(linear.weight_scale.float(), columns)
    integers = linear.weight.float() / torch.where(scale > 0, scale, torch.inf)  # a scale of 0 is that of zeros
    if zero_point is not None:
        integers = integers + expand_scales(zero_point.float(), columns)
        zero_point = zero_point.to(torch.int8)
    half = 2 ** (weights.num_bits - 1)
    integers = integers.round_().clamp_(-half, half - 1).to(torch.int8)
    return QuantizedWeight(integers, linear.weight_scale, zero_point, columns, linear.out_features, weights.num_bits)


def check_storable(linear: nn.Module, where: str) -> None:
    """Checks that a checkpoint can hold the weights of a linear, should llm-compressor have frozen them."""
    if not is_frozen(linear):
        return
    problem = unstorable_weights(scheme_of(linear).weights)
    if problem is not None:
        raise ValueError(f"{where}: {problem}")


def unstorable_weights(arguments: Any) -> str | None:
    """Returns why a checkpoint cannot hold weights with compressed-tensors' arguments, None if it can."""
    if arguments.type == "int" and arguments.num_bits in (2, 4, 8) and arguments.strategy in ("channel", "group"):
        return None
    return (
        f"weights of {arguments.num_bits} bits, type {arguments.type}, strategy {arguments.strategy} cannot be stored; "
        "use int, 2, 4 or 8 bits, per channel or group"
    )


def unstorable_inputs(arguments: Any) -> str | None:
    """Returns why a checkpoint cannot hold inputs with compressed-tensors' arguments, None if it can."""
    stated = arguments.type == "int" and arguments.dynamic is True and arguments.strategy in ("token", "group")
    if stated and 2 <= arguments.num_bits <= (8 if arguments.symmetric else 7):
        return None
    return (
        f"inputs of {arguments.num_bits} bits, type {arguments.type}, strategy {arguments.strategy}, "
        f"dynamic={arguments.dynamic}, symmetric={arguments.symmetric} cannot be stored; use DynamicActQuant, or "
        "dynamic integers of 2 to 8 bits (asymmetric ones of up to 7), per token or group"
    )
