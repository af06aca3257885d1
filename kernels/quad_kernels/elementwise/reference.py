"""The operations in plain PyTorch, rounded where transformers' Llama rounds."""

from collections.abc import Sequence

import torch

from quad_kernels.formats import RMSNorm


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    head_norms: Sequence[torch.Tensor],
    eps: float,
) -> None:
    """Applies norms and rotary embedding to the heads of queries and keys, in their memory.

    Args:
        query: `[tokens, heads * head_dim]`, contiguous.
        key: `[tokens, kv_heads * head_dim]`, contiguous.
        cosine: of the angles, `[tokens, head_dim]`, dtype of `query`.
        sine: likewise.
        head_norms: weights of the norms of queries and of keys, `[head_dim]` each, or none.
        eps: of these norms.
    """
    for index, states in enumerate((query, key)):
        heads = states.view(len(states), -1, cosine.shape[1])
        x = RMSNorm(head_norms[index], eps)(heads) if head_norms else heads
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        heads.copy_(x * cosine[:, None] + turned * sine[:, None])


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up, `[tokens, channels]`, the activation rounded to the dtype before the product."""
    return torch.nn.functional.silu(gate) * up
