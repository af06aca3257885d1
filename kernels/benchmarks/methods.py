"""The layers that are timed, each with enough copies of its weights to defeat the caches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from quad_kernels import QuantizedWeight, choose_backend, integer_linear, quantize_activations
from torch.nn import functional as F

from benchmarks.shapes import QUANTIZATION, WEIGHT_BITS, Case, Linear
from benchmarks.timing import Method

_MOST_COPIES = 128
_OUTLIER_MAGNITUDE = 10.0  # the split-off coordinates are the large ones


class Layer(Protocol):
    """A linear layer in some arithmetic.

    Attributes:
        copies: number of copies of its weights.
    """

    copies: int

    def make_input(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """A random input, `[tokens, its input width]`."""

    def __call__(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """The layer on one copy of its weights; the number may exceed the number of copies."""


@dataclass(frozen=True)
class Setting:
    """Where and in what the layers run.

    Attributes:
        device: device of all tensors.
        dtype: dtype of the model.
        rotated_bytes: the copies of a layer's weights take at least this together; a multiple of the last-level cache.
        warm: one copy only, which stays in the caches as far as it fits.
    """

    device: torch.device
    dtype: torch.dtype
    rotated_bytes: int
    warm: bool = False

    def copies(self, weight_bytes: int) -> int:
        """Copies for a weight of that size."""
        return 1 if self.warm else max(2, min(_MOST_COPIES, -(-self.rotated_bytes // weight_bytes)))

    def normal(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normal numbers in the model's dtype."""
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)


class QuadLayer:
    """The complete QUAD layer: split, online Hadamard, quantization, integer product, outlier product, bias."""

    def __init__(self, linear: Linear, setting: Setting, generator: torch.Generator) -> None:
        self.split, self._setting = linear.split, setting
        outputs, inputs, rank = linear.quad_outputs, linear.split.residual_width, linear.split.rank
        half = 2 ** (WEIGHT_BITS - 1)
        integers = torch.randint(
            -half, half, (outputs, inputs), generator=generator, device=setting.device, dtype=torch.int8
        )
        scale = torch.rand(outputs, 1, generator=generator, device=setting.device).add_(0.5).mul_(0.02)
        weight = QuantizedWeight(integers, scale.to(setting.dtype), None, inputs, outputs, WEIGHT_BITS)
        backend = choose_backend(setting.device)
        self.bias = setting.normal(outputs, generator=generator) if linear.bias else None
        outlier_weight = (setting.normal(outputs, rank, generator=generator) * 0.02).to(setting.dtype)
        stored = backend.prepare_weight(weight, QUANTIZATION).integers
        self.copies = setting.copies(stored.numel() * stored.element_size() + outlier_weight.nbytes)
        self.weights = [
            backend.prepare_weight(replace(weight, integers=integers.clone(), scale=weight.scale.clone()), QUANTIZATION)
            for _ in range(self.copies)
        ]
        self.outlier_weights = [outlier_weight.clone() for _ in range(self.copies)]

    def make_input(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """See `Layer`."""
        x = self._setting.normal(tokens, self.split.width, generator=generator)
        x[:, self.split.outlier_index(x.device)] *= _OUTLIER_MAGNITUDE
        return x

    def __call__(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """See `Layer`. Not `quad_kernels.quad_linear`, which may not quantize an input that it has just seen."""
        i = copy % self.copies
        run = choose_backend(x.device).quad_linear
        return run(x, self.weights[i], self.split, QUANTIZATION, self.outlier_weights[i], self.bias)

    def parts(self, x: torch.Tensor) -> list[Method]:
        """What the shares of the time are computed from: the layer without its quantization, and without both."""
        outlier, integers, scale = quantize_activations(x, QUANTIZATION, self.split)

        def without_quantization(i: int) -> torch.Tensor:
            return integer_linear(
                integers,
                scale,
                self.weights[i],
                outlier=outlier,
                outlier_weight=self.outlier_weights[i],
                bias=self.bias,
                out_dtype=x.dtype,
            )

        def product(i: int) -> torch.Tensor:
            return integer_linear(integers, scale, self.weights[i], bias=self.bias, out_dtype=x.dtype)

        return [
            Method("quad: without quantization", without_quantization, self.copies),
            Method("quad: integer product only", product, self.copies),
            Method("quad: quantization only", lambda _: quantize_activations(x, QUANTIZATION, self.split), self.copies),
        ]


class FloatLayer:
    """`F.linear` of the original model."""

    def __init__(self, linear: Linear, setting: Setting, generator: torch.Generator) -> None:
        self._setting, self._inputs = setting, linear.inputs
        weight = (setting.normal(linear.outputs, linear.inputs, generator=generator) * 0.02).to(setting.dtype)
        self._bias = setting.normal(linear.outputs, generator=generator) if linear.bias else None
        self.copies = setting.copies(weight.nbytes)
        self.weights = [weight.clone() for _ in range(self.copies)]

    def make_input(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """See `Layer`."""
        return self._setting.normal(tokens, self._inputs, generator=generator)

    def __call__(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """See `Layer`."""
        return F.linear(x, self.weights[copy % self.copies], self._bias)


class Int8Layer:
    """`torch._int_mm` on int8 inputs that are there already, to int32: a product without the rest of a layer."""

    def __init__(self, linear: Linear, setting: Setting, generator: torch.Generator) -> None:
        self._setting, self._inputs = setting, linear.inputs
        weight = self._integers(linear.outputs, generator)
        self.copies = setting.copies(weight.nbytes)
        self._weights = [weight.clone() for _ in range(self.copies)]

    def _integers(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        shape, device = (rows, self._inputs), self._setting.device
        return torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)

    def make_input(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """See `Layer`."""
        return self._integers(tokens, generator)

    def __call__(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """See `Layer`."""
        return torch._int_mm(x, self._weights[copy % self.copies].T)


def case_method(name: str, case: Case, layers: list[Layer], tokens: int, generator: torch.Generator) -> Method:
    """The whole of a case as one method; between two linears there is the same PyTorch code for all methods."""
    inputs = [layer.make_input(tokens, generator) for layer in layers]
    call: Callable[[int], torch.Tensor]
    if case.kind == "linear":
        (layer,), (x,) = layers, inputs

        def call(i: int) -> torch.Tensor:
            return layer(x, i)

    elif case.kind == "attention":
        (qkv, o), (x, context) = layers, inputs

        def call(i: int) -> torch.Tensor:
            qkv(x, i)
            return o(context, i)

    else:
        (gate_up, down), (x, _) = layers, inputs

        def call(i: int) -> torch.Tensor:
            gate, up = gate_up(x, i).chunk(2, dim=-1)
            return down(F.silu(gate) * up, i)

    return Method(name, call, max(layer.copies for layer in layers))
