"""The operations as `torch.library` custom ops: one node each for torch.compile, with shapes known without running.

Which backend runs is decided inside of the op from the device of the data, so a compiled graph does not contain it.
"""

from functools import lru_cache

import torch

from quad_kernels.backends.registry import choose_backend
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.packing import nibble_bytes
from quad_kernels.weight import LinearWeight

# A decoder has a handful of each, and makes them hundreds of times for a token.
_input_quantization, _input_split = lru_cache(InputQuantization), lru_cache(InputSplit)

_library = torch.library.Library("quad_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_library.define(
    "quantize_activations(Tensor x, int bits, float clip_ratio, int group_size, int outliers, int block, "
    "bool keep_width, bool hadamard, Tensor? norm_weight, float norm_eps, bool packed, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "int4_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
    "int in_features, int out_features, int bits, Tensor? outlier, Tensor? outlier_weight, Tensor? bias, "
    "ScalarType out_dtype, str backend) -> Tensor",
    tags=_TAGS,
)
_library.define("hadamard(Tensor x, str backend) -> Tensor", tags=_TAGS)
_library.define(
    "quantize_kv(Tensor x, float clip_ratio, ScalarType scale_dtype, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "dequantize_kv(Tensor integers, Tensor scale, Tensor zero, ScalarType dtype, str backend) -> Tensor", tags=_TAGS
)


def _quantize_activations(
    x: torch.Tensor,
    bits: int,
    clip_ratio: float,
    group_size: int,
    outliers: int,
    block: int,
    keep_width: bool,
    hadamard: bool,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    packed: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outlier, integers, scale = choose_backend(x.device, backend).quantize_activations(
        x,
        _input_quantization(bits, clip_ratio, group_size or None),
        _input_split(x.shape[-1], outliers, block, keep_width, hadamard),
        None if norm_eps < 0 else RMSNorm(norm_weight, norm_eps),
        packed,
    )
    if outlier is None:
        outlier = x.new_empty(x.shape[0], 0)
    return outlier, integers, scale


def _quantize_activations_shapes(
    x: torch.Tensor,
    bits: int,
    clip_ratio: float,
    group_size: int,
    outliers: int,
    block: int,
    keep_width: bool,
    hadamard: bool,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    packed: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    split = InputSplit(x.shape[-1], outliers, block, keep_width, hadamard)
    width = split.residual_width
    integers = (
        x.new_empty(x.shape[0], nibble_bytes(width), dtype=torch.uint8)
        if packed
        else x.new_empty(x.shape[0], width, dtype=torch.int8)
    )
    groups = width // group_size if group_size else 1
    return x.new_empty(x.shape[0], split.rank), integers, x.new_empty(x.shape[0], groups, dtype=torch.float32)


def _int4_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    outlier: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    prepared = LinearWeight(weight, weight_scale, weight_zero_point, in_features, out_features, bits)
    chosen = choose_backend(x.device, backend)
    y = chosen.int4_linear(x, x_scale, prepared, outlier, outlier_weight, bias, out_dtype)
    return y.contiguous()  # callers of a compiled graph rely on the strides of the fake kernel


def _int4_linear_shape(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    outlier: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=out_dtype)


def _hadamard(x: torch.Tensor, backend: str) -> torch.Tensor:
    return choose_backend(x.device, backend).hadamard(x)


def _quantize_kv(
    x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return choose_backend(x.device, backend).quantize_kv(x, clip_ratio, scale_dtype)


def _quantize_kv_shapes(
    x: torch.Tensor, clip_ratio: float, scale_dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vectors, head_dim = x.shape
    scale, zero = (x.new_empty(vectors, dtype=scale_dtype) for _ in range(2))
    return x.new_empty(vectors, head_dim // 2, dtype=torch.uint8), scale, zero


def _dequantize_kv(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    return choose_backend(integers.device, backend).dequantize_kv(integers, scale, zero, dtype)


def _dequantize_kv_shape(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    return integers.new_empty(integers.shape[0], 2 * integers.shape[1], dtype=dtype)


for _name, _run, _shapes in (
    ("quantize_activations", _quantize_activations, _quantize_activations_shapes),
    ("int4_linear", _int4_linear, _int4_linear_shape),
    ("hadamard", _hadamard, lambda x, backend: torch.empty_like(x)),
    ("quantize_kv", _quantize_kv, _quantize_kv_shapes),
    ("dequantize_kv", _dequantize_kv, _dequantize_kv_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quad_kernels::{_name}", _shapes, lib=_library)

quantize_activations = torch.ops.quad_kernels.quantize_activations.default
int4_linear = torch.ops.quad_kernels.int4_linear.default
hadamard = torch.ops.quad_kernels.hadamard.default
quantize_kv = torch.ops.quad_kernels.quantize_kv.default
dequantize_kv = torch.ops.quad_kernels.dequantize_kv.default
