"""A decoder block in few launches, where each launch costs more than its arithmetic: a token on a GPU.

A stock block of a quantized model launches near 40 kernels for a token: norms, rotary embedding, activation and sums
in PyTorch's pieces, and a quantizer and a product for each linear. Here norm and quantizer are one, linears that share
an input share it quantized, rotary embedding is one and so is the gated activation: 15 launches. Every backend runs it;
the native CPU kernels have calls of their own (`quad_kernels.native.block`).
"""

import os
from collections.abc import Sequence

import torch

from quad_kernels.backends import Backend, choose_backend
from quad_kernels.formats import QuantizedActivations, RMSNorm
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.native.block import BlockLinear

VARIABLE = "QUAD_KERNELS_BLOCKS"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_wanted() -> bool:
    """Whether blocks may run here: with QUAD_KERNELS_BLOCKS=1. Off by default, because no GPU has run it yet."""
    return os.environ.get(VARIABLE) == "1"


def in_few_launches(device: torch.device) -> bool:
    """Whether blocks on `device` run here: if that is wanted, outside of graphs of torch.compile, which joins launches
    itself, and not where the native CPU kernels run.
    """
    return is_wanted() and not torch.compiler.is_compiling() and choose_backend(device).name != "native"


def takes(groups: Sequence[Sequence[BlockLinear]], dtype: torch.dtype) -> bool:
    """Returns whether linears that share inputs in these groups are split and quantized alike in each."""
    alike = all(
        (linear.split, linear.quantization) == (group[0].split, group[0].quantization)
        for group in groups
        for linear in group
    )
    return alike and dtype in _DTYPES


def block_in(
    x: torch.Tensor,
    norm: RMSNorm,
    linears: Sequence[BlockLinear],
    cosine: torch.Tensor,
    sine: torch.Tensor,
    head_norms: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Returns queries, keys and values of a block; arguments and result are those of `quad_kernels.native.block_in`."""
    batch, positions = x.shape[:2]
    backend = choose_backend(x.device)
    query, key, value = _products(backend, x.reshape(-1, x.shape[-1]), linears, norm)
    cosine, sine = (angles.expand(batch, -1, -1).reshape(batch * positions, -1) for angles in (cosine, sine))
    backend.rotate(query, key, cosine, sine, head_norms, norm.eps)
    return [states.view(batch, positions, -1) for states in (query, key, value)]


def block_out(
    attention: torch.Tensor,
    residual: torch.Tensor,
    norm: RMSNorm,
    output: BlockLinear,
    gate_up: Sequence[BlockLinear],
    down: BlockLinear,
) -> torch.Tensor:
    """Returns a block's hidden states; arguments and result are those of `quad_kernels.native.block_out`."""
    backend = choose_backend(residual.device)
    (y,) = _products(backend, attention.reshape(-1, attention.shape[-1]), [output], None)
    hidden = residual.reshape(y.shape) + y
    gate, up = _products(backend, hidden, gate_up, norm)
    (y,) = _products(backend, backend.gated(gate, up), [down], None)
    return (hidden + y).view(residual.shape)


def _products(
    backend: Backend, x: torch.Tensor, linears: Sequence[BlockLinear], norm: RMSNorm | None
) -> list[torch.Tensor]:
    """The outputs of linears of one input, `[tokens, width]`, which is normalised first."""
    first = linears[0]
    if norm is not None and any(linear.branch is not None for linear in linears):
        x, norm = norm(x), None  # the branch reads it as well
    quantized = QuantizedActivations(
        *backend.quantize_activations(x, first.quantization, first.split, norm, packed=False)
    )
    return [_product(backend, x, quantized, linear) for linear in linears]


def _product(backend: Backend, x: torch.Tensor, quantized: QuantizedActivations, linear: BlockLinear) -> torch.Tensor:
    outlier, weight = quantized.outlier, linear.outlier_weight
    if linear.branch is not None:
        outlier, weight = linear.branch.behind(x, outlier, weight)
    if weight is None:
        outlier = None
    return backend.integer_linear(
        LinearOperands(quantized.integers, quantized.scale, linear.weight, outlier, weight, linear.bias, x.dtype)
    )
