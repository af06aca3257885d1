"""Tables that are changed some rows at a time."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.projection.parameters import by_rows


@pytest.mark.parametrize("rows", [1, 4095, 4096, 4097, 9000])
def test_rows_at_a_time_are_all_rows(rows: int) -> None:
    table = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    wider = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).double()
    seen = []

    def change(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part.double() @ wider

    changed = by_rows(table, change)
    assert changed.dtype == table.dtype
    assert torch.equal(changed, (table.double() @ wider).to(table.dtype))
    assert sum(seen) == rows
    assert max(seen) <= 4096
