"""The run-time arithmetic of a layer; the only module of this package that knows `quad_kernels`."""

from dataclasses import dataclass, replace

import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    QuantizedWeight,
    apply_hadamard,
    choose_backend,
    prepare_weight,
    quad_linear,
    quantize_activations,
)
from quad_kernels.hadamard import HadamardPlan, plan_hadamard
from quad_kernels.packing import pack_int32
from torch.nn.functional import linear

from quad_modifiers.checkpoint.format import LinearFormat, WeightFormat


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does with its input, without tensors.

    Attributes:
        split: how the input is divided.
        quantization: of the residual input, None to leave it as it is.
        transform: the online Hadamard, None without one.
        bits: width of the integers of the weight; None if the product is one of floating-point numbers.
        layout: layout of the weight that `prepare_residual` returned.
    """

    split: InputSplit
    quantization: InputQuantization | None
    transform: HadamardPlan | None
    bits: int | None
    layout: str = "int8"


def plan_layer(layer: LinearFormat) -> LayerPlan:
    """Returns the plan for a linear of a checkpoint."""
    split = layer.split()
    return LayerPlan(
        split=split,
        quantization=None if layer.input is None else layer.input.settings(),
        transform=plan_hadamard(split.residual_width) if split.hadamard else None,
        bits=None if layer.weight is None or layer.input is None else layer.weight.bits,
    )


def backend_name(device: torch.device) -> str:
    """Name of the kernel backend for tensors on `device`."""
    return str(choose_backend(device).name)


def kernel_key(device: torch.device) -> str:
    """Changes whenever prepared weights get another layout, so that a compiled graph is not reused for it."""
    words = torch.zeros(64, 8, dtype=torch.int32, device=device)
    scale = torch.ones(64, 1, device=device)
    sample = prepare_weight(words, scale, bits=4, in_features=64, quantization=InputQuantization())
    stored = sample.integers
    return f"{backend_name(device)} {sample.layout} {stored.dtype} {stored.layout} {list(stored.shape)}"


def prepare_residual(
    plan: LayerPlan,
    weight: WeightFormat,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> tuple[LayerPlan, dict[str, torch.Tensor]]:
    """Turns packed rows into what `apply_layer` reads: the plan with their layout, and tensors by name. Done at load.

    No kernel multiplies packed weights by floating-point inputs yet, so weight-only layers are expanded.

    Args:
        plan: of the layer.
        weight: format of the packed rows.
        packed: `[out, ceil(in * bits / 32)]`, int32.
        scale: `[out, groups]`, floating point.
        zero_point: `[out, groups]`, int8, or None.
    """
    words = None if zero_point is None else pack_int32(zero_point.T.contiguous(), weight.bits).T.contiguous()
    prepared = prepare_weight(
        packed,
        scale,
        bits=weight.bits,
        in_features=plan.split.residual_width,
        quantization=plan.quantization,
        zero_point=words,
    )
    if plan.bits is None:
        return plan, {"weight": prepared.dequantized(scale.dtype)}
    plan = replace(plan, layout=prepared.layout)
    tensors = {"weight_packed": prepared.integers, "weight_scale": prepared.scale}
    return plan, tensors if prepared.zero_point is None else {**tensors, "weight_zero_point": prepared.zero_point}


def apply_layer(
    plan: LayerPlan,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Applies a layer to `x`, `[..., in]`; plan and the other tensors are those of `prepare_residual`.

    Returns:
        `[..., out]`, dtype of `x`.
    """
    if plan.bits is not None and plan.quantization is not None and scale is not None:
        width, outputs = plan.split.residual_width, scale.shape[0]
        prepared = QuantizedWeight(weight, scale, zero_point, width, outputs, plan.bits, plan.layout)
        return quad_linear(x, prepared, plan.split, plan.quantization, outlier_weight=outlier_weight, bias=bias)
    outlier, residual = _floating_residual(plan, x)
    y = linear(residual, weight).float()
    if outlier is not None and outlier_weight is not None:
        y = y + linear(outlier, outlier_weight).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _floating_residual(plan: LayerPlan, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Outliers and the residual input as floating point, rounded to its grid where it is quantized."""
    if plan.quantization is None:
        outlier, residual = plan.split.divide(x)
        return outlier, residual if plan.transform is None else apply_hadamard(residual, plan.transform)
    outlier, integers, scale = quantize_activations(x, plan.quantization, plan.split)
    return outlier, (integers * scale.repeat_interleave(integers.shape[-1] // scale.shape[-1], dim=-1)).to(x.dtype)
