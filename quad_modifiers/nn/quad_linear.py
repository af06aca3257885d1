"""A linear layer split into a full-precision outlier part and a residual part to quantize."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from quad_kernels import InputQuantization, InputSplit, QuantizedWeight, fake_quantize, quad_linear, split_input
from torch import nn


class IntegerWeight(NamedTuple):
    """A quantized weight.

    Attributes:
        integers: `[out, in]`, int8.
        scale: `[out, groups]`.
        zero_point: `[out, groups]`, or None on a symmetric grid.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def expand_scales(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns one value per input coordinate, `[out, columns]`, from one per group, `[out, groups]`."""
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)


class OutlierLinear(nn.Linear):
    """The full-precision part of a `QuadLinear`, which reads its weight without calling it."""


class QuadLinear(nn.Module):
    """y = outlier(x_outlier) + residual(x_residual) + bias.

    `residual` is a plain `nn.Linear`, so any llm-compressor modifier can quantize it. The container starts as a
    pass-through around the linear it replaces (which becomes `residual`, the very same object): modifiers that hold a
    reference to that linear, such as SmoothQuant, keep working until the projection rewrites the weights.

    Args:
        linear: the layer to wrap, or the residual of a loaded checkpoint.
        role: its place in the block, such as "q_proj" or "down_proj".
    """

    def __init__(self, linear: nn.Linear, role: str) -> None:
        super().__init__()
        self.role = role
        self.split = InputSplit(linear.in_features)
        self.input_quantization: InputQuantization | None = None
        self.quantize_input = False  # off until every earlier modifier has seen the unquantized activations
        self.outlier: OutlierLinear | None = None
        self.residual: nn.Module = linear
        self.register_parameter("bias", None)  # stays with the linear until `take_bias`

    @classmethod
    def from_parts(
        cls, role: str, split: InputSplit, residual: nn.Module, bias: bool, dtype: torch.dtype
    ) -> "QuadLinear":
        """Returns a container with unset outlier weight and bias, to be filled from a checkpoint."""
        container = cls(nn.Linear(1, 1, bias=False), role)
        container.split = split
        container.residual = residual
        if split.rank:
            container.outlier = OutlierLinear(split.rank, residual.out_features, bias=False, dtype=dtype)
        if bias:
            container.bias = nn.Parameter(torch.empty(residual.out_features, dtype=dtype), requires_grad=False)
        return container

    def take_bias(self) -> None:
        """Moves the bias from the wrapped linear to the container.

        Not before the modifiers that come earlier in a recipe are done: SmoothQuant scales a linear with its bias.
        """
        if isinstance(self.residual, nn.Linear) and self.residual.bias is not None:
            bias = self.residual.bias.detach()
            del self.residual.bias  # llm-compressor's offloading cannot overwrite a tensor with None
            self.residual.register_parameter("bias", None)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.split.width

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.residual.out_features)

    def set_weights(
        self, split: InputSplit, residual: torch.Tensor, outlier: torch.Tensor | None, bias: torch.Tensor | None
    ) -> None:
        """Replaces the weights; `residual` `[out, split.residual_width]`, `outlier` `[out, split.rank]` or None."""
        reference = self.residual.weight
        self.split = split
        self.residual.weight = nn.Parameter(residual.to(reference), requires_grad=False)
        self.residual.out_features, self.residual.in_features = residual.shape
        self.outlier = None if outlier is None else _outlier_linear(outlier.to(reference))
        self.bias = None if bias is None else nn.Parameter(bias.to(reference), requires_grad=False)

    def integer_weight(self) -> IntegerWeight | None:
        """The residual's quantized weight, None while it is not quantized."""
        read = getattr(self.residual, "integer_weight", None)
        if read is not None:
            return read()
        if getattr(self.residual, "quantization_status", None) != "frozen":
            return None
        weights = self.residual.quantization_scheme.weights
        if weights is None:
            return None
        zero = None if weights.symmetric else self.residual.weight_zero_point
        columns = self.residual.in_features
        integers = self.residual.weight.float() / expand_scales(self.residual.weight_scale.float(), columns)
        if zero is not None:
            integers = integers + expand_scales(zero.float(), columns)
        half = 2 ** (weights.num_bits - 1)
        integers = integers.round_().clamp_(-half, half - 1).to(torch.int8)
        return IntegerWeight(integers, self.residual.weight_scale, zero)

    def weight_bits(self) -> int | None:
        """Bits of the residual's quantized weight, None while it is not quantized."""
        if hasattr(self.residual, "bits"):
            return int(self.residual.bits)
        scheme = getattr(self.residual, "quantization_scheme", None)
        return None if scheme is None or scheme.weights is None else int(scheme.weights.num_bits)

    @property
    def qweight(self) -> torch.Tensor:
        """A tensor of the residual with the device and dtype of the layer; PEFT looks for it under this name."""
        return self.residual.weight_scale if hasattr(self.residual, "weight_scale") else self.residual.weight

    def changed_outlier_weight(self, change: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the outlier weight plus `change` `[out, rank]`, summed in float32, in the weight's dtype."""
        if self.outlier is None or change is None:
            return None if self.outlier is None else self.outlier.weight
        return (self.outlier.weight.float() + change).to(self.outlier.weight.dtype)

    def changed_weight_scale(self, change: torch.Tensor) -> torch.Tensor:
        """Returns the residual's weight scale plus `change` `[out, groups]`, in the scale's dtype, never negative."""
        scale = self.residual.weight_scale
        return (scale.float() + change).clamp(min=0).to(scale.dtype)

    def forward(
        self, x: torch.Tensor, outlier_change: torch.Tensor | None = None, scale_change: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Applies the layer to `[..., in]`; the outlier coordinates bypass the quantization of the input.

        Args:
            x: input.
            outlier_change: of an adapter, added to the outlier weight, `[out, rank]`, float32.
            scale_change: of an adapter, added to the residual's weight scale, `[out, groups]`, float32.
        """
        with _present(self.residual), _present(self.outlier):
            return self._forward(x, self.changed_outlier_weight(outlier_change), scale_change)

    def _forward(
        self, x: torch.Tensor, outlier_weight: torch.Tensor | None, scale_change: torch.Tensor | None
    ) -> torch.Tensor:
        quantization = self.input_quantization if self.quantize_input else None
        weight = self._linear_weight() if quantization is not None or scale_change is not None else None
        if weight is not None and scale_change is not None:
            weight = replace(weight, scale=self.changed_weight_scale(scale_change))
        if quantization is not None and weight is not None:
            return quad_linear(x, weight, self.split, quantization, outlier_weight=outlier_weight, bias=self.bias)
        outlier, residual = split_input(x, self.split)
        if quantization is not None:
            residual = fake_quantize(residual, quantization)
        if weight is None:
            y = self.residual(residual).float()
        else:  # weight-only quantization with changed scales
            y = nn.functional.linear(residual, weight.dequantized(x.dtype)).float()
        if outlier is not None and outlier_weight is not None:
            y = y + nn.functional.linear(outlier, outlier_weight).float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)

    def _linear_weight(self) -> QuantizedWeight | None:
        """The residual's quantized weight as the kernels read it, None while it is not quantized."""
        prepared = getattr(self.residual, "prepared_weight", None)
        if prepared is not None:
            return prepared()
        weight, bits = self.integer_weight(), self.weight_bits()
        if weight is None or bits is None:
            return None
        zero_point = None if weight.zero_point is None else weight.zero_point.to(torch.int8)
        return QuantizedWeight(
            weight.integers, weight.scale, zero_point, self.split.residual_width, self.out_features, bits
        )

    def extra_repr(self) -> str:
        """The split and the input quantization."""
        return f"role={self.role}, split={self.split}, input_quantization={self.input_quantization}"


@contextmanager
def _present(module: nn.Module | None) -> Iterator[None]:
    """Runs accelerate's hook of a part whose tensors the container reads itself: it brings offloaded tensors."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _outlier_linear(weight: torch.Tensor) -> OutlierLinear:
    linear = OutlierLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
