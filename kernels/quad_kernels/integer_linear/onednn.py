"""Integer linear layer on the CPU: oneDNN's int8 products with int32 sums, which PyTorch ships.

Two of them. `onednn::qlinear_pointwise` reads a weight that was put in oneDNN's own order at load and is the fastest
for every number of tokens; it takes unsigned activations, so int8 ones are shifted, and has neither scales per group
nor zero points. Processors without VNNI add pairs of products in 16 bits, which 255 x 127 x 2 saturates: there only
inputs of 4 bits are exact, shifted by 8 instead of 128.
`torch._int_mm` reads a plain int8 weight and takes the other cases.
"""

import math
from functools import lru_cache

import torch

from quad_kernels.formats import InputQuantization
from quad_kernels.integer_linear import reference
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.layouts import WeightForm, WeightLayout
from quad_kernels.packing import unpack_integers
from quad_kernels.weight import QuantizedWeight, expand_scales

_SMALLEST_WIDTH = 16  # _int_mm reads past a weight of one column: its transpose's strides are ambiguous
_TOKENS_AT_ONCE = 128  # more would stream the float32 sums of a wide layer through memory several times
_MOST_SINGLE_TOKENS = 4  # up to here one matrix-vector product of _int_mm per token beats its matrix product


def integer_linear(operands: LinearOperands) -> torch.Tensor:
    """Returns `[tokens, out]`; see `quad_kernels.integer_linear`."""
    weight = operands.weight.with_products()
    groups = math.lcm(operands.x_scale.shape[1], weight.scale.shape[1])
    if weight.in_features // groups < _SMALLEST_WIDTH:
        return reference.integer_linear(operands)
    x = unpack_integers(operands.x, weight.in_features)
    if groups > 1 or weight.layout != "onednn" or not (_exact_bits() == 8 or _fits_four_bits(x)):
        weight = weight.to_layout("int8")
        if weight.bits > 4 and not _int_mm_is_exact():
            return reference.integer_linear(operands)
    y = x.new_empty(x.shape[0], weight.out_features, dtype=operands.out_dtype)
    for start in range(0, x.shape[0], _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        y[rows] = _rows(operands, rows, x[rows], weight, groups)
    return y


def _rows(operands: LinearOperands, rows: slice, x: torch.Tensor, weight: QuantizedWeight, groups: int) -> torch.Tensor:
    """Returns the layer for some tokens, float32.

    `x` is `[tokens, in]`, int8, unpacked; `weight` is in layout int8, or without groups in layout onednn.
    """
    x_scale, bias, outlier_weight = operands.x_scale[rows], operands.bias, operands.outlier_weight
    outlier = None if operands.outlier is None else operands.outlier[rows]
    if weight.layout == "onednn":
        y = _onednn_product(x, weight, 128 if _exact_bits() == 8 else 8)
    elif groups == 1:
        y = _product(x, weight.integers, weight.scale, weight.zero_point)
    else:
        y = _grouped_product(x, x_scale, weight, groups)
    rest = None if bias is None else bias.float()
    if outlier is not None and outlier_weight is not None:
        product = (outlier.to(outlier_weight.dtype) @ outlier_weight.T).float()
        rest = product if rest is None else product.add_(rest)
    if groups == 1:
        return y.mul_(x_scale) if rest is None else torch.addcmul(rest, y, x_scale)
    return y if rest is None else y.add_(rest)


def best_layout(weight: QuantizedWeight, quantization: InputQuantization | None) -> str:
    """Returns the layout of the fastest product with such inputs; oneDNN's is undone where it has no product."""
    if quantization is None or quantization.scales(weight.in_features) > 1 or quantization.integer_bits > _exact_bits():
        return "int8"
    return "onednn" if onednn_takes(weight) else "int8"


def onednn_takes(weight: WeightForm) -> bool:
    """Returns whether oneDNN's prepacked product can compute with a weight like this one."""
    per_channel = weight.scale.shape[1] == 1 and weight.zero_point is None
    return per_channel and weight.in_features >= _SMALLEST_WIDTH and _exact_bits() > 0


@lru_cache(maxsize=1)
def _exact_bits() -> int:
    """Returns the width of the inputs up to which oneDNN's sums are exact: 8, 4, or 0 where a build lacks the product.

    Tried with the largest integers.
    """
    integers = torch.full((16, 64), 127, dtype=torch.int8)
    for bits, offset in ((8, 128), (4, 8)):
        largest = 2 ** (bits - 1) - 1
        try:
            weight = QuantizedWeight(_prepack(integers), torch.ones(16, 1), None, 64, 16, 8, "onednn")
            y = _onednn_product(torch.full((2, 64), largest, dtype=torch.int8), weight, offset)
        except (RuntimeError, AttributeError):
            return 0
        if bool((y == 64 * 127 * largest).all()):
            return bits
    return 0


def _fits_four_bits(x: torch.Tensor) -> bool:
    if not x.numel():
        return True
    least, largest = torch.aminmax(x)
    return int(least) >= -8 and int(largest) < 8


def _prepack(integers: torch.Tensor) -> torch.Tensor:
    """Returns integers `[out, in]`, int8, in oneDNN's own order: opaque, one byte each."""
    return torch.ops.onednn.qlinear_prepack(integers, None)


def _from_prepacked(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    return stored.to_dense().T.contiguous()


LAYOUTS = {"onednn": WeightLayout(pack=_prepack, unpack=_from_prepacked, accepts=onednn_takes)}


def _onednn_product(x: torch.Tensor, weight: QuantizedWeight, offset: int) -> torch.Tensor:
    """Returns scale * sum over k of x * integers, `[tokens, out]`, float32; `x + offset` is not negative."""
    return torch.ops.onednn.qlinear_pointwise(
        x.view(torch.uint8) + offset,  # wraps: two's complement to an offset
        1.0,
        offset,
        weight.integers,
        weight.scale.float().squeeze(1),
        _zeros(weight.out_features),
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


@lru_cache(maxsize=64)
def _zeros(count: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int64)


def _grouped_product(x: torch.Tensor, x_scale: torch.Tensor, weight: QuantizedWeight, groups: int) -> torch.Tensor:
    """One integer product per group of coordinates that share both scales; `[tokens, out]`, both scales applied."""
    x_scale, scale = expand_scales(x_scale, groups), expand_scales(weight.scale, groups)
    zero_point = None if weight.zero_point is None else expand_scales(weight.zero_point, groups)
    size = weight.in_features // groups
    y = torch.zeros(x.shape[0], weight.out_features)
    for group in range(groups):
        columns, one = slice(group * size, (group + 1) * size), slice(group, group + 1)
        y += _product(
            x[:, columns].contiguous(),
            weight.integers[:, columns],
            scale[:, one],
            None if zero_point is None else zero_point[:, one],
        ).mul_(x_scale[:, one])
    return y


def _product(
    x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Returns scale * sum over k of x * (integers - zero_point), `[tokens, out]`, float32."""
    total = _integer_product(x, integers)
    if zero_point is not None:
        total -= x.sum(1, keepdim=True, dtype=torch.int32) * zero_point.T.to(torch.int32)
    return total.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale.float().T)


def _integer_product(x: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Returns x integers^T, `[tokens, out]`, int32.

    With the weight as the left operand oneDNN reads it row by row in the order of memory: on 2 cores with AVX512-VNNI
    and 4096 x 4096 that takes a third to two thirds of the time of the other order.
    """
    if not _int_mm_is_exact():
        low, high = x & 15, x >> 4  # pairs of products of these fit into 16 bits
        return _int_mm(low, integers) + (_int_mm(high, integers) << 4)
    return _int_mm(x, integers)


@lru_cache(maxsize=1)
def _int_mm_is_exact() -> bool:
    """Tries the largest integers: without VNNI it may saturate like the other product."""
    integers = torch.full((16, 64), 127, dtype=torch.int8)
    return all(bool((_int_mm(integers[:n], integers) == 64 * 127 * 127).all()) for n in (1, 16))


def _int_mm(x: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    if x.shape[0] <= _MOST_SINGLE_TOKENS:
        return torch.cat([torch._int_mm(integers, token.unsqueeze(1)) for token in x], dim=1).T
    return torch._int_mm(integers, x.T.contiguous()).T
