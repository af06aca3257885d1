"""What a decoder block does before and after its attention, in one call each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.native import lines
from quad_kernels.weight import QuantizedWeight

_ABSENT = torch.empty(0)


class BlockLinear(NamedTuple):
    """A linear of a block.

    Attributes:
        weight: quantized weight, in lines.
        split: division of the input.
        quantization: quantization of the residual input.
        outlier_weight: `[out, rank]`, or None.
        bias: `[out]`, or None.
    """

    weight: QuantizedWeight
    split: InputSplit
    quantization: InputQuantization
    outlier_weight: torch.Tensor | None
    bias: torch.Tensor | None


def takes(groups: Sequence[Sequence[BlockLinear]], dtype: torch.dtype) -> bool:
    """Returns whether the kernels take a block whose linears share inputs in these groups."""
    for group in groups:
        first = group[0]
        for linear in group:
            weight, outlier = linear.weight, linear.outlier_weight
            x_groups = linear.quantization.groups(weight.in_features)
            if not lines.takes(weight, x_groups, outlier, linear.bias) or dtype not in lines.DTYPES:
                return False
            alike = (linear.split, linear.quantization) == (first.split, first.quantization)
            ranks = (None if t is None else (t.dtype, t.shape[1]) for t in (outlier, first.outlier_weight))
            if not alike or len(set(ranks)) > 1 or weight.scale.shape[1] != first.weight.scale.shape[1]:
                return False
            if not all(t is None or t.is_contiguous() for t in (weight.scale, weight.zero_point, *linear[3:])):
                return False
    return True


def block_in(
    x: torch.Tensor,
    norm: RMSNorm,
    linears: Sequence[BlockLinear],
    cosine: torch.Tensor,
    sine: torch.Tensor,
    head_norms: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Returns queries, keys and values of a block: norm, three linears, norms of the heads, rotary embedding.

    Args:
        x: hidden states, `[batch, positions, width]`.
        norm: norm before the attention.
        linears: q, k and v.
        cosine: of the angles, `[batch or 1, positions, head_dim]`, dtype of `x`.
        sine: likewise.
        head_norms: weights of the norms of queries and keys, `[head_dim]` each, with the eps of `norm`, or none.

    Returns:
        Three tensors `[batch, positions, heads * head_dim]`, dtype of `x`.
    """
    parts: list[torch.Tensor] = []
    numbers: list[int] = []
    clip = _append(linears, parts, numbers)
    return torch.ops.quad_native.block_in(
        x, norm.weight, norm.eps, cosine, sine, cosine.shape[-1], list(head_norms), parts, numbers, clip
    )


def block_out(
    attention: torch.Tensor,
    residual: torch.Tensor,
    norm: RMSNorm,
    output: BlockLinear,
    gate_up: Sequence[BlockLinear],
    down: BlockLinear,
) -> torch.Tensor:
    """Returns a block's hidden states: o_proj, residual, norm, down_proj(silu(gate) * up), residual.

    Args:
        attention: `[batch, positions, heads * head_dim]`.
        residual: input of the block, `[batch, positions, width]`.
        norm: norm before the MLP.
        output: o_proj.
        gate_up: gate_proj and up_proj.
        down: down_proj.
    """
    parts: list[torch.Tensor] = []
    numbers: list[int] = []
    clips = [_append(group, parts, numbers) for group in ([output], gate_up, [down])]
    return torch.ops.quad_native.block_out(attention, residual, norm.weight, norm.eps, parts, numbers, clips)


def _append(group: Sequence[BlockLinear], parts: list[torch.Tensor], numbers: list[int]) -> float:
    """Appends what the operators need of linears that share an input; returns its clip ratio."""
    bits, clip_ratio, *rest = lines.settings(group[0].quantization, group[0].split)
    numbers += [bits, *rest]
    for weight, _, _, outlier_weight, bias in group:
        integers, scale, zero_point, in_features, out_features, wide = lines.operands(weight)
        numbers += [in_features, out_features, wide]
        parts += [integers, scale]
        parts += [_ABSENT if tensor is None else tensor for tensor in (zero_point, outlier_weight, bias)]
    return clip_ratio
