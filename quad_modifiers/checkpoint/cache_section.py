"""The section `kv_cache`: keys and values in 4 bits."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quad_modifiers.checkpoint.contribute import CheckpointSection
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.nn.kv_cache import Bases, install_kv_cache, remove_kv_cache
from quad_modifiers.nn.kv_lines import HIGH_BITS, Basis, KVCacheFormat, check_high_rank

NAME = "kv_cache"


class _High(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bits: Literal[8]
    key_rank: int = Field(ge=0)
    value_rank: int = Field(ge=0)
    value_basis: bool

    @model_validator(mode="after")
    def _check_ranks(self) -> "_High":
        if not self.key_rank and not self.value_rank:
            raise ValueError("neither keys nor values have coordinates in 8 bits")
        if self.value_basis and not self.value_rank:
            raise ValueError("values have a basis, and no coordinates in 8 bits")
        return self


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bits: Literal[4]
    clip_ratio: float = Field(gt=0, le=1)
    hadamard: bool
    sink_tokens: int = Field(ge=0)
    centred: bool
    high: _High | None = None
    key_inverse: Literal[True] | None = None

    def form(self) -> KVCacheFormat:
        ranks = {} if self.high is None else {"key_rank": self.high.key_rank, "value_rank": self.high.value_rank}
        return KVCacheFormat(self.clip_ratio, self.hadamard, self.sink_tokens, **ranks)


class KVCacheSection(CheckpointSection):
    """Has `bits`, which is 4, `clip_ratio`, `hadamard`, `sink_tokens` and `centred`, and `high` only where it is used.

    With `centred` a block has the tensors `key_mean` and `value_mean`, `[key and value heads, head_dim]`. `high` says
    how many coordinates of a head have 8 bits; then there may be `key_basis` and `value_basis`,
    `[key and value heads, head_dim, head_dim]`. With `key_inverse`, which is there only where it is true, there are
    `key_basis` and `key_inverse`, whatever `high` says.
    """

    @classmethod
    def section(
        cls, form: KVCacheFormat, centred: bool, value_basis: bool = False, key_inverse: bool = False
    ) -> dict[str, Any]:
        """Returns what a checkpoint says.

        Args:
            form: how keys and values are rounded.
            centred: whether they have means.
            value_basis: whether values have a basis of their own.
            key_inverse: whether keys have a basis that is not orthogonal.
        """
        section: dict[str, Any] = {
            "bits": 4,
            "clip_ratio": form.clip_ratio,
            "hadamard": form.hadamard,
            "sink_tokens": form.sink_tokens,
            "centred": centred,
        }
        ranks = {"key_rank": form.key_rank, "value_rank": form.value_rank}
        if any(ranks.values()):  # only version 6 of the format has it
            section["high"] = {"bits": HIGH_BITS, **ranks, "value_basis": value_basis}
        if key_inverse:  # only version 7
            section["key_inverse"] = True
        return section

    @classmethod
    def install(cls, decoder: Decoder, section: dict[str, Any]) -> None:
        """Lets the blocks round keys and values, and makes room for their means and bases.

        Raises:
            ValueError: if the section is damaged, or of a later version.
        """
        try:
            fields = _Fields(**section)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise _refusal(reasons) from error
        form, sizes, like = fields.form(), decoder.geometry, decoder.final_norm.weight
        for rank in filter(None, (form.key_rank, form.value_rank)):
            try:
                check_high_rank(rank, sizes.head_dim)
            except ValueError as error:
                raise _refusal(str(error)) from error
        means = None
        if fields.centred:
            shape = sizes.kv_heads, sizes.head_dim
            means = [(like.new_empty(shape), like.new_empty(shape)) for _ in decoder.blocks]
        bases = [_room(fields, sizes, like) for _ in decoder.blocks]
        install_kv_cache([block.module for block in decoder.blocks], decoder.model.config, form, means, bases)

    @classmethod
    def fold(cls, decoder: Decoder, dtype: torch.dtype) -> None:
        """Lets the blocks keep keys and values as they are: a plain model leaves its cache to the runtime."""
        remove_kv_cache([block.module for block in decoder.blocks])


def _refusal(reasons: str) -> ValueError:
    return ValueError(f"the section {NAME!r} is damaged, or of a later version of quad-modifiers ({reasons})")


def _room(fields: _Fields, sizes: ModelGeometry, like: torch.Tensor) -> Bases:
    shape = sizes.kv_heads, sizes.head_dim, sizes.head_dim
    keys = values = None
    if fields.key_inverse:
        keys = Basis(like.new_empty(shape), like.new_empty(shape))
    elif fields.high is not None and fields.high.key_rank:
        keys = Basis(like.new_empty(shape))
    if fields.high is not None and fields.high.value_basis:
        values = Basis(like.new_empty(shape))
    return keys, values
