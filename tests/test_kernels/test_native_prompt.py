"""The attention of a prompt over itself, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from .native_weights import MISSING, everywhere

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 9, 3, 64, 100),  # batch, heads, cached heads, head_dim, positions
    (2, 14, 2, 64, 2),
    (2, 4, 4, 128, 200),
    (3, 4, 2, 24, 65),
    (1, 3, 1, 7, 49),
    (1, 2, 1, 80, 1),
]

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")


def random_heads(
    batch: int, heads: int, cached_heads: int, head_dim: int, positions: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries as a block has them, positions before heads; keys as a cache does, with room behind them."""
    generator = torch.Generator().manual_seed(positions)
    query = torch.randn(batch, positions, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(batch, cached_heads, positions + 3, head_dim, generator=generator).to(dtype)
    keys[:, :, positions:] = torch.nan  # nobody may look there
    values = torch.randn(batch, positions, cached_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    return query, keys[:, :, :positions], values


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """`[batch, positions, heads * head_dim]`, float64."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_position_sees_itself_and_those_before_it(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    given = random_heads(*shape, dtype)
    output = torch.ops.quad_native.attend_prompt(*given, 0.3)
    assert output.dtype == dtype
    wanted = reference(*given, 0.3)
    assert output.shape == wanted.shape
    error = (output.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    apart = [torch.ops.quad_native.attend_prompt(*(x[i : i + 1] for x in given), 0.3) for i in range(shape[0])]
    assert torch.equal(output, torch.cat(apart))
    dense = torch.ops.quad_native.attend_prompt(*(x.contiguous() for x in given), 0.3)
    assert torch.equal(output, dense)
    # A position's output does not depend on what follows it.
    for count in {1, shape[4] // 2 + 1, shape[4]}:
        first = torch.ops.quad_native.attend_prompt(*(x[:, :, :count] for x in given), 0.3)
        assert torch.equal(first, output[:, :count])


def test_a_prompt_gives_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    given = random_heads(2, 6, 2, 64, 300, torch.bfloat16)
    outputs = [torch.ops.quad_native.attend_prompt(*given, 0.125) for _ in everywhere((1, 2, 3))]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_scores_far_apart_stay_finite(instruction_set: str) -> None:
    """They rise and fall over the positions, so the greatest so far is exchanged often, and not at all."""
    query = torch.zeros(1, 1, 300, 32)
    query[..., 0] = 1
    values = torch.arange(300.0).view(1, 1, 300, 1).expand(1, 1, 300, 32).contiguous()
    keys = torch.zeros(1, 1, 300, 32)
    keys[0, 0, :, 0] = torch.linspace(-3000, 3000, 300)
    output = torch.ops.quad_native.attend_prompt(query, keys, values, 1.0)
    torch.testing.assert_close(output[0, :, 0], torch.arange(300.0), rtol=0, atol=0.01)
    output = torch.ops.quad_native.attend_prompt(query, keys.flip(2), values, 1.0)
    torch.testing.assert_close(output[0, :, 0], torch.zeros(300), rtol=0, atol=0.01)


def test_what_is_no_number_is_seen_by_those_behind_it_alone(instruction_set: str) -> None:
    query, keys, values = (x.contiguous() for x in random_heads(1, 4, 2, 32, 200))
    clean = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2)
    keys[0, 1, 130] = torch.nan
    output = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2)
    assert torch.equal(output[:, :130], clean[:, :130])
    assert torch.equal(output[..., :64], clean[..., :64])
    assert output[:, 130:, 64:].isnan().all()
    query, keys, values = (x.contiguous() for x in random_heads(1, 4, 2, 32, 200))
    for position in (3, 130):
        values[0, 0, position] = torch.inf
        output = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2)
        assert torch.equal(output[:, :position], clean[:, :position])
        assert not output[:, position:, :64].isfinite().any()
        values[0, 0, position] = 0.5
        clean = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2)


def test_what_does_not_fit_is_refused() -> None:
    query, keys, values = random_heads(1, 4, 2, 32, 20)
    for wrong in (keys[:, :, :19], keys[..., :16], keys[:, :1].expand(1, 3, 20, 32), keys[:0]):
        with pytest.raises(RuntimeError, match="the keys and values do not fit the queries"):
            torch.ops.quad_native.attend_prompt(query, wrong, wrong, 0.2)
    with pytest.raises(RuntimeError, match="of one dtype"):
        torch.ops.quad_native.attend_prompt(query, keys.bfloat16(), values, 0.2)


def test_the_operator_is_declared_rightly() -> None:
    given = random_heads(2, 4, 2, 32, 20, torch.bfloat16)
    operator = torch.ops.quad_native.attend_prompt.default
    checked = torch.library.opcheck(operator, (*given, 0.2), test_utils=("test_schema", "test_faketensor"))
    assert set(checked.values()) == {"SUCCESS"}
