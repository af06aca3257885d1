"""The attention of the native decoder step, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from .native_weights import MISSING, everywhere

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")


def attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`[batch, 1, heads * head_dim]`, float64, of keys and values `[batch, cached heads, positions, head_dim]`."""
    query = query.double().unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (keys, values))
    scores = query @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "cached_heads", "head_dim", "positions"),
    [(1, 9, 3, 64, 100), (2, 14, 2, 64, 1), (3, 8, 8, 128, 700), (2, 4, 2, 24, 257), (1, 3, 1, 7, 17)],
)
def test_attention_is_the_reference_in_every_dtype(
    instruction_set: str, dtype: torch.dtype, batch: int, heads: int, cached_heads: int, head_dim: int, positions: int
) -> None:
    generator = torch.Generator().manual_seed(positions)
    query = torch.randn(batch, 1, heads * head_dim, generator=generator).to(dtype)
    shape = (batch, cached_heads, positions + 5, head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    keys[:, :, positions:] = values[:, :, positions:] = torch.nan  # nobody may look there
    mask = torch.rand(batch, positions, generator=generator) < 0.7
    mask[:, -1] = True
    for seen in (None, mask):
        output = torch.ops.quad_native.attend(query, keys, values, positions, seen, 0.3)
        assert output.dtype == dtype
        filled = keys[:, :, :positions], values[:, :, :positions]
        wanted = attention_reference(query, *filled, seen, 0.3)
        error = (output.double() - wanted).abs().max() / wanted.abs().max()
        assert error < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        each = [
            torch.ops.quad_native.attend(
                query[i : i + 1], keys[i : i + 1], values[i : i + 1], positions, None if seen is None else mask[i], 0.3
            )
            for i in range(batch)
        ]
        assert torch.equal(output, torch.cat(each))


def test_attention_gives_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 1, 6 * 64, generator=generator).bfloat16()
    keys, values = (torch.randn(2, 2, 900, 64, generator=generator).bfloat16() for _ in range(2))
    outputs = [torch.ops.quad_native.attend(query, keys, values, 900, None, 0.125) for _ in everywhere((1, 2))]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_attention_far_apart_scores_stay_finite(instruction_set: str) -> None:
    keys = torch.zeros(1, 1, 600, 32)
    keys[0, 0, :, 0] = torch.linspace(-3000, 3000, 600)
    values = torch.arange(600.0).view(1, 1, 600, 1).expand(1, 1, 600, 32).contiguous()
    query = torch.zeros(1, 1, 32)
    query[..., 0] = 1
    output = torch.ops.quad_native.attend(query, keys, values, 600, None, 1.0)
    torch.testing.assert_close(output, torch.full_like(output, 599.0), rtol=0, atol=0.01)


def test_attention_does_not_hide_a_nan(instruction_set: str) -> None:
    """A broken key breaks the heads that see it, and no other; behind a mask it breaks none."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 4 * 32, generator=generator)
    keys, values = (torch.randn(1, 2, 300, 32, generator=generator) for _ in range(2))
    keys[0, 1, 270] = torch.nan
    output = torch.ops.quad_native.attend(query, keys, values, 300, None, 0.2).view(4, 32)
    assert output[:2].isfinite().all()
    assert output[2:].isnan().all()
    mask = torch.ones(1, 300, dtype=torch.bool)
    mask[0, 270] = False
    assert torch.ops.quad_native.attend(query, keys, values, 300, mask, 0.2).isfinite().all()
    keys[0, 0] = torch.nan
    assert torch.ops.quad_native.attend(query, keys, values, 300, mask, 0.2).view(4, 32)[:2].isnan().all()
