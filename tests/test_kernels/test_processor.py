"""Products of bfloat16 on a processor that emulates them."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import processor


@pytest.fixture(params=[True, False], ids=["fast", "emulated"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_is_rounded_once(fast: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 96, generator=generator).to(dtype)
    weight = torch.randn(4100, 96, generator=generator).to(dtype)  # more rows than are widened at a time
    y = processor.linear(x, weight)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 4100))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_what_is_emulated_is_computed_in_float32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def record(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.dtype)
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    processor.linear(torch.ones(2, 8).bfloat16(), torch.ones(3, 8).bfloat16())
    assert seen == [torch.bfloat16 if fast else torch.float32]


def test_gradients_pass(fast: bool) -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    processor.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(2, 8), rtol=0.02, atol=0.02)
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, 8), rtol=0.02, atol=0.02)


def test_a_limit_of_onednn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not processor.multiplies_bfloat16(torch.device("cpu"))
