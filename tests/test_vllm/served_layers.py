"""The layers of a model that vLLM has loaded beside those of the transformers model."""

from __future__ import annotations

from typing import Any

import torch

# Low-rank branches of different ranks; a member of a fused layer has none.
BRANCHES: dict[str, dict[str, Any]] = {
    f"{role}_proj": {"terms": {"low_rank_branch": {"rank": rank}}}
    for role, rank in {"q": 6, "v": 3, "o": 6, "gate": 5, "up": 7, "down": 40}.items()
}


def outputs(served: Any, reference: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what the linears of both models make of the same random inputs, of one token and of several."""
    generator = torch.Generator().manual_seed(3)
    found, wanted = [], []
    for ours, theirs in zip(served.model.layers, reference.model.layers, strict=True):
        for layer, members in (
            (ours.self_attn.qkv_proj, [getattr(theirs.self_attn, f"{name}_proj") for name in "qkv"]),
            (ours.self_attn.o_proj, [theirs.self_attn.o_proj]),
            (ours.mlp.gate_up_proj, [theirs.mlp.gate_proj, theirs.mlp.up_proj]),
            (ours.mlp.down_proj, [theirs.mlp.down_proj]),
        ):
            for tokens in (1, 7):
                x = torch.randn(tokens, members[0].in_features, generator=generator).to(dtype)
                with torch.inference_mode():
                    found.append(layer(x)[0])
                    wanted.append(torch.cat([member(x) for member in members], dim=-1))
    return found, wanted


def assert_alike(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: dict[str, float]) -> None:
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, **tolerance)  # dtypes as well
