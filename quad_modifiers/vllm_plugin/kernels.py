"""What vLLM's layers and the kernels have to tell each other."""

from dataclasses import replace

import torch
from quad_kernels import InputQuantization, QuantizedWeight, choose_backend, prepare_weight
from quad_kernels.float4 import scale_of_stored

from quad_modifiers.checkpoint.format import LinearFormat
from quad_modifiers.vllm_plugin.weight_only import instructions as weight_only_instructions
from quad_modifiers.vllm_plugin.weight_only import is_available


def backend_name(device: torch.device) -> str:
    """Returns the name of the kernel backend for tensors on `device`."""
    return str(choose_backend(device).name)


def kernel_key(device: torch.device) -> str:
    """Returns a text that changes whenever prepared weights get another layout: compiled graphs depend on it."""
    words = torch.zeros(64, 8, dtype=torch.int32, device=device)
    scale = torch.ones(64, 1, device=device)
    sample = prepare_weight(words, scale, bits=4, in_features=64, quantization=InputQuantization())
    stored = sample.integers
    weight_only = "packed, " + _instructions() if device.type == "cpu" else "expanded"
    layout = f"{sample.layout} {stored.dtype} {stored.layout} {list(stored.shape)}"
    return f"{backend_name(device)} {layout}; weight-only {weight_only}"


def _instructions() -> str:
    return weight_only_instructions(torch.bfloat16) if is_available() else "without an operator of vLLM"


def prepare_rows(linear: LinearFormat, stored: dict[str, torch.Tensor]) -> QuantizedWeight | torch.Tensor:
    """Turns packed rows into the weight that the layer computes with; done once, at load.

    Weight-only layers stay packed on the CPU. On other devices no kernel of ours multiplies packed weights by
    floating-point inputs, so they are expanded.

    `stored` has `weight_packed` `[out, ceil(in * bits / 32)]`, int32, `weight_scale` `[out, groups]`, floating point,
    and `weight_zero_point` or `weight_sub_scale` `[out, groups]`, int8, if there are any; of floating-point numbers
    `weight_packed` is `[out, in / 2]`, uint8, `weight_scale` as a checkpoint has it, `weight_global_scale` `[out, 1]`.
    Expanded weights are `[out, in]` in the dtype of the scales, of floating-point numbers bfloat16.
    """
    assert linear.weight is not None
    bits, width, number_format = linear.weight.bits, linear.split().residual_width, linear.weight.number_format
    if number_format != "int":
        steps = scale_of_stored(stored["weight_scale"], stored.get("weight_global_scale"))
        return _prepared(QuantizedWeight.of_float4(stored["weight_packed"], steps, number_format), linear)
    scale, sub_scale = stored["weight_scale"], stored.get("weight_sub_scale")
    weight = replace(
        QuantizedWeight.from_words(stored["weight_packed"], scale, bits, width),
        zero_point=stored.get("weight_zero_point"),
        sub_scale=None if sub_scale is None else sub_scale.T.contiguous(),
    )
    return _prepared(weight, linear)


def _prepared(weight: QuantizedWeight, linear: LinearFormat) -> QuantizedWeight | torch.Tensor:
    scale = weight.scale
    if linear.input is None:
        return weight.to_layout("nibbles") if scale.device.type == "cpu" else weight.dequantized(scale.dtype)
    return choose_backend(scale.device).prepare_weight(weight, linear.input.settings())


def prepare_outlier_rows(linear: LinearFormat, stored: dict[str, torch.Tensor]) -> QuantizedWeight:
    """Turns packed rows of an 8-bit outlier weight into the weight that the layer computes with.

    `stored` has `weight_packed` `[out, ceil(rank / 4)]`, int32, and `weight_scale` `[out, 1]`, floating point.
    """
    assert linear.outlier is not None
    scale = stored["weight_scale"]
    weight = QuantizedWeight.from_words(stored["weight_packed"], scale, linear.outlier.weight_bits, linear.split().rank)
    return choose_backend(scale.device).prepare_weight(weight, linear.outlier.input_settings())
