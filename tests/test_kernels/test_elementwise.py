"""What a block computes between its linears: the reference against PyTorch's pieces, Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import choose_backend
from quad_kernels.elementwise import reference

pytest.importorskip("triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def angles(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(3, 3 + tokens)[:, None] * torch.cat([frequencies, frequencies])
    return angle.cos().to(dtype), angle.sin().to(dtype)


def test_the_reference_is_rotary_embedding_of_transformers() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(5, heads, 24, generator=generator) for heads in (4, 2))
    cosine, sine = angles(5, 24, torch.float32)
    norms = [Qwen3RMSNorm(24, eps=1e-6) for _ in range(2)]
    weights = [torch.rand(24, generator=generator) + 0.5 for _ in norms]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data = weight
    normalised = [norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (query, key), strict=True)]
    wanted = apply_rotary_pos_emb(*normalised, cosine[None], sine[None])
    own = [x.reshape(5, -1).clone() for x in (query, key)]
    reference.rotate(*own, cosine, sine, weights, 1e-6)
    for got, expected in zip(own, wanted, strict=True):
        torch.testing.assert_close(got, expected[0].transpose(0, 1).reshape(5, -1))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 26), (9, 3, 128)])
def test_rotate(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normalised: bool
) -> None:
    generator = torch.Generator().manual_seed(heads)
    states = [torch.randn(3, n * head_dim, generator=generator).to(dtype) for n in (heads, kv_heads)]
    norms = [(torch.rand(head_dim, generator=generator) + 0.5).to(dtype) for _ in states] if normalised else []
    cosine, sine = angles(3, head_dim, dtype)
    own = [x.to(device, copy=True) for x in states]
    moved = [norm.to(device) for norm in norms]
    choose_backend(device).rotate(*own, cosine.to(device), sine.to(device), moved, 1e-6)
    reference.rotate(*states, cosine, sine, norms, 1e-6)
    for got, wanted in zip(own, states, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(5, 700, generator=generator) for _ in range(2))
    gate[0, :4] = torch.tensor([0.0, -90.0, 90.0, -1e-6])
    gate, up = gate.to(dtype), up.to(dtype)
    got = choose_backend(device).gated(gate.to(device), up.to(device)).cpu()
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(got.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_no_tokens(device: torch.device) -> None:
    backend = choose_backend(device)
    empty = torch.empty(0, 64, device=device)
    backend.rotate(empty, empty[:, :32], empty[:, :16], empty[:, :16], [], 1e-6)
    assert backend.gated(empty, empty).shape == (0, 64)
