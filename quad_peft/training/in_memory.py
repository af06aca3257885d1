"""A model that was compressed in this process, made ready for training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quad_modifiers.checkpoint.save import packed_tensors
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear


@contextmanager
def packed_residuals(model: nn.Module) -> Iterator[None]:
    """Puts packed weights in place of the quantized residual weights, so that the model runs as its checkpoint will.

    The linears that llm-compressor knows come back afterwards, with the scales as they are then.

    Raises:
        ValueError: if llm-compressor's own quantization of inputs is in the way, which has no gradient.
    """
    replaced: list[tuple[QuadLinear, nn.Module]] = []
    for name, container in model.named_modules():
        if not isinstance(container, QuadLinear):
            continue
        scheme = getattr(container.residual, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations is not None:
            raise ValueError(
                f"{name}: its inputs are quantized by a stock modifier, through which nothing can be trained; use "
                "DynamicActQuant and OutlierSplitGPTQ"
            )
        if container.quantize_input and isinstance(container.residual, nn.Linear) and container.weight_bits():
            replaced.append((container, container.residual))
            container.residual = _packed(container)
    try:
        yield
    finally:
        for container, linear in replaced:
            _take_scales(linear, container.residual)
            container.residual = linear


@torch.no_grad()
def _packed(container: QuadLinear) -> PackedLinear:
    linear, weight, bits = container.residual, container.integer_weight(), container.weight_bits()
    assert weight is not None
    assert bits is not None
    packed = PackedLinear(
        linear.in_features,
        linear.out_features,
        bits,
        linear.quantization_scheme.weights.group_size,
        weight.zero_point is None,
        weight.scale.dtype,
        container.input_quantization,
    )
    for name, tensor in packed_tensors(weight, bits, "").items():
        setattr(packed, name.removeprefix("."), tensor.clone())
    return packed


@torch.no_grad()
def _take_scales(linear: nn.Module, packed: nn.Module) -> None:
    if torch.equal(linear.weight_scale, packed.weight_scale.to(linear.weight_scale.device)):
        return
    linear.weight_scale.copy_(packed.weight_scale)
    linear.weight.copy_(packed.dequantized(linear.weight.dtype))
