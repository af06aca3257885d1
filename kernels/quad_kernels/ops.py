"""The operations as `torch.library` custom ops: one node each for torch.compile, with shapes known without running.

Which backend runs is decided inside of the op from the device of the data, so a compiled graph does not contain it.
Ops take no dataclasses: settings come in one by one and are put together here.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from quad_kernels.backends import choose_backend
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.hadamard import plan_hadamard
from quad_kernels.hadamard.reference import apply_hadamard as reference_hadamard
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.packing import nibble_bytes
from quad_kernels.weight import QuantizedWeight

# A decoder has a handful of each, and makes them hundreds of times for a token.
_input_quantization, _input_split = lru_cache(InputQuantization), lru_cache(InputSplit)

_library = torch.library.Library("quad_kernels", "DEF")


def _custom_op(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function an op of its name, with the schema of its annotations.

    `shapes` returns empty tensors like the op's results; it names those of the op's parameters that it needs.
    """

    def define(run: Callable[..., Any]) -> Any:
        signature, needed = inspect.signature(run), tuple(inspect.signature(shapes).parameters)

        def fake(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options)
            given.apply_defaults()
            return shapes(*(given.arguments[name] for name in needed))

        name = run.__name__
        schema = torch.library.infer_schema(run, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"quad_kernels::{name}", fake, lib=_library)
        return getattr(torch.ops.quad_kernels, name).default

    return define


def _quantized_shapes(
    x: torch.Tensor,
    group_size: int,
    sub_scale_bits: int,
    outliers: int,
    block: int,
    keep_width: bool,
    packed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    split = InputSplit(x.shape[-1], outliers, block, keep_width)
    tokens, width = x.shape[0], split.residual_width
    columns, dtype = (nibble_bytes(width), torch.uint8) if packed else (width, torch.int8)
    groups = width // group_size if group_size and not sub_scale_bits else 1
    return (
        x.new_empty(tokens, split.rank),
        x.new_empty(tokens, columns, dtype=dtype),
        x.new_empty(tokens, groups, dtype=torch.float32),
    )


@_custom_op(_quantized_shapes)
def quantize_activations(
    x: torch.Tensor,
    bits: int,
    clip_ratio: float,
    group_size: int,
    sub_scale_bits: int,
    symmetric: bool,
    outliers: int,
    block: int,
    keep_width: bool,
    hadamard: bool,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    packed: bool,
    backend: str,
    number_format: str = "int",
    four_over_six: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_activations`; group size 0, 0 bits of sub-scales and a negative eps stand for none."""
    outlier, integers, scale = choose_backend(x.device, backend).quantize_activations(
        x,
        _input_quantization(
            bits, clip_ratio, group_size or None, sub_scale_bits or None, symmetric, number_format, four_over_six
        ),
        _input_split(x.shape[-1], outliers, block, keep_width, hadamard),
        None if norm_eps < 0 else RMSNorm(norm_weight, norm_eps),
        packed,
    )
    if outlier is None:
        outlier = x.new_empty(x.shape[0], 0)
    return outlier, integers, scale


def _linear_shape(x: torch.Tensor, out_features: int, out_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)


@_custom_op(_linear_shape)
def integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    weight_sub_scale: torch.Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    layout: str,
    outlier: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """See `quad_kernels.integer_linear`; the fields of the `QuantizedWeight` one by one."""
    stored = QuantizedWeight(
        weight, weight_scale, weight_zero_point, in_features, out_features, bits, layout, weight_sub_scale
    )
    operands = LinearOperands(x, x_scale, stored, outlier, outlier_weight, bias, out_dtype)
    y = choose_backend(x.device, backend).integer_linear(operands)
    return y.contiguous()  # callers of a compiled graph rely on the strides of the fake kernel


@_custom_op(lambda x, words: x.new_empty(x.shape[0], words.shape[0]))
def table_product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, backend: str) -> torch.Tensor:
    """See `quad_kernels.table_product`."""
    return choose_backend(x.device, backend).table_product(x, words, scale)


@_custom_op(lambda x: x.new_empty(x.shape))
def hadamard(x: torch.Tensor, backend: str) -> torch.Tensor:
    """See `quad_kernels.apply_hadamard`."""
    return choose_backend(x.device, backend).hadamard(x)


@_custom_op(lambda x: x.new_empty(x.shape))
def transposed_hadamard(x: torch.Tensor) -> torch.Tensor:
    """See `quad_kernels.apply_hadamard`: for a matrix that is not symmetric, which no backend has a kernel for."""
    return reference_hadamard(x, plan_hadamard(x.shape[-1]), transpose=True)


def _kv_shapes(
    x: torch.Tensor, scale_dtype: torch.dtype, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vectors, head_dim = x.shape
    scale, zero = (x.new_empty(vectors, dtype=scale_dtype) for _ in range(2))
    return x.new_empty(vectors, head_dim * bits // 8, dtype=torch.uint8), scale, zero


@_custom_op(_kv_shapes)
def quantize_kv(
    x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, backend: str, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_kv`."""
    return choose_backend(x.device, backend).quantize_kv(x, clip_ratio, scale_dtype, bits)


def _dequantized_shape(integers: torch.Tensor, dtype: torch.dtype, bits: int = 4) -> torch.Tensor:
    return integers.new_empty(integers.shape[0], integers.shape[1] * 8 // bits, dtype=dtype)


@_custom_op(_dequantized_shape)
def dequantize_kv(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, backend: str, bits: int = 4
) -> torch.Tensor:
    """See `quad_kernels.dequantize_kv`."""
    return choose_backend(integers.device, backend).dequantize_kv(integers, scale, zero, dtype, bits)
