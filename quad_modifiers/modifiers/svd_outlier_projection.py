"""SVDOutlierProjection: moves activation outliers into a few full-precision coordinates."""

import logging
from typing import ClassVar, Literal

from pydantic import Field
from quad_kernels.hadamard import is_hadamard_order, plan_hadamard

from quad_modifiers.checkpoint.head_transform import NAME as HEAD_TRANSFORM
from quad_modifiers.model.architecture import Space
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.modifiers.rank_field import RankField
from quad_modifiers.nn.from_compressed_tensors import reallocate_parameters
from quad_modifiers.passes.statistics import ActivationStatistics, ValuesBasis, collect_statistics
from quad_modifiers.projection.apply import apply_projection
from quad_modifiers.projection.plan import Projection, ProjectionSettings, outlier_energy, plan_projection
from quad_modifiers.projection.rank import rank_of
from quad_modifiers.ranks import ranks

logger = logging.getLogger(__name__)

_SPACES: dict[str, Space] = {"o_proj": "values", "down_proj": "channels"}


class SVDOutlierProjection(QuadModifier):
    """Rotates a model so that activation outliers sit in the first coordinates (QUAD, arXiv 2503.19353, section 3).

    The model computes the same function afterwards. `rank` 0 with a rotation is QuaRot (arXiv 2404.00456).

    Lifecycle:

    - check
        - the ranks
    - run
        - stream the calibration data through the blocks, accumulate second moments
        - plan: eigenvectors, rotations, order of the channels
        - rewrite of all weights
        - allocate anew what stock quantizers had allocated for the old shapes

    Attributes:
        rank: r, outlier coordinates of the residual stream, which later modifiers leave in full precision or give more
            bits; a number, or a share of the width such as 1/8. So are the other ranks.
        basis: "extended" (the paper's, hidden_size grows by r) or "square" (hidden_size stays).
        rotation: rotation of what is left: random "hadamard", "random" orthogonal, or "none".
        seed: seed of the rotation.
        online_rotation: D-type linears whose inputs get an online Hadamard transform.
        o_proj_rank_per_head: outlier coordinates of each head in the o_proj input, by an eigenbasis of the values that
            is folded into v_proj (free at run time).
        values_basis: what that eigenbasis is made from: what "attention" makes of the values, which is the input of
            o_proj, or the "values" as v_proj makes them (ResQ, arXiv 2412.14363).
        down_proj_rank: outlier channels of the down_proj input, by a permutation of the MLP's channels (free at run
            time).
        balanced: whether what o_proj and down_proj read gets the scale in which rounding it costs least: a symmetric
            transform of the values of each head, folded into v_proj and o_proj, and a factor of each channel, folded
            into up_proj and down_proj (free at run time). Outlier coordinates are chosen in that scale. An MLP without
            a gate keeps its channels as they are.
        keep_tied: whether a head that shares the embedding's tensor goes on sharing it, by a small matrix behind the
            final norm, which only the runtimes of this package know. By default where these are needed anyway, for
            outliers or online transforms.
    """

    recipe_role: ClassVar[str | None] = "project"

    rank: RankField = 64
    basis: Literal["extended", "square"] = "extended"
    rotation: Literal["hadamard", "random", "none"] = "hadamard"
    seed: int = 0
    online_rotation: list[Literal["o_proj", "down_proj"]] = Field(default=["o_proj", "down_proj"])
    o_proj_rank_per_head: RankField = 0
    values_basis: ValuesBasis = "attention"
    down_proj_rank: RankField = 0
    balanced: bool = False
    keep_tied: bool | None = None

    def settings(self) -> ProjectionSettings:
        """Returns what the plan is made from."""
        return ProjectionSettings(
            rank=self.rank,
            basis=self.basis,
            rotation=self.rotation,
            seed=self.seed,
            online=frozenset(_SPACES[role] for role in self.online_rotation),
            values_rank=self.o_proj_rank_per_head,
            channels_rank=self.down_proj_rank,
            values_basis=self.values_basis,
            balanced=self.balanced,
        )

    def residual_width(self, reads: Space, width: int) -> int:
        """Returns the width of the residual part of an input of `width` that reads a space."""
        return width - rank_of(self.rank, width) if reads == "stream" and self.basis == "square" else width

    @property
    def unties_head(self) -> bool:
        """Whether a head that shares the embedding's tensor gets one of its own."""
        needs_us = bool(self.rank or self.online_rotation or self.o_proj_rank_per_head or self.down_proj_rank)
        return not (needs_us if self.keep_tied is None else self.keep_tied)

    def check(self, decoder: Decoder) -> None:
        """Checks the ranks.

        Raises:
            ValueError: if a rank leaves nothing to quantize.
        """
        self.settings().check(decoder)
        if self.keep_tied and not decoder.is_tied:
            logger.warning("keep_tied has no effect: head and embedding of this model are two tensors already")

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Plans the projection and rewrites the model."""
        projection = self.plan(decoder, batches)
        keep_tied = decoder.is_tied and not self.unties_head
        apply_projection(decoder, projection, keep_tied)
        self.contribute(decoder, basis=projection.origin, sections={HEAD_TRANSFORM: {}} if keep_tied else None)
        reallocate_parameters(decoder.model)

    def plan(self, decoder: Decoder, batches: Batches) -> Projection:
        """Returns the projection, from second moments of the activations where a rank asks for them."""
        settings, statistics = self.settings(), None
        if settings.needs_statistics:
            data = batches()
            logger.info("SVDOutlierProjection: second moments of %d calibration batches", len(data))
            statistics = collect_statistics(decoder, data, self.values_basis)
        # An eigenvector computed elsewhere may have another sign: all ranks take the same.
        projection = ranks().from_first(lambda: plan_projection(decoder, settings, statistics))
        self._log(decoder, projection, statistics)
        return projection

    def _log(self, decoder: Decoder, projection: Projection, statistics: ActivationStatistics | None) -> None:
        hidden, basis = decoder.geometry.hidden, projection.residual
        if statistics is not None and basis.rank:
            energy = 100 * outlier_energy(statistics, basis)
            logger.info(
                "SVDOutlierProjection: %d of %d directions hold %.1f %% of the energy", basis.rank, hidden, energy
            )
        if self.rotation == "hadamard" and not is_hadamard_order(hidden):
            logger.info("hidden_size %d is not a known Hadamard order: a random orthogonal matrix is used", hidden)
        splits = [("o_proj", projection.value_split)]
        splits += [("down_proj", split) for split in dict.fromkeys(projection.channel_splits.values())]
        for name, split in splits:
            if split.hadamard:
                plan = plan_hadamard(split.width)
                logger.info("online Hadamard of %s: %s, blocks of %d of %d", name, plan.kind, plan.block, plan.size)
        logger.info("SVDOutlierProjection: residual stream %d -> %d coordinates", hidden, basis.width)
