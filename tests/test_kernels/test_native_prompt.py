"""The attention of the positions of a prompt, over itself and behind masks, with every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quad_kernels.native import library

from .native_weights import MISSING, everywhere

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Masks = Callable[[int, int, int], torch.Tensor]
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


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`[batch, positions, heads * head_dim]`, float64; zeros where a mask shows nothing."""
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ values).transpose(1, 2).flatten(2)


def padded_left(batch: int, positions: int, keys: int) -> torch.Tensor:
    """What transformers makes of sequences of different lengths behind a cache, `[batch, 1, positions, keys]`."""
    seen = torch.ones(positions, keys, dtype=torch.bool).tril(keys - positions).repeat(batch, 1, 1, 1)
    for i in range(batch):
        seen[i, :, :, : i * keys // (batch + 1)] = False
    return seen


def windowed(batch: int, positions: int, keys: int) -> torch.Tensor:
    """A window of 20 positions, for all sequences."""
    return padded_left(1, positions, keys).triu(keys - positions - 19)


def scattered(batch: int, positions: int, keys: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(keys)
    return torch.rand(batch, 1, positions, keys, generator=generator) < 0.6


def of_static_cache(batch: int, positions: int, keys: int) -> torch.Tensor:
    """Room behind the prompt, and every key in between; its rows are not dense in memory."""
    return torch.ones(positions, keys, dtype=torch.bool).tril(keys // 4).T.contiguous().T.expand(batch, 1, -1, -1)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_of", [padded_left, windowed, scattered, of_static_cache])
@pytest.mark.parametrize("more", [0, 1, 90])
def test_a_mask_says_what_is_seen(instruction_set: str, dtype: torch.dtype, mask_of: Masks, more: int) -> None:
    query, _, _ = random_heads(3, 6, 2, 40, 101, dtype)
    _, keys, values = random_heads(3, 2, 2, 40, 101 + more, dtype)
    mask = mask_of(3, 101, 101 + more)
    output = torch.ops.quad_native.attend_prompt(query, keys, values, 0.3, mask)
    wanted = reference(query, keys, values, 0.3, mask)
    error = (output.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    # Neither what nobody sees nor how much of it there is plays a part, and no sequence minds the others.
    for i in range(3):
        own = mask[i : i + 1] if len(mask) == 3 else mask
        hidden = ~own.any(2)[:, 0]
        parts = query[i : i + 1], *(x[i : i + 1].clone() for x in (keys, values))
        for x in parts[1:]:
            x.transpose(1, 2)[hidden] = torch.nan
        assert torch.equal(torch.ops.quad_native.attend_prompt(*parts, 0.3, own), output[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_of_what_goes_without_one_gives_the_same_bits(
    instruction_set: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    given = random_heads(*shape, dtype)
    wanted = torch.ops.quad_native.attend_prompt(*given, 0.3)
    positions = shape[4]
    mask = torch.ones(1, 1, positions, positions, dtype=torch.bool).tril()
    assert torch.equal(torch.ops.quad_native.attend_prompt(*given, 0.3, mask), wanted)
    room = torch.nn.functional.pad(mask, (0, 70))
    query, keys, values = given
    wider = [torch.nn.functional.pad(x, (0, 0, 0, 70), value=torch.nan) for x in (keys, values)]
    assert torch.equal(torch.ops.quad_native.attend_prompt(query, *wider, 0.3, room), wanted)


def test_what_is_no_number_is_not_seen_through_a_mask(instruction_set: str) -> None:
    query, keys, values = (x.contiguous() for x in random_heads(1, 4, 2, 32, 200))
    mask = scattered(1, 200, 200)
    mask[..., 0] = True
    clean = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2, mask)
    for key in (5, 130):
        for part in (keys, values):
            kept = part[0, 1, key].clone()
            part[0, 1, key] = torch.nan
            output = torch.ops.quad_native.attend_prompt(query, keys, values, 0.2, mask)
            seers = mask[0, 0, :, key]
            assert torch.equal(output[:, ~seers], clean[:, ~seers])
            assert output[:, seers, 64:].isnan().all()
            part[0, 1, key] = kept


def test_a_prompt_gives_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    given = random_heads(2, 6, 2, 64, 300, torch.bfloat16)
    for mask in (None, scattered(2, 300, 300)):
        outputs = [torch.ops.quad_native.attend_prompt(*given, 0.125, mask) for _ in everywhere((1, 2, 3))]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_it_is_wanted_where_it_was_the_faster_one(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUAD_KERNELS_PROMPTS", raising=False)
    assert library.attends_prompts() == (instruction_set in ("avx2", "avxvnni"))
    for value in ("0", "1"):
        monkeypatch.setenv("QUAD_KERNELS_PROMPTS", value)
        assert library.attends_prompts() == (value == "1")


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
    mask = scattered(1, 20, 20)
    for wrong in (mask[:, 0], mask[..., 1:], mask[:, :, 1:], mask.expand(1, 4, 20, 20), mask.expand(2, 1, 20, 20)):
        with pytest.raises(RuntimeError, match="the mask must be bool, "):
            torch.ops.quad_native.attend_prompt(query, keys, values, 0.2, wrong)
    with pytest.raises(RuntimeError, match="the mask must be bool, "):
        torch.ops.quad_native.attend_prompt(query, keys, values, 0.2, mask.float())


def test_the_operator_is_declared_rightly() -> None:
    given = random_heads(2, 4, 2, 32, 20, torch.bfloat16)
    operator = torch.ops.quad_native.attend_prompt.default
    for mask in (None, scattered(2, 20, 20)):
        checked = torch.library.opcheck(operator, (*given, 0.2, mask), test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}
