"""The attention of prompts on the native CPU kernels, as one of transformers' attention functions.

A block calls the attention function that its configuration names. Where the native kernels are the faster ones, the
configuration of a loaded checkpoint names `quad_sdpa` instead of `sdpa`: the same function, natively where it can be.
All ways through a model (blocks in native calls, modules one by one, graphs of torch.compile) come to the same function
and get the same bits of it, with a mask or without one where it says nothing else.
`model.set_attn_implementation("sdpa")` brings PyTorch's back.
"""

from typing import Any

import torch
from quad_kernels.native import lines
from quad_kernels.native.library import attends_prompts
from torch import nn

NAME = "quad_sdpa"


def install_native_attention(attention: nn.Module) -> None:
    """Makes the configuration of an attention module, and of all that share it, name this function for `sdpa`.

    The native kernels must run here; does nothing where they are not wanted for prompts.
    """
    config: Any = attention.config
    if config._attn_implementation == "sdpa" and attends_prompts():
        register()
        config._attn_implementation = NAME


def remove_native_attention(model: nn.Module) -> None:
    """Makes the configurations of all modules name `sdpa` again."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation = "sdpa"


def register() -> None:
    """Tells transformers the function, with the masks of `sdpa`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def is_stock_sdpa(config: Any) -> bool:
    """Returns whether layers with this configuration compute what transformers' own attention function `sdpa` does."""
    return config._attn_implementation in ("sdpa", NAME) and _sdpa_is_stock()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention of each head, `[batch, positions, heads, head_dim]`, dtype of `query`, and no weights.

    Arguments are those of transformers' attention functions. A single position, a mask that is no bool, dropout,
    gradients and whatever else the kernels do not take go to `sdpa`.

    Args:
        module: attention that asks.
        query: `[batch, heads, positions, head_dim]`.
        key: `[batch, heads of keys, positions of keys, head_dim]`.
        value: like `key`.
        attention_mask: `[batch or 1, 1, positions, positions of keys]`, bool, True where a position sees a key; None
            if each sees itself and those before it.
        dropout: probability.
        scaling: of the scores; by default one over the root of `head_dim`.
        is_causal: whether None as a mask means that; by default as the module says.
        **kwargs: of other attention functions.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = dropout or kwargs.get("position_bias") is not None or kwargs.get("output_attentions")
    if asked or not _takes(query, key, value) or not _sees(query, key, attention_mask, bool(causal)):
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: tuple[torch.Tensor, None] = stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return found
    batch, heads, positions, head_dim = query.shape
    if attention_mask is None:
        key, value = key[:, :, :positions], value[:, :, :positions]  # a static cache is longer
    scaling = head_dim**-0.5 if scaling is None else scaling
    output = torch.ops.quad_native.attend_prompt(query, key, value, scaling, attention_mask)
    return output.view(batch, positions, heads, head_dim), None


def _sdpa_is_stock() -> bool:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def _takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """True for several positions of one dtype on the CPU, in inference."""
    if not query.is_cpu or query.dtype not in lines.DTYPES or query.shape[2] < 2:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    alike = key.dtype == value.dtype == query.dtype and key.shape == value.shape
    return alike and key.shape[3] == query.shape[3] and _sdpa_is_stock()


def _sees(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> bool:
    """True if the kernels know what each position sees."""
    batch, _, positions, _ = query.shape
    if mask is None:
        return causal and key.shape[2] >= positions
    shape = mask.shape
    bool_of_all = mask.dtype == torch.bool and mask.dim() == 4 and shape[0] in (1, batch) and shape[1] == 1
    return bool_of_all and shape[2] == positions and shape[3] == key.shape[2]
