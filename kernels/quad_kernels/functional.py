"""The public functions: they check their arguments, flatten them and call the op, which chooses the backend.

The complete layer, `quad_kernels.quad_linear`, is built on them.
"""

from typing import Literal

import torch

from quad_kernels import ops
from quad_kernels.backends import choose_backend
from quad_kernels.formats import (
    InputQuantization,
    InputSplit,
    KVEntries,
    QuantizedActivations,
    RMSNorm,
)
from quad_kernels.hadamard.construct import HadamardPlan, plan_hadamard
from quad_kernels.hadamard.reference import apply_hadamard as reference_hadamard
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.packing import nibble_bytes
from quad_kernels.table_product.reference import table_product as reference_table_product
from quad_kernels.weight import QuantizedWeight, expand_scales

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit | None = None,
    *,
    norm: RMSNorm | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> QuantizedActivations:
    """Returns the outliers of `x`, and the rest quantized: split, transformed and rounded in one pass where possible.

    Each token (or each group of a token) gets its own symmetric grid: scale = clip_ratio * absmax / ((2^bits - 1) / 2),
    integers from -2^(bits-1) to 2^(bits-1) - 1, round to nearest even. A clip ratio of 1 is the grid of
    compressed-tensors; the "0.9 of absmax / 7" of the QUAD paper (section 4.1) is 0.964 here.

    On asymmetric grids scale = clip_ratio * (max - min) / (2^bits - 1), where max is at least 0 and min at most 0, and
    the zero point is z = round(-clip_ratio * min / scale). The integers returned have it taken off already: they lie
    from -z to 2^bits - 1 - z, and x is about scale times them.

    On floating-point grids the integers are twice the 4-bit floating-point numbers, and the scales half of those of the
    format (`quad_kernels.float4`).

    With sub-scales a token has one scale, the largest step of its groups over the largest factor; the step of a group
    is an integer factor times that, and the integers returned are products with the factor.

    Args:
        x: `[..., width]`, float32, bfloat16 or float16.
        quantization: bits, clip ratio and group size; a group size divides the residual width.
        split: how `x` is divided; None quantizes all of it.
        norm: norm that is applied to `x` first; its output is rounded to the dtype of `x`, as a separate norm would.
        packed: True for 4-bit integers packed in bytes (`quad_kernels.packing.nibbles` has the order).
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        Outliers, integers and scales. A zero token gets scale 0 and integers 0, and so does one whose scale is not a
        normal float32.

    Raises:
        ValueError: for a group size that does not divide the residual, a width that is not the split's, or `packed`
            with integers that take more than 4 bits.

    Example:
        >>> x = torch.tensor([[100.0, 3.0, -7.5, 1.0]])
        >>> outlier, integers, scale = quantize_activations(x, InputQuantization(bits=4), InputSplit(4, outliers=1))
        >>> outlier, integers, scale
        (tensor([[100.]]), tensor([[ 3, -8,  1]], dtype=torch.int8), tensor([[1.]]))
    """
    width = x.shape[-1]
    split = InputSplit(width) if split is None else split
    if width != split.width:
        raise ValueError(f"the input has {width} coordinates, its split is for {split.width}")
    group = quantization.group_size
    if group is not None and split.residual_width % group:
        raise ValueError(f"group_size ({group}) must divide the width of the activations ({split.residual_width})")
    if packed and quantization.integer_bits > 4:
        raise ValueError(f"only integers of up to 4 bits can be packed, not {quantization.integer_bits}")
    flat = x.reshape(-1, width)
    outlier: torch.Tensor | None
    if torch.compiler.is_compiling():
        outlier, integers, scale = ops.quantize_activations(
            flat,
            quantization.bits,
            quantization.clip_ratio,
            group or 0,
            quantization.sub_scale_bits or 0,
            quantization.symmetric,
            split.outliers,
            split.block,
            split.keep_width,
            split.hadamard,
            None if norm is None else norm.weight,
            -1.0 if norm is None else norm.eps,
            packed,
            backend or "",
            quantization.number_format,
            quantization.four_over_six,
        )
    else:  # an operator takes longer to be called than many of these kernels to run
        chosen = choose_backend(x.device, backend)
        outlier, integers, scale = chosen.quantize_activations(flat, quantization, split, norm, packed)
    leading = x.shape[:-1]
    return QuantizedActivations(
        outlier.view(*leading, split.rank) if split.rank and outlier is not None else None,
        integers.view(*leading, integers.shape[-1]),
        scale.view(*leading, scale.shape[-1]),
    )


def split_input(x: torch.Tensor, split: InputSplit) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Returns outliers `[..., rank]` (None for rank 0) and residual `[..., residual_width]`, dtype of `x`.

    Unlike `InputSplit.divide` it also applies the online Hadamard, if the split has one. Differentiable.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
        >>> split_input(x, InputSplit(8, outliers=1, block=4))
        (tensor([[1., 5.]]), tensor([[2., 3., 4., 6., 7., 8.]]))
    """
    outlier, residual = split.divide(x)
    if split.hadamard:
        residual = apply_hadamard(residual, plan_hadamard(split.residual_width))
    return outlier, residual


def quantize_input(x: torch.Tensor, quantization: InputQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns integers `[..., n]`, int8, and scales `[..., groups]`, float32, of all of `x`, `[..., n]`.

    `quantize_activations` does the same after a split.

    Example:
        >>> integers, scale = quantize_input(torch.tensor([[3.0, -7.5, 1.0]]), InputQuantization(bits=4))
        >>> integers * scale
        tensor([[ 3., -8.,  1.]])
    """
    _, integers, scale = quantize_activations(x, quantization)
    return integers, scale


def fake_quantize(x: torch.Tensor, quantization: InputQuantization) -> torch.Tensor:
    """Returns `x`, `[..., n]`, rounded to its grid, dtype of `x`.

    Example:
        >>> fake_quantize(torch.tensor([[3.1, -7.5, 0.9]]), InputQuantization(bits=4))
        tensor([[ 3., -8.,  1.]])
    """
    integers, scale = quantize_input(x, quantization)
    return (integers * expand_scales(scale, x.shape[-1])).to(x.dtype)


def prepare_weight(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    bits: int,
    in_features: int,
    quantization: InputQuantization | None,
    zero_point: torch.Tensor | None = None,
    sub_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> QuantizedWeight:
    """Returns the weight of a checkpoint in the layout that the backend of its device reads; done once, at load.

    Args:
        weight_packed: `[out, ceil(in * bits / 32)]`, int32, as compressed-tensors' pack-quantized format has it.
        weight_scale: `[out, groups]`, floating point.
        bits: 2, 4 or 8.
        in_features: input width.
        quantization: quantization of the inputs of the layer, None if they stay floating point.
        zero_point: zero points, packed along the output channels, `[ceil(out * bits / 32), groups]`, int32, or None.
        sub_scale: sub-scales less 8, packed along the output channels, `[ceil(out / 8), groups]`, int32, or None.
        backend: name of a backend; by default as in `quad_kernels.choose_backend`.

    Raises:
        ValueError: if the shapes contradict each other.

    Example:
        >>> from quad_kernels.packing import pack_int32
        >>> words = pack_int32(torch.tensor([[1, -2, 7, -8]], dtype=torch.int8), bits=4)
        >>> weight = prepare_weight(
        ...     words, torch.tensor([[0.5]]), bits=4, in_features=4, quantization=None, backend="reference"
        ... )
        >>> weight.layout, weight.dequantized(torch.float32)
        ('nibbles', tensor([[ 0.5000, -1.0000,  3.5000, -4.0000]]))
    """
    weight = QuantizedWeight.from_words(weight_packed, weight_scale, bits, in_features, zero_point, sub_scale)
    return choose_backend(weight_packed.device, backend).prepare_weight(weight, quantization)


def integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    *,
    outlier: torch.Tensor | None = None,
    outlier_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:
    """Returns cast(x W^T + outlier W_o^T + bias) for quantized x and W.

    With one scale per token and per output channel the sum over inputs is an exact integer sum, scaled once; with
    groups the scaled group sums are added in float32. The outlier product is added in float32.

    Args:
        x: integers, `[..., in]`, int8 (up to 8 bits used), or packed, `[..., nibble_bytes(in)]`, uint8.
        x_scale: `[..., 1]` or `[..., x_groups]`, float32.
        weight: quantized weight in any layout; that of `prepare_weight` is the fastest.
        outlier: `[..., rank]`, floating point, or None.
        outlier_weight: `[out, rank]`, dtype of `outlier`.
        bias: `[out]`.
        out_dtype: dtype of the result.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., out]`, `out_dtype`.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> integers = torch.tensor([[1, -2], [7, -8]], dtype=torch.int8)
        >>> weight = QuantizedWeight(integers, torch.tensor([[0.5], [1.0]]), None, 2, 2, bits=4)
        >>> x, x_scale = torch.tensor([[4, 1]], dtype=torch.int8), torch.tensor([[0.5]])
        >>> integer_linear(x, x_scale, weight, bias=torch.tensor([10.0, 0.0]))
        tensor([[10.5000, 10.0000]])
    """
    leading, columns, x_groups = x.shape[:-1], x.shape[-1], x_scale.shape[-1]
    inputs, outputs = weight.in_features, weight.out_features
    wanted = nibble_bytes(inputs) if x.dtype == torch.uint8 else inputs
    if columns != wanted:
        raise ValueError(f"x has {columns} columns, a weight of {inputs} inputs needs {wanted}")
    if x_scale.shape[:-1] != leading or not x_groups or inputs % x_groups:
        raise ValueError(f"x_scale {list(x_scale.shape)} does not fit x {list(x.shape)} and {inputs} inputs")
    if (outlier is None) != (outlier_weight is None):
        raise ValueError("outlier and outlier_weight go together")
    if outlier is not None and outlier_weight is not None:
        if outlier.shape[-1] != outlier_weight.shape[-1]:
            raise ValueError(f"{outlier.shape[-1]} outliers do not fit an outlier weight {list(outlier_weight.shape)}")
        if outlier.shape[:-1] != leading:
            raise ValueError(f"outlier {list(outlier.shape)} does not fit x {list(x.shape)}")
        if outlier_weight.shape[0] != outputs:
            raise ValueError(f"outlier_weight {list(outlier_weight.shape)} does not fit {outputs} output channels")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias {list(bias.shape)} does not fit {outputs} output channels")
    x, x_scale = x.reshape(-1, columns), x_scale.reshape(-1, x_groups)
    outlier = None if outlier is None else outlier.reshape(-1, outlier.shape[-1])
    if torch.compiler.is_compiling():
        y = ops.integer_linear(
            x,
            x_scale,
            weight.integers,
            weight.scale,
            weight.zero_point,
            weight.factors,
            inputs,
            outputs,
            weight.bits,
            weight.layout,
            outlier,
            outlier_weight,
            bias,
            out_dtype,
            backend or "",
        )
    else:
        operands = LinearOperands(x, x_scale, weight, outlier, outlier_weight, bias, out_dtype)
        y = choose_backend(x.device, backend).integer_linear(operands).contiguous()
    return y.view(*leading, outputs)


def table_product(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Returns x V^T for a table V of 8-bit integers with a scale per row: the head of a model, weight-only.

    Args:
        x: `[..., columns]`, floating point.
        words: packed rows with an offset of 128, `[rows, ceil(columns / 4)]`, int32, as `quad_kernels.packing` packs
            8 bits.
        scale: scales of the rows, `[rows, 1]`, floating point.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., rows]`, dtype of `x`. Differentiable with respect to `x`.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> from quad_kernels.packing import pack_int32
        >>> words = pack_int32(torch.tensor([[1, -2, 3, 4], [5, 6, 7, -128]], dtype=torch.int8), bits=8)
        >>> table_product(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), words, torch.tensor([[1.0], [0.5]]))
        tensor([[   9.0000, -125.5000]])
    """
    rows, columns = words.shape[0], x.shape[-1]
    if words.shape[1] != -(-columns // 4) or scale.shape != (rows, 1):
        raise ValueError(
            f"a table of words {list(words.shape)}, scales {list(scale.shape)} does not fit {columns} inputs"
        )
    flat = x.reshape(-1, columns)
    if torch.is_grad_enabled() and x.requires_grad:
        y = reference_table_product(flat, words, scale)
    elif torch.compiler.is_compiling():
        y = ops.table_product(flat, words, scale, backend or "")
    else:
        y = choose_backend(x.device, backend).table_product(flat, words, scale)
    return y.view(*x.shape[:-1], rows)


def apply_hadamard(
    x: torch.Tensor, plan: HadamardPlan, *, transpose: bool = False, backend: str | None = None
) -> torch.Tensor:
    """Returns `x @ hadamard_matrix(plan.size)` for the last dimension.

    Args:
        x: `[..., size]`, floating point.
        plan: transform for that size, from `quad_kernels.hadamard.plan_hadamard`.
        transpose: True for the transposed matrix, which is the inverse; where that is another one (a factor of the
            plan is no power of two), by PyTorch's means on every backend.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[..., size]`, dtype of `x`; computed in float32 (float64 for float64 input), rounded once. Differentiable.

    Raises:
        ValueError: if the last dimension of `x` is not `plan.size`.

    Example:
        >>> apply_hadamard(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), plan_hadamard(4))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if x.shape[-1] != plan.size:
        raise ValueError(f"the last dimension of x is {x.shape[-1]}, the transform is for {plan.size}")
    if torch.is_grad_enabled() and x.requires_grad:
        return reference_hadamard(x, plan, transpose)
    if transpose and any(factor & (factor - 1) for factor in plan.factors):  # else the matrix is its own transpose
        return ops.transposed_hadamard(x.reshape(-1, plan.size)).view(x.shape)
    return ops.hadamard(x.reshape(-1, plan.size), backend or "").view(x.shape)


def quantize_kv(
    x: torch.Tensor,
    *,
    clip_ratio: float = 1.0,
    scale_dtype: torch.dtype | None = None,
    bits: Literal[4, 8] = 4,
    backend: str | None = None,
) -> KVEntries:
    """Returns each vector of `head_dim` coordinates rounded to equidistant points between its extremes.

    Scale and zero are rounded to `scale_dtype` first, the integers are those of the rounded grid.

    Args:
        x: keys or values, `[..., head_dim]`, floating point.
        clip_ratio: share of the span between smallest and largest coordinate that the grid covers, about its middle.
        scale_dtype: float16, bfloat16 or float32; by default that of `x`. float16 holds spans up to 15 * 65504.
        bits: 4 for 16 points, 8 for 256.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        Integers, scales and zeros. A vector that holds NaN or an infinity, or whose span overflows float32, gets scale
        and zero NaN; one whose scale overflows `scale_dtype` is NaN after `dequantize_kv`.

    Raises:
        ValueError: for an odd `head_dim`, or `bits`, a `scale_dtype` or a `clip_ratio` that is not supported.

    Example:
        >>> entries = quantize_kv(torch.tensor([[0.0, 15.0, 7.2, 1.0]]))
        >>> entries.integers, entries.scale, entries.zero
        (tensor([[112,  31]], dtype=torch.uint8), tensor([1.]), tensor([0.]))
    """
    head_dim = x.shape[-1]
    scale_dtype = scale_dtype or x.dtype
    if head_dim % 2 or not head_dim:
        raise ValueError(f"head_dim ({head_dim}) must be even and positive: two coordinates share a byte")
    _check_kv_bits(bits)
    if scale_dtype not in _SCALE_DTYPES:
        raise ValueError(f"scale_dtype ({scale_dtype}) must be one of {', '.join(map(str, _SCALE_DTYPES))}")
    if not 0 < clip_ratio <= 1:
        raise ValueError(f"clip_ratio ({clip_ratio}) must lie in (0, 1]")
    integers, scale, zero = ops.quantize_kv(x.reshape(-1, head_dim), clip_ratio, scale_dtype, backend or "", bits)
    leading = x.shape[:-1]
    return KVEntries(integers.view(*leading, head_dim * bits // 8), scale.view(leading), zero.view(leading))


def dequantize_kv(
    entries: KVEntries, dtype: torch.dtype, *, bits: Literal[4, 8] = 4, backend: str | None = None
) -> torch.Tensor:
    """Returns `integers * scale + zero`, computed in float32, as `[..., head_dim]` of `dtype`.

    Raises:
        ValueError: if the shapes do not fit, or `bits`, those of the entries, are neither 4 nor 8.

    Example:
        >>> dequantize_kv(quantize_kv(torch.tensor([[0.0, 15.0, 7.2, 1.0]])), torch.float32)
        tensor([[ 0., 15.,  7.,  1.]])
    """
    _check_kv_bits(bits)
    integers, scale, zero = entries
    if bits == 8 and integers.shape[-1] % 2:
        raise ValueError(f"entries in 8 bits have an even number of integers, not {integers.shape[-1]}")
    if scale.shape != integers.shape[:-1] or zero.shape != scale.shape:
        raise ValueError(
            f"integers {list(integers.shape)} need one scale and one zero per vector, got {list(scale.shape)} and "
            f"{list(zero.shape)}"
        )
    x = ops.dequantize_kv(
        integers.reshape(-1, integers.shape[-1]), scale.reshape(-1), zero.reshape(-1), dtype, backend or "", bits
    )
    return x.view(*scale.shape, integers.shape[-1] * 8 // bits)


def _check_kv_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits ({bits}) of a cache entry must be 4 or 8")


__all__ = [
    "apply_hadamard",
    "dequantize_kv",
    "fake_quantize",
    "integer_linear",
    "prepare_weight",
    "quantize_activations",
    "quantize_input",
    "quantize_kv",
    "split_input",
    "table_product",
]
