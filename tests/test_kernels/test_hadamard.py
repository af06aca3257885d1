"""Hadamard matrices from Sylvester's and Paley's constructions, and the transform that applies them."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import apply_hadamard
from quad_kernels.hadamard import hadamard_matrix, is_hadamard_order, plan_hadamard

# 28 = 27 + 1 (GF(3^3), Paley I), 100 = 2 (49 + 1) (GF(7^2), Paley II), 344 = 343 + 1 (GF(7^3)), 12 and 20 prime fields,
# 36 = 2 (17 + 1), 52 = 2 (25 + 1), 576 and 832 = 13 * 64 are hidden sizes, 1536 an intermediate size, 240 a product.
ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 52, 64, 100, 128, 144, 240, 256, 344, 576, 832)
# No order of ours: blocks of the largest known order that divides the size.
BLOCKS = {3: 1, 6: 2, 63: 1, 84: 84, 90: 2, 92: 4, 172: 4, 70: 2, 188: 4}


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_is_hadamard(order: int) -> None:
    assert is_hadamard_order(order)
    plan = plan_hadamard(order)
    assert (plan.kind, plan.block) == ("full", order)
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("size", "block"), BLOCKS.items())
def test_fallback_is_block_diagonal_and_says_so(size: int, block: int) -> None:
    plan = plan_hadamard(size)
    assert plan.block == block
    assert plan.kind == ("full" if block == size else "block")
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    outside = torch.arange(size)[:, None] // block != torch.arange(size)[None, :] // block
    assert bool((matrix[outside] == 0).all())
    assert bool((matrix[~outside] != 0).all())


@pytest.mark.parametrize("size", [*ORDERS, *BLOCKS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_apply_equals_matrix_product(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    plan = plan_hadamard(size)
    got = apply_hadamard(x, plan)
    assert got.dtype == dtype
    wanted = x.double() @ hadamard_matrix(size)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=bound, atol=bound)
    back = apply_hadamard(x, plan, transpose=True)
    torch.testing.assert_close(back.double(), x.double() @ hadamard_matrix(size).T, rtol=bound, atol=bound)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(apply_hadamard(leaf, plan, transpose=True), back, rtol=bound, atol=bound)


def test_a_large_size_never_needs_the_dense_matrix() -> None:
    """11008 = 344 * 32, Llama-2-7B's intermediate size."""
    plan = plan_hadamard(11008)
    assert plan.kind == "full"
    assert max(plan.factors) <= 512
    impulse = apply_hadamard(torch.eye(1, 11008), plan)
    torch.testing.assert_close(impulse.abs(), torch.full_like(impulse, 11008**-0.5), rtol=1e-5, atol=0)


def test_bfloat16_is_rounded_once() -> None:
    x = torch.randn(5, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = (x.double() @ hadamard_matrix(28)).bfloat16()
    got = apply_hadamard(x, plan_hadamard(28))
    assert got.dtype == torch.bfloat16
    # A float32 result beside a rounding boundary may fall on the other side: one unit in the last place at most.
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)


def test_input_is_not_changed() -> None:
    x = torch.ones(2, 8)
    apply_hadamard(x, plan_hadamard(8))
    assert torch.equal(x, torch.ones(2, 8))


@pytest.mark.parametrize("size", [0, -4])
def test_size_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"positive size, got {size}"):
        plan_hadamard(size)
    assert not is_hadamard_order(size)


def test_width_must_match_the_plan() -> None:
    with pytest.raises(ValueError, match="last dimension of x is 8, the transform is for 12"):
        apply_hadamard(torch.ones(2, 8), plan_hadamard(12))
