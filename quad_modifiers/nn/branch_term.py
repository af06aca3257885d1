"""The low-rank branch of a linear, in full precision beside the quantized weight."""

from typing import Any

import torch
from quad_kernels import InputSplit, LowRank

from quad_modifiers.nn.term import LinearTerm


class BranchTerm(LinearTerm):
    """y += (x B^T) A^T, of the unquantized input.

    A `QuadLinear` computes it in one call with its other parts, and does not call the module.

    Args:
        down: B, `[rank, in]`, dtype of the model.
        up: A, `[out, rank]`, dtype of the model.
    """

    kind = "low_rank_branch"

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    @classmethod
    def unset(cls, section: dict[str, Any], split: InputSplit, out_features: int, dtype: torch.dtype) -> "BranchTerm":
        """See `LinearTerm.unset`; the section has `rank`."""
        rank = section.get("rank")
        smaller = min(split.width, out_features)
        if set(section) != {"rank"} or type(rank) is not int or not 1 <= rank < smaller:
            raise ValueError(
                f"a {cls.kind} term has the field rank, from 1 to below {smaller}, not {section}; the checkpoint is "
                "damaged"
            )
        return cls(torch.empty(rank, split.width, dtype=dtype), torch.empty(out_features, rank, dtype=dtype))

    def section(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.down.shape[0]}

    def low_rank(self) -> LowRank:
        """The tensors, as the kernels take them."""
        return LowRank(self.down, self.up)

    def dense(self) -> torch.Tensor:
        """A B, `[out, in]`, float64."""
        return self.up.double() @ self.down.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `[..., out]` of `[..., in]`."""
        return self.low_rank().wide(x).to(x.dtype)
