"""A stock linear of a weight that was computed."""

import torch
from torch import nn


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Returns a linear of `dtype` with a weight `[out, in]` and a bias `[out]`, or none."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype).contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype))
    return linear
