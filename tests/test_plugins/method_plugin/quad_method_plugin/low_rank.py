"""The term: a low-rank branch beside a quantized weight."""

from typing import Any

import torch
from quad_kernels import InputSplit
from torch.nn.functional import linear

from quad_modifiers.nn.term import LinearTerm


class LowRank(LinearTerm):
    """y += (x A^T) B^T in full precision.

    Args:
        down: A, `[rank, in]`.
        up: B, `[out, rank]`.
    """

    kind = "low_rank"

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    @classmethod
    def unset(cls, section: dict[str, Any], split: InputSplit, out_features: int, dtype: torch.dtype) -> "LowRank":
        rank = section.get("rank")
        if set(section) != {"rank"} or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"a low_rank term has the field rank, 1 or more, not {section}; the checkpoint is damaged")
        return cls(torch.empty(rank, split.width, dtype=dtype), torch.empty(out_features, rank, dtype=dtype))

    def section(self) -> dict[str, Any]:
        return {"rank": self.down.shape[0]}

    def dense(self) -> torch.Tensor:
        return self.up.double() @ self.down.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, self.down), self.up)
