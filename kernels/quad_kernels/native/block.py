"""What a decoder block does before and after its attention, in one call each; and all blocks for one token, in one."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from quad_kernels.formats import InputQuantization, InputSplit, LowRank, RMSNorm
from quad_kernels.native import library, lines
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
        branch: low-rank branch of the unsplit input, or None.
    """

    weight: QuantizedWeight
    split: InputSplit
    quantization: InputQuantization
    outlier_weight: torch.Tensor | None
    bias: torch.Tensor | None
    branch: LowRank | None = None


def takes(groups: Sequence[Sequence[BlockLinear]], dtype: torch.dtype) -> bool:
    """Returns whether the kernels take a block whose linears share inputs in these groups."""
    for group in groups:
        first = group[0]
        for linear in group:
            weight, outlier = linear.weight, linear.outlier_weight
            x_scales = linear.quantization.scales(weight.in_features)
            branch = linear.branch or ()
            if not lines.takes(weight, x_scales, outlier, linear.bias, *branch) or dtype not in lines.DTYPES:
                return False
            alike = (linear.split, linear.quantization) == (first.split, first.quantization)
            ranks = (None if t is None else (t.dtype, t.shape[1]) for t in (outlier, first.outlier_weight))
            if not alike or len(set(ranks)) > 1 or _groups(weight) != _groups(first.weight):
                return False
            _, scale, zero_point, sub_scale, *_ = lines.operands(weight)
            tensors = (scale, zero_point, sub_scale, outlier, linear.bias, *branch)
            if not all(t is None or t.is_contiguous() for t in tensors):
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
        x, norm.weight, norm.eps, cosine, sine, list(head_norms), parts, numbers, clip
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


class Blocks:
    """The blocks of a decoder as `decode` takes them, put together once.

    Args:
        eps: of all norms.
        scale: of the attention's scores.
    """

    def __init__(self, eps: float, scale: float) -> None:
        self.eps = eps
        self.scale = scale
        self._norms: list[torch.Tensor] = []
        self._head_norms: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []
        self._numbers: list[int] = []
        self._clip_ratios: list[float] = []
        self._number: int | None = None  # of the plan that the library keeps

    def append(
        self,
        groups: Sequence[Sequence[BlockLinear]],
        norms: tuple[torch.Tensor, torch.Tensor],
        head_norms: Sequence[torch.Tensor] = (),
    ) -> None:
        """Adds the next block.

        Args:
            groups: q, k and v; o_proj; gate and up; down_proj.
            norms: weights of the norms before the attention and before the MLP, `[width]`.
            head_norms: weights of the norms of queries and keys, `[head_dim]` each, or none.
        """
        self._norms += norms
        self._head_norms += head_norms
        self._clip_ratios += [_append(group, self._parts, self._numbers) for group in groups]

    def decode(
        self,
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        position: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the hidden states of one token of each sequence behind all blocks.

        Args:
            x: hidden states before the first block, `[batch, 1, width]`.
            cosine: of the angles, `[batch or 1, 1, head_dim]`, dtype of `x`.
            sine: likewise.
            keys: cached keys of each block, `[batch, heads, capacity, head_dim]`, contiguous, dtype of `x`; the token's
                are written at `position`.
            values: likewise.
            position: number of tokens in the caches.
            mask: `[batch, position + 1]`, bool, False where nobody may look; None if all may be seen.
        """
        if self._number is None:
            self._number = torch.ops.quad_native.plan_blocks(
                self._norms, self.eps, self._head_norms, self._parts, self._numbers, self._clip_ratios
            )
            weakref.finalize(self, library.forget_blocks, self._number)
        return torch.ops.quad_native.decode(x, self._number, cosine, sine, keys, values, position, mask, self.scale)


def _groups(weight: QuantizedWeight) -> tuple[int, int]:
    """Groups of scales and of sub-scales."""
    return weight.scale.shape[1], 0 if weight.factors is None else len(weight.factors)


def _append(group: Sequence[BlockLinear], parts: list[torch.Tensor], numbers: list[int]) -> float:
    """Appends what the operators need of linears that share an input; returns its clip ratio."""
    bits, clip_ratio, *rest = lines.settings(group[0].quantization, group[0].split)
    numbers += [bits, *rest]
    for weight, _, _, outlier_weight, bias, branch in group:
        integers, scale, zero_point, sub_scale, *sizes = lines.operands(weight)
        numbers += sizes
        parts += [integers, scale]
        optional = (zero_point, sub_scale, outlier_weight, bias, *(branch or (None, None)))
        parts += [_ABSENT if tensor is None else tensor for tensor in optional]
    return clip_ratio
