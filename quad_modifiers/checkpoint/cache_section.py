"""The section `kv_cache`: keys and values in 4 bits."""

from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quad_modifiers.checkpoint.contribute import CheckpointSection
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.kv_cache import KVCacheFormat, install_kv_cache, remove_kv_cache

NAME = "kv_cache"


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bits: Literal[4]
    clip_ratio: float = Field(gt=0, le=1)
    hadamard: bool
    sink_tokens: int = Field(ge=0)
    centred: bool


class KVCacheSection(CheckpointSection):
    """Has `bits`, which is 4, `clip_ratio`, `hadamard`, `sink_tokens` and `centred`.

    With `centred` a block has the tensors `key_mean` and `value_mean`, `[key and value heads, head_dim]`.
    """

    @classmethod
    def section(cls, form: KVCacheFormat, centred: bool) -> dict[str, Any]:
        """Returns what a checkpoint says of a form."""
        return {"bits": 4, **asdict(form), "centred": centred}

    @classmethod
    def install(cls, decoder: Decoder, section: dict[str, Any]) -> None:
        """Lets the blocks round keys and values, and makes room for their means.

        Raises:
            ValueError: if the section is damaged, or of a later version.
        """
        try:
            fields = _Fields(**section)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(
                f"the section {NAME!r} is damaged, or of a later version of quad-modifiers ({reasons})"
            ) from error
        means, sizes = None, decoder.geometry
        if fields.centred:
            like = decoder.final_norm.weight
            shape = sizes.kv_heads, sizes.head_dim
            means = [(like.new_empty(shape), like.new_empty(shape)) for _ in decoder.blocks]
        form = KVCacheFormat(fields.clip_ratio, fields.hadamard, fields.sink_tokens)
        install_kv_cache([block.module for block in decoder.blocks], decoder.model.config, form, means)

    @classmethod
    def fold(cls, decoder: Decoder, dtype: torch.dtype) -> None:
        """Lets the blocks keep keys and values as they are: a plain model leaves its cache to the runtime."""
        remove_kv_cache([block.module for block in decoder.blocks])
