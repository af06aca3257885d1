"""Entries of a key/value cache in 4 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import KVEntries, dequantize_kv, ops, quantize_kv

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def cache(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    return (2 * torch.randn(shape, generator=generator) + 5).to(dtype)


def check_equal(device: torch.device, x: torch.Tensor, **arguments: object) -> None:
    got = quantize_kv(x.to(device), **arguments)  # type: ignore[arg-type]
    wanted = quantize_kv(x.cpu(), **arguments, backend="reference")  # type: ignore[arg-type]
    for tensor, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(tensor.cpu(), truth, rtol=0, atol=0, equal_nan=True)
    bits = {"bits": arguments.get("bits", 4)}
    back = dequantize_kv(got, x.dtype, **bits).cpu()  # type: ignore[arg-type]
    truth = dequantize_kv(wanted, x.dtype, **bits, backend="reference")  # type: ignore[arg-type]
    torch.testing.assert_close(back, truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.9])
def test_definition(backend: str, clip_ratio: float) -> None:
    x = cache(2, 3, 64)
    entries = quantize_kv(x, clip_ratio=clip_ratio, backend=backend)
    assert (entries.integers.shape, entries.integers.dtype) == ((2, 3, 32), torch.uint8)
    assert entries.scale.shape == entries.zero.shape == (2, 3)
    low, high = x.double().amin(-1), x.double().amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2 * clip_ratio
    torch.testing.assert_close(entries.zero.double(), middle - half, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entries.scale.double(), 2 * half / 15, rtol=1e-5, atol=0)
    back = dequantize_kv(entries, torch.float32, backend=backend)
    inside = x.clamp((middle - half).float().unsqueeze(-1), (middle + half).float().unsqueeze(-1))
    assert bool(((back - inside).abs() <= 0.5001 * entries.scale.unsqueeze(-1)).all())


def test_eight_bits() -> None:
    x = cache(2, 3, 64)
    entries = quantize_kv(x, bits=8)
    assert (entries.integers.shape, entries.integers.dtype) == ((2, 3, 64), torch.uint8)
    assert (entries.integers.amin(-1) == 0).all()
    assert (entries.integers.amax(-1) == 255).all()
    back = dequantize_kv(entries, torch.float32, bits=8)
    assert bool(((back - x).abs() <= 0.501 * (x.amax(-1, True) - x.amin(-1, True)) / 255).all())


def test_order_of_the_nibbles() -> None:
    """Low nibbles are the first half of the head; the integers of 0 to 15 are themselves."""
    x = torch.arange(16.0)
    entries = quantize_kv(x, backend="reference")
    assert entries.integers.tolist() == [j | (8 + j) << 4 for j in range(8)]
    assert torch.equal(dequantize_kv(entries, torch.float32, backend="reference"), x)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_the_grid_is_the_rounded_one(scale_dtype: torch.dtype) -> None:
    """An offset of many steps: rounding the zero costs the ends of the grid, never more than its own rounding error."""
    x = cache(50, 64) + 100
    entries = quantize_kv(x, scale_dtype=scale_dtype)
    assert entries.scale.dtype == entries.zero.dtype == scale_dtype
    error = (dequantize_kv(entries, torch.float32) - x).abs().amax(-1)
    rounding = torch.finfo(scale_dtype).eps * (x.abs().amax(-1) + 15 * entries.scale.float())
    assert bool((error <= 0.5001 * entries.scale.float() + rounding).all())


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_a_constant_vector_is_exact(backend: str) -> None:
    x = torch.full((2, 8), -3.25)
    assert torch.equal(dequantize_kv(quantize_kv(x, backend=backend), torch.float32, backend=backend), x)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"head_dim \(7\) must be even"):
        quantize_kv(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"scale_dtype \(torch.int8\) must be one of"):
        quantize_kv(torch.ones(2, 8), scale_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"clip_ratio \(1.5\) must lie in"):
        quantize_kv(torch.ones(2, 8), clip_ratio=1.5)
    with pytest.raises(ValueError, match=r"bits \(2\) of a cache entry must be 4 or 8"):
        quantize_kv(torch.ones(2, 8), bits=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even number of integers, not 3"):
        dequantize_kv(KVEntries(torch.zeros(2, 3, dtype=torch.uint8), *torch.ones(2, 2)), torch.float32, bits=8)
    with pytest.raises(ValueError, match=r"got \[3\] and \[2\]"):
        dequantize_kv(KVEntries(torch.zeros(2, 4, dtype=torch.uint8), torch.ones(3), torch.ones(2)), torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 128, 256])
@pytest.mark.parametrize("vectors", [1, 3, 63])
def test_triton_equals_the_reference(device: torch.device, vectors: int, head_dim: int, dtype: torch.dtype) -> None:
    x = cache(vectors, head_dim, dtype=dtype)
    check_equal(device, x, clip_ratio=0.95, scale_dtype=torch.float16)
    check_equal(device, x)
    check_equal(device, x, bits=8)


@pytest.mark.filterwarnings("ignore:(.*value encountered|All-NaN slice):RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_edges(device: torch.device, dtype: torch.dtype) -> None:
    x = cache(7, 64, dtype=dtype)
    x[0] = 0
    x[1] = 3
    x[2, 10] = 6e4
    x[3, 0] = float("nan")
    x[4, 40] = float("inf")
    x[5, 63] = float("-inf")
    check_equal(device, x)
    check_equal(device, x, bits=8)
    back = dequantize_kv(quantize_kv(x.to(device)), dtype)
    assert back.isnan().all(1).tolist() == [False, False, False, True, True, True, False]
    assert torch.equal(back[:2].cpu(), x[:2])


@pytest.mark.filterwarnings("ignore:.*(overflow|value) encountered:RuntimeWarning")
def test_a_scale_that_overflows_is_not_hidden(device: torch.device) -> None:
    x = torch.tensor([[-2e6, 2e6], [1.0, 2.0]])
    check_equal(device, x, scale_dtype=torch.float32)
    back = dequantize_kv(quantize_kv(x.to(device), scale_dtype=torch.float16), torch.float32)
    assert back.isnan().all(1).tolist() == [True, False]


def test_triton_takes_a_strided_cache_and_none_at_all(device: torch.device) -> None:
    x = cache(4, 6, 2, 64, dtype=torch.bfloat16)
    check_equal(device, x[:, 1::2].transpose(1, 2))
    check_equal(device, x[:, 0, :, ::2])
    check_equal(device, x[:0])


def test_operator_contract(device: torch.device) -> None:
    x = cache(3, 16, dtype=torch.bfloat16).to(device)
    checked = torch.library.opcheck(ops.quantize_kv, (x, 0.9, torch.float32, "triton"))
    assert set(checked.values()) == {"SUCCESS"}
    checked = torch.library.opcheck(ops.quantize_kv, (x, 0.9, torch.float32, "triton", 8))
    assert set(checked.values()) == {"SUCCESS"}
    for bits in (4, 8):
        entries = ops.quantize_kv(x, 0.9, torch.float32, "triton", bits)
        checked = torch.library.opcheck(ops.dequantize_kv, (*entries, torch.bfloat16, "triton", bits))
        assert set(checked.values()) == {"SUCCESS"}
