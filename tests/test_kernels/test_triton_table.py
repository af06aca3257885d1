"""The product with an 8-bit table in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import table_product
from quad_kernels.packing import pack_int32

pytest.importorskip("triton")

from quad_kernels.table_product import kernel


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 19, 640), (3, 8, 30), (8, 9, 63), (9, 8, 64), (0, 8, 64)])
def test_a_table(device: torch.device, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Whole and broken words and rows; nine tokens are too many for the kernel."""
    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    integers[0, :2] = torch.tensor([-128, 127])
    words = pack_int32(integers, bits=8)
    scale = (torch.rand(rows, 1, generator=generator) * 0.02).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    got = table_product(x.to(device), words.to(device), scale.to(device)).cpu()
    exact = x.double() @ (integers.double() * scale.double()).T
    assert got.dtype == dtype
    assert got.shape == (tokens, rows)
    # Rounded twice, and sums of `columns` products in float32.
    bound = 1.1 * torch.finfo(dtype).eps
    slack = 2e-6 * float(exact.abs().max()) if tokens else 0.0
    torch.testing.assert_close(got.double(), exact, rtol=bound, atol=slack)


def test_rows_that_are_a_view(device: torch.device) -> None:
    integers = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    words = pack_int32(integers, bits=8).to(device)
    x = torch.randn(32, 2).to(device).T
    scale = torch.full((8, 1), 0.5, device=device)
    assert kernel.MOST_TOKENS >= 2
    got = table_product(x, words, scale)
    torch.testing.assert_close(got.cpu(), x.cpu() @ integers.float().T * 0.5, rtol=1e-5, atol=1e-4)
