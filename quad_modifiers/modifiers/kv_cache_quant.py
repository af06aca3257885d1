"""KVCacheQuant: keys and values in 4 bits."""

import logging
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from llmcompressor.modifiers import Modifier
from pydantic import Field, model_validator

from quad_modifiers.checkpoint.cache_section import NAME, KVCacheSection
from quad_modifiers.linalg import balanced_transform, outlier_basis, random_rotation, square_basis
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.modifiers.dynamic_act_quant import ClipRatio
from quad_modifiers.modifiers.rank_field import RankField
from quad_modifiers.nn.kv_cache import Bases, install_kv_cache
from quad_modifiers.nn.kv_lines import Basis, KVCacheFormat, check_high_rank
from quad_modifiers.passes.cache_moments import CacheMoments, cache_moments, shows_queries
from quad_modifiers.projection.rank import is_share, rank_of

logger = logging.getLogger(__name__)

_WINDOWS = 8  # that means and second moments are taken over
_SEED = 0  # of the rotations of a basis


class KVCacheQuant(QuadModifier):
    """Stores keys and values in 4 bits while a model generates: 0.28 of the memory in 16 bits, for heads of 64.

    Each vector of one token and one head gets an asymmetric grid of 16 points between its extremes. Keys are rounded
    behind the rotary embedding. With `high_rank` the coordinates of most energy have 8 bits instead (ResQ, arXiv
    2412.14363). docs/concepts/kv-cache.md says what is stored and what it costs.

    It comes behind the modifiers that calibrate: nothing is calibrated with rounded keys and values.

    Lifecycle:

    - check
        - size of the heads
    - run
        - mean key and value of each head, over some calibration windows, and second moments for the bases
        - let the blocks round, and declare it for the checkpoint

    Attributes:
        bits: 4.
        high_rank: coordinates of a head in `high_bits`, with a grid of their own; an even number, or a share such
            as 1/8, made even. They are those of most energy in an eigenbasis of each head, by which keys are
            multiplied when they are stored and read; and values, unless SVDOutlierProjection has brought them into such
            a basis, with as many outliers.
        high_bits: 8 with a `high_rank`, else null.
        high_states: what has such coordinates, "keys" or "values"; the other is all in 4 bits.
        key_basis: what keys are rounded in. "energy" is the eigenbasis of keys where they have a `high_rank`, and else
            their coordinates as they are. "balanced" also weighs what queries make of an error in each direction: a
            matrix that is not orthogonal, with or without a `high_rank`.
        clip_ratio: share of the span of a vector that its grid of 16 points covers.
        hadamard: True to transform each vector that is all in 4 bits, and in no basis, before it is rounded, and back
            when it is read: outlying coordinates spread over all, for some time in each step.
        sink_tokens: first tokens of a sequence whose keys and values stay as they are: most attention goes to the first
            one. Not where attention slides; in a padded batch, padding takes their place.
        center: True to take each head's mean key and value off before rounding, and to put them back when read.
    """

    recipe_role: ClassVar[str | None] = "quantize_cache"
    ignored_by_default: ClassVar[tuple[str, ...]] = ()

    bits: Literal[4] = 4
    high_rank: RankField = 0
    high_bits: Literal[8] | None = None
    high_states: list[Literal["keys", "values"]] = Field(default=["keys", "values"], min_length=1)
    key_basis: Literal["energy", "balanced"] = "energy"
    clip_ratio: ClipRatio = 0.9
    hadamard: bool = True
    sink_tokens: int = Field(default=1, ge=0)
    center: bool = True

    @model_validator(mode="after")
    def _check_high(self) -> "KVCacheQuant":
        if bool(self.high_rank) != bool(self.high_bits):
            raise ValueError(
                f"high_rank ({self.high_rank}) and high_bits ({self.high_bits}) go together; give both, such as 1/8 "
                "and 8, or neither"
            )
        return self

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Refuses a second one.

        Raises:
            ValueError: if there is one.
        """
        if any(isinstance(other, KVCacheQuant) for other in others):
            raise ValueError("the recipe has another KVCacheQuant; keep one of them")

    def check(self, decoder: Decoder) -> None:
        """Checks the size of the heads, and what of it `high_rank` takes.

        Raises:
            ValueError: if it is odd, or `high_rank` leaves nothing or an odd rest, or the queries that `key_basis`
                weighs cannot be seen.
        """
        size = decoder.geometry.head_dim
        if size % 2:
            raise ValueError(
                f"KVCacheQuant packs two coordinates into a byte, and the heads have {size}; leave it out of the recipe"
            )
        if self.high_rank:
            check_high_rank(self._rank(size), size)
        if self.key_basis == "balanced":
            for block in decoder.blocks:
                if not shows_queries(block):
                    raise ValueError(
                        f"KVCacheQuant.key_basis 'balanced' weighs queries, and {block.name} computes its attention "
                        "without transformers' attention functions, which would show them; set key_basis: energy"
                    )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Lets the blocks round keys and values."""
        form, folded = self._form(decoder), _folded_rank(decoder)
        balanced = self.key_basis == "balanced"
        online = balanced or bool(form.key_rank), bool(form.value_rank) and form.value_rank != folded
        needed = self.center or any(online)
        moments = cache_moments(decoder, batches()[:_WINDOWS], any(online), balanced) if needed else []
        generator, dtype = torch.Generator().manual_seed(_SEED), decoder.model.dtype
        means = [(each.means[0].to(dtype), each.means[1].to(dtype)) for each in moments] if self.center else None
        bases = [self._bases(each, form, online, generator, dtype) for each in moments] if any(online) else None
        install_kv_cache([block.module for block in decoder.blocks], decoder.model.config, form, means, bases)
        section = KVCacheSection.section(form, self.center, value_basis=online[1], key_inverse=balanced)
        self.contribute(decoder, sections={NAME: section})
        logger.info("KVCacheQuant: keys and values in %d bits, clip ratio %g", self.bits, self.clip_ratio)

    def _rank(self, head_dim: int) -> int:
        rank = rank_of(self.high_rank, head_dim)
        return rank + rank % 2 if is_share(self.high_rank) else rank

    def _form(self, decoder: Decoder) -> KVCacheFormat:
        rank = self._rank(decoder.geometry.head_dim)
        keys, values = (rank if each in self.high_states else 0 for each in ("keys", "values"))
        return KVCacheFormat(self.clip_ratio, self.hadamard, self.sink_tokens, keys, values)

    def _bases(
        self,
        moments: CacheMoments,
        form: KVCacheFormat,
        online: tuple[bool, bool],
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> Bases:
        """The bases of one block, of the states as they are rounded: with the mean taken off, if it is."""
        assert moments.squares is not None
        keys, values = moments.squares
        if self.center:
            keys, values = (
                _about(mean, square, dtype) for mean, square in zip(moments.means, moments.squares, strict=True)
            )
        found: list[Basis | None] = [None, None]
        if moments.queries is not None:
            found[0] = _balanced_basis(keys, moments.queries, form.key_rank, generator, dtype)
        elif online[0]:
            found[0] = Basis(_eigenbasis(keys, form.key_rank, generator).to(keys.device, dtype))
        if online[1]:
            found[1] = Basis(_eigenbasis(values, form.value_rank, generator).to(keys.device, dtype))
        return found[0], found[1]


def _about(mean: torch.Tensor, square: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The second moment about the mean as `dtype` holds it, which is what is taken off; semi-definite like any."""
    off = mean.to(dtype).to(mean)
    mixed = mean.unsqueeze(-1) * off.unsqueeze(-2)
    return square - mixed - mixed.mT + off.unsqueeze(-1) * off.unsqueeze(-2)


def _eigenbasis(squares: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Returns U = [P R_1 | P_perp R_2] of each head, `[heads, head_dim, head_dim]`, float64, with random rotations."""
    bases = []
    for square in squares.cpu():
        outliers, complement = outlier_basis(square, rank)
        among = [random_rotation(part.shape[1], "random", generator) for part in (outliers, complement)]
        bases.append(square_basis(outliers, complement, rotation=among[1], outlier_rotation=among[0]))
    return torch.stack(bases)


def _balanced_basis(
    keys: torch.Tensor, queries: torch.Tensor, rank: int, generator: torch.Generator, dtype: torch.dtype
) -> Basis:
    """Returns T U of each head, for U the eigenbasis of what T makes of the keys, and the inverse."""
    pairs = [balanced_transform(*moments) for moments in zip(keys.cpu(), queries.cpu(), strict=True)]
    into, back = (torch.stack(each) for each in zip(*pairs, strict=True))
    rotation = _eigenbasis(into @ keys.cpu() @ into, rank, generator)
    return Basis((into @ rotation).to(keys.device, dtype), (rotation.mT @ back).to(keys.device, dtype))


def _folded_rank(decoder: Decoder) -> int:
    """Returns how many first coordinates of each head of values the projection has made those of most energy."""
    splits = [group.linears[0].module.split for group in decoder.groups() if group.group.reads == "values"]
    ranks = {split.outliers if split.block == decoder.geometry.head_dim else 0 for split in splits}
    return ranks.pop() if len(ranks) == 1 else 0
