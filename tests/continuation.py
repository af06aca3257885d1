"""Logits behind a prompt, one token at a time with a cache and all at once without: what must be alike."""

from __future__ import annotations

from typing import Any

import torch

PROMPT = torch.randint(3, 320, (2, 12), generator=torch.Generator().manual_seed(7))
TOKENS = torch.randint(3, 320, (2, 10), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def by_tokens(model: Any, past: Any = None) -> torch.Tensor:
    """Logits of what follows PROMPT and each of TOKENS, which come one at a time; in a cache, if one is given."""
    found = []
    for step in (PROMPT, *TOKENS.split(1, dim=1)):
        output = model(step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits[:, -1])
    return torch.stack(found, dim=1)


@torch.no_grad()
def at_once(model: Any) -> torch.Tensor:
    """The same logits from one pass without a cache."""
    return model(torch.cat([PROMPT, TOKENS], 1), use_cache=False).logits[:, PROMPT.shape[1] - 1 :]
