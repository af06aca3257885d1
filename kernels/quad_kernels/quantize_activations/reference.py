"""Plain PyTorch dynamic activation quantization; the truth for every backend."""

from typing import NamedTuple

import torch

from quad_kernels import float4
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.hadamard.construct import plan_hadamard
from quad_kernels.hadamard.reference import apply_hadamard
from quad_kernels.packing import pack_nibbles


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit,
    norm: RMSNorm | None,
    packed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """See `quad_kernels.quantize_activations`; `x` is `[tokens, width]`."""
    if norm is not None:
        x = norm(x)
    outlier, residual = split.divide(x)
    if split.hadamard:
        residual = apply_hadamard(residual, plan_hadamard(split.residual_width))
    integers, scale = quantize(residual, quantization)
    if outlier is not None:
        outlier = outlier.clone(memory_format=torch.contiguous_format)  # a custom op may not return a view of its input
    return outlier, pack_nibbles(integers) if packed else integers, scale


def quantize(x: torch.Tensor, quantization: InputQuantization) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[tokens, n]`: integers `[tokens, n]`, int8, and scales `[tokens, scales]`, float32."""
    grouped = x.unflatten(-1, (quantization.groups(x.shape[-1]), -1))
    found = grids(x, quantization)
    # A division, as in compressed-tensors: at clip ratio 1 the largest value is a tie, which a product with the
    # inverse would round the other way.
    integers = grouped / _divisor(found.steps()).unsqueeze(-1)
    if quantization.number_format != "int":
        integers = float4.round_e2m1(integers)
    else:
        integers = integers.round_().clamp_(found.low.unsqueeze(-1), found.high.unsqueeze(-1))
    if found.factors is not None:
        integers *= found.factors.unsqueeze(-1)
    return integers.flatten(-2).to(torch.int8), found.scale


class InputGrids(NamedTuple):
    """The grids of the groups of some tokens; all are float32.

    Attributes:
        scale: `[tokens, scales]`.
        low: smallest integer, less the zero point on asymmetric grids, `[tokens, groups]`.
        high: likewise the largest.
        factors: integers from 1 on, `[tokens, groups]`, such that the largest step of a token is the largest factor
            times its scale; None without sub-scales.
    """

    scale: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    factors: torch.Tensor | None = None

    def steps(self) -> torch.Tensor:
        """Returns the distance of two points, `[tokens, groups]`."""
        return self.scale if self.factors is None else self.scale * self.factors


def grids(x: torch.Tensor, quantization: InputQuantization) -> InputGrids:
    """Returns the grids of `[tokens, n]`."""
    grouped = x.unflatten(-1, (quantization.groups(x.shape[-1]), -1))
    if not quantization.symmetric:
        return _asymmetric_grids(grouped, quantization)
    largest, half = grouped.abs().amax(-1).float(), 2.0 ** (quantization.bits - 1)
    if quantization.number_format != "int":
        steps = _float_steps(grouped, largest * quantization.clip_ratio, quantization)
        most = torch.full_like(steps, float4.LARGEST)
        return InputGrids(steps, -most, most)
    steps = _normal(_over(largest * quantization.clip_ratio, half - 0.5))
    low, high = torch.full_like(steps, -half), torch.full_like(steps, half - 1)
    most = quantization.largest_sub_scale
    if not most:
        return InputGrids(steps, low, high)
    scale = _normal(_over(steps.amax(-1, keepdim=True), most))
    return InputGrids(scale, low, high, (steps / _divisor(scale)).round_().clamp_(1, most))


def _asymmetric_grids(grouped: torch.Tensor, quantization: InputQuantization) -> InputGrids:
    levels = 2.0**quantization.bits - 1
    least, largest = (grouped.amin(-1).float().clamp(max=0), grouped.amax(-1).float().clamp(min=0))
    least, largest = least * quantization.clip_ratio, largest * quantization.clip_ratio
    scale = _normal(_over(largest, levels) - _over(least, levels))  # their difference could be infinite
    zero_point = (-least / _divisor(scale)).round_().clamp_(0, levels).nan_to_num_()  # of tokens that are not finite
    return InputGrids(scale, -zero_point, levels - zero_point)


def _float_steps(grouped: torch.Tensor, largest: torch.Tensor, quantization: InputQuantization) -> torch.Tensor:
    six = _normal(float4.input_scale(largest, quantization.number_format))
    if not quantization.four_over_six:
        return six
    four = _normal(float4.input_scale(largest, quantization.number_format, top=8))
    return torch.where(rounding_cost(grouped, four) < rounding_cost(grouped, six), four, six)


def rounding_cost(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the squared error of rounding groups, `[..., groups, n]`, to e2m1 numbers times `[..., groups]`.

    Errors are counted in whole 32nds of the scale, up to 4 scales each: sums of their squares are exact in float32, so
    that every kernel prefers the same of two scales.
    """
    quotient = grouped / _divisor(scale).unsqueeze(-1)
    error = (quotient - float4.round_e2m1(quotient.clone())).clamp_(-4, 4).mul_(32).round_()
    return error.square_().sum(-1) * scale * scale


def _over(x: torch.Tensor, number: float) -> torch.Tensor:
    """By a tensor: CUDA would multiply by the rounded inverse of a number."""
    return x / torch.full_like(x, number)


def _divisor(steps: torch.Tensor) -> torch.Tensor:
    """Infinity instead of 0: what an all-zero token over it gives is 0."""
    return torch.where(steps > 0, steps, torch.full_like(steps, torch.inf))


def _normal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.zeros_like(scale), scale)
