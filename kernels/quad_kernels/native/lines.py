"""The layouts of the native kernels: cache lines of 16 output channels, in the order in which the products read them.

A line of `lines4` holds 16 channels x 8 inputs: the low four bits of byte 4 c + i are input i of channel c, the high
four bits input 4 + i, both with an offset of 8. A line of `lines8` holds 16 channels x 4 inputs, byte 4 c + i with an
offset of 128. `lines_e2m1` is `lines4` with the codes of doubled 4-bit floating-point numbers, without an offset.
Sixteen channels over all inputs are contiguous. Channels are filled up to 16, inputs to 64, with the integer 0.

The offset makes weights unsigned, which is what the processors' products of bytes want on one side; it is taken off
with the sum of the inputs, one number per token.
"""

import math
import weakref
from functools import partial
from operator import is_
from typing import Any

import torch

from quad_kernels.float4 import e2m1_codes, e2m1_numbers
from quad_kernels.formats import InputQuantization, InputSplit, LowRank
from quad_kernels.layouts import WeightForm, WeightLayout
from quad_kernels.native import library
from quad_kernels.native.pages import in_large_pages
from quad_kernels.weight import QuantizedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # and their numbers in the operators
CHANNELS = 16
INPUTS = 64  # inputs are filled up to a multiple of this
_STORED = {"lines4": 0, "lines8": 1, "lines_e2m1": 2}  # likewise
_KEPT = "_kept"  # of a weight, what it was last multiplied with


def _padded(integers: torch.Tensor, offset: int) -> torch.Tensor:
    rows, columns = integers.shape
    padded = torch.nn.functional.pad(integers, (0, -columns % INPUTS, 0, -rows % CHANNELS))
    return padded.view(torch.uint8) + offset  # wraps like two's complement: no overflow


def _pack4(integers: torch.Tensor) -> torch.Tensor:
    """Returns `[blocks, lines, 64]`, uint8, from `[out, in]`, int8, from -8 to 7."""
    return _halves(_padded(integers, 8))


def _halves(codes: torch.Tensor) -> torch.Tensor:
    parts = codes.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, CHANNELS))
    return in_large_pages((parts[..., 0, :] | parts[..., 1, :] << 4).transpose(1, 2).flatten(2).contiguous())


def _unpack4(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """Inverse of `_pack4`: `[16 blocks, in_features]`, int8."""
    return (_codes(stored, in_features).view(torch.int8) - 8).contiguous()


def _codes(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """What the halves of bytes hold, `[16 blocks, in_features]`, uint8."""
    parts = stored.unflatten(2, (CHANNELS, 4)).transpose(1, 2)
    both = torch.stack([parts & 15, parts >> 4], dim=-2).flatten(2).flatten(0, 1)
    return both[:, :in_features].contiguous()


def _pack_e2m1(integers: torch.Tensor) -> torch.Tensor:
    """Returns `[blocks, lines, 64]`, uint8, from doubled numbers `[out, in]`, int8."""
    return _halves(e2m1_codes(_padded(integers, 0).view(torch.int8)))


def _unpack_e2m1(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """Inverse of `_pack_e2m1`: `[16 blocks, in_features]`, int8."""
    return e2m1_numbers(_codes(stored, in_features))


def _pack8(integers: torch.Tensor) -> torch.Tensor:
    """Returns `[blocks, lines, 64]`, uint8, from `[out, in]`, int8."""
    parts = _padded(integers, 128).unflatten(1, (-1, 4)).unflatten(0, (-1, CHANNELS))
    return in_large_pages(parts.transpose(1, 2).flatten(2).contiguous())


def _unpack8(stored: torch.Tensor, in_features: int) -> torch.Tensor:
    """Inverse of `_pack8`: `[16 blocks, in_features]`, int8."""
    rows = stored.unflatten(2, (CHANNELS, 4)).transpose(1, 2).flatten(2).flatten(0, 1)
    return (rows[:, :in_features] ^ 128).contiguous().view(torch.int8)


def fits(layout: str, weight: WeightForm, x_scales: int) -> bool:
    """Returns whether inputs that share all scales are a whole number of lines of `layout`, or all inputs.

    Sub-scales multiply sums over inputs that share both scales, all of them, or are in the integers.
    """
    if layout not in LAYOUTS:
        return False
    scales = math.lcm(weight.scale.shape[1], x_scales)
    per_line = 4 if layout == "lines8" else 8
    if weight.factors is not None:
        return layout == "lines4" and scales == 1 and weight.in_features // len(weight.factors) % per_line == 0
    return scales == 1 or weight.in_features // scales % per_line == 0


def _accepts(layout: str, weight: WeightForm) -> bool:
    known = layout == "lines8" or layout == _narrow_layout(weight)
    return known and weight.scale.is_cpu and fits(layout, weight, 1)


def _narrow_layout(weight: WeightForm) -> str | None:
    """The layout of half a byte for a weight, None if its integers do not fit into it."""
    if weight.number_format != "int":
        return "lines_e2m1"
    return "lines4" if weight.bits <= 4 else None


def best_layout(weight: WeightForm) -> str:
    """Returns the layout of a weight."""
    return _narrow_layout(weight) or "lines8"


def takes(weight: QuantizedWeight, x_scales: int, *tensors: torch.Tensor | None) -> bool:
    """Returns whether the kernels multiply a weight by inputs of so many scales, given these other tensors."""
    known = all(tensor is None or tensor.dtype in DTYPES for tensor in (weight.scale, *tensors))
    return known and fits(weight.layout, weight, x_scales)


def settings(
    quantization: InputQuantization, split: InputSplit
) -> tuple[int, float, int, int, bool, int, int, int, bool, bool]:
    """Returns the arguments of the operators that describe the input."""
    return (
        quantization.bits,
        quantization.clip_ratio,
        quantization.groups(split.residual_width),
        quantization.largest_sub_scale,
        quantization.symmetric,
        quantization.kernel_format,
        split.outliers,
        split.block,
        split.keep_width,
        split.hadamard,
    )


def operands(
    weight: QuantizedWeight,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int, int]:
    """Returns the arguments of the operators that describe a weight in lines."""
    return (
        weight.integers,
        weight.scale,
        weight.zero_point,
        weight.factors,
        weight.in_features,
        weight.out_features,
        _STORED[weight.layout],
    )


def linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    split: InputSplit,
    quantization: InputQuantization,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    branch: LowRank | None,
) -> torch.Tensor | None:
    """Returns a whole layer of `x`, `[..., width]`, as `[..., out]`, dtype of `x`; None if they do not take it."""
    down, up = (None, None) if branch is None else branch
    # A graph may be kept, and run in another process, where the number of a plan means nothing.
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    kept: _Kept | None = None if in_graph else weight.__dict__.get(_KEPT)
    if kept is not None and x.dtype in DTYPES and kept.are(split, quantization, outlier_weight, bias, down, up):
        return torch.ops.quad_native.planned_linear(x, kept.number())
    described = _described(weight, split, quantization)
    if described is None or x.dtype not in DTYPES:
        return None
    for tensor in (outlier_weight, bias, up):
        if tensor is not None and tensor.dtype not in DTYPES:
            return None
    if not in_graph:
        weight.__dict__[_KEPT] = _Kept(described, split, quantization, outlier_weight, bias, down, up)
    return torch.ops.quad_native.linear(x, *described, outlier_weight, bias, down, up)


def _described(weight: QuantizedWeight, split: InputSplit, quantization: InputQuantization) -> tuple[Any, ...] | None:
    """Returns the arguments that describe a layer's input and weight, None if the kernels do not take them."""
    if not takes(weight, quantization.scales(weight.in_features)):
        return None
    return (*settings(quantization, split), *operands(weight))


class _Kept:
    """What a weight was last multiplied with. When it is again, it gets a plan: a number instead of twenty arguments.

    To hand those over takes longer than to multiply one token by a small layer. The plan goes with this object, which
    stays with the weight. Copies and pickles of the weight have none.
    """

    def __init__(self, described: tuple[Any, ...], *parts: Any) -> None:
        self._described = described
        self._parts = parts  # as `are` gets them
        self._number: int | None = None

    def are(self, *parts: Any) -> bool:
        """Whether the parts are the same objects."""
        return all(map(is_, self._parts, parts))

    def number(self) -> int:
        """The number of the plan."""
        if self._number is None:
            self._number = torch.ops.quad_native.plan_linear(*self._described, *self._parts[2:])
            weakref.finalize(self, library.forget_linear, self._number).atexit = False
        return self._number

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


LAYOUTS = {
    "lines4": WeightLayout(pack=_pack4, unpack=_unpack4, accepts=partial(_accepts, "lines4"), linear=linear),
    "lines_e2m1": WeightLayout(
        pack=_pack_e2m1, unpack=_unpack_e2m1, accepts=partial(_accepts, "lines_e2m1"), linear=linear
    ),
    "lines8": WeightLayout(pack=_pack8, unpack=_unpack8, accepts=partial(_accepts, "lines8"), linear=linear),
}
