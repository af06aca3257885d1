"""A change of basis as a value: which bases and orders, apart from how they are applied."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from quad_kernels import InputSplit

from quad_modifiers.linalg import (
    balanced_factors,
    balanced_transform,
    extended_basis,
    outlier_basis,
    random_rotation,
    square_basis,
)
from quad_modifiers.model.architecture import Space
from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.passes.statistics import ActivationStatistics, ValuesBasis
from quad_modifiers.projection.rank import Rank, rank_of
from quad_modifiers.projection.readers import channels_read, values_read


class ResidualBasis:
    """The change of basis of the residual stream.

    Args:
        basis: Q, `[d, width]`, Q Q^T = I, outlier coordinates first.
        rank: r.
    """

    def __init__(self, basis: torch.Tensor, rank: int) -> None:
        self.basis = basis
        self.rank = rank
        self.width = basis.shape[1]
        self.gain = (basis.shape[1] / basis.shape[0]) ** 0.5

    def read(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Weight of a reader of the normalized stream: W diag(norm) Q / c, `[out, width]`."""
        basis = self.basis.to(weight.device)
        return (weight.detach().double() * norm.detach().double()) @ basis / self.gain

    def between_ends(self, norm: torch.Tensor) -> torch.Tensor:
        """M with read(table, norm) = write(table^T)^T M: Q^T diag(norm) Q / c^2, `[width, width]`."""
        return self.read(self.basis.T, norm.to(self.basis)) / self.gain

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight `[d, in]` or bias `[d]` of a writer to the stream: c Q^T W, `[width, in]` or `[width]`."""
        return self.gain * (self.basis.to(weight.device).T @ weight.detach().double())


@dataclass(frozen=True)
class Projection:
    """A change of basis that leaves the model's function as it is.

    Attributes:
        residual: basis of the residual stream.
        heads: B, basis of the values of each key-value head: v becomes v B; `[kv_heads, head_dim, head_dim]`, float64,
            by the path of the attention module.
        orders: permutation of the MLP's channels, outlier channels first, `[channels]`, by the path of the MLP.
        value_split: division of the inputs that read values (o_proj).
        channel_splits: division of the inputs that read channels (down_proj), by the path of the MLP; its width is
            that of this MLP, which need not be the same in all.
        origin: how it came about, as the checkpoint remembers it; None for one that cannot be said in its terms.
        inverses: B^-T, of those of `heads` that are not orthogonal.
        factors: positive numbers that channels are multiplied by, and their readers' columns divided by, `[channels]`,
            in the order of before, by the path of the MLP; one without keeps its scale.
    """

    residual: ResidualBasis
    heads: dict[str, torch.Tensor]
    orders: dict[str, torch.Tensor]
    value_split: InputSplit
    channel_splits: dict[str, InputSplit]
    origin: dict[str, Any] | None = None
    inverses: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)

    def split(self, group: PlacedGroup) -> InputSplit:
        """Returns how the input of a group is divided."""
        reads = group.group.reads
        if reads == "stream":
            return InputSplit(self.residual.width, self.residual.rank)
        return self.value_split if reads == "values" else self.channel_splits[group.path]


@dataclass(frozen=True)
class ProjectionSettings:
    """What `plan_projection` is told; `SVDOutlierProjection` documents the meaning.

    Attributes:
        rank: outlier coordinates of the residual stream; ranks are numbers or shares.
        basis: "extended" or "square".
        rotation: rotation of what is left.
        seed: seed of the rotation.
        online: spaces whose readers get an online Hadamard transform.
        values_rank: outlier coordinates of each head in what reads values.
        channels_rank: outlier channels in what reads channels.
        values_basis: what the basis of the values is made from.
        balanced: whether values and channels get the scale in which rounding them costs least.
    """

    rank: Rank = 64
    basis: Literal["extended", "square"] = "extended"
    rotation: Literal["hadamard", "random", "none"] = "hadamard"
    seed: int = 0
    online: frozenset[Space] = field(default=frozenset({"values", "channels"}))
    values_rank: Rank = 0
    channels_rank: Rank = 0
    values_basis: ValuesBasis = "attention"
    balanced: bool = False

    @property
    def needs_statistics(self) -> bool:
        """True if activations decide about the basis."""
        return bool(self.rank or self.values_rank or self.channels_rank or self.balanced)

    def check(self, decoder: Decoder) -> None:
        """Checks that every rank leaves something to quantize.

        Raises:
            ValueError: naming the rank that is too large.
        """
        geometry = decoder.geometry
        _check_rank("rank", self.rank, geometry.hidden, "hidden_size")
        _check_rank("o_proj_rank_per_head", self.values_rank, geometry.head_dim, "head_dim")
        channels = min(decoder.channels().values(), default=geometry.intermediate)
        _check_rank("down_proj_rank", self.channels_rank, channels, "intermediate_size")


def _check_rank(field: str, given: Rank, size: int, size_name: str) -> None:
    """Checks that a rank leaves something to quantize, and that a share is something."""
    rank = rank_of(given, size)
    if given and not rank:
        raise ValueError(
            f"{field} ({given}) of {size_name} ({size}) is no coordinate at all; choose a number, or 0 for none"
        )
    if rank >= size:
        raise ValueError(
            f"{field} ({given}) must be smaller than {size_name} ({size}); choose about {max(1, size // 8)}"
        )


def plan_projection(
    decoder: Decoder, settings: ProjectionSettings, statistics: ActivationStatistics | None
) -> Projection:
    """Returns the projection into the outlier basis (QUAD, arXiv 2503.19353, section 3).

    Args:
        decoder: the model, in its original basis.
        settings: what is asked for.
        statistics: second moments of the activations; may be None if `settings.needs_statistics` is False.
    """
    geometry = decoder.geometry
    rank, values_rank = rank_of(settings.rank, geometry.hidden), rank_of(settings.values_rank, geometry.head_dim)
    generator = torch.Generator().manual_seed(settings.seed)
    basis = _residual_basis(geometry, settings, statistics, generator)
    heads: dict[str, torch.Tensor] = {}
    inverses: dict[str, torch.Tensor] = {}
    orders: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    channels = decoder.channels()
    gated = {group.path for group in decoder.groups() if any(linear.member.multiplies for linear in group.linears)}
    for group in decoder.groups():
        path = group.path
        if group.group.reads == "values":
            moments = None if statistics is None else statistics.heads.get(path)
            if moments is not None and settings.balanced:
                into, back = balanced_transform(moments, values_read(group, geometry).to(moments))
                rotations = _head_rotations(geometry, settings, into @ moments @ into, generator).to(into)
                heads[path], inverses[path] = into @ rotations, back @ rotations
            else:
                heads[path] = _head_rotations(geometry, settings, moments, generator)
        elif group.group.reads == "channels":
            energy = None if statistics is None else statistics.channels.get(path)  # none of an expert without tokens
            if energy is not None and settings.balanced and path in gated:
                factors[path] = balanced_factors(energy, channels_read(group).to(energy))
                energy = energy * factors[path].square()
            orders[path] = torch.arange(channels[path])
            if energy is not None and settings.channels_rank:
                orders[path] = energy.argsort(descending=True, stable=True)
    return Projection(
        residual=basis,
        heads=heads,
        orders=orders,
        value_split=InputSplit(
            geometry.heads * geometry.head_dim,
            values_rank,
            geometry.head_dim,
            keep_width=True,
            hadamard="values" in settings.online,
        ),
        channel_splits={
            path: InputSplit(
                width, rank_of(settings.channels_rank, width), keep_width=True, hadamard="channels" in settings.online
            )
            for path, width in channels.items()
        },
        origin={
            "basis": settings.basis,
            "rank": rank,
            "hidden_size": geometry.hidden,
            "rotation": settings.rotation,
            "seed": settings.seed,
        },
        inverses=inverses,
        factors=factors,
    )


def outlier_energy(statistics: ActivationStatistics, basis: ResidualBasis) -> float:
    """Returns the share of the stream's energy in the outlier coordinates of a basis; 0 of a stream of zeros."""
    outliers = basis.basis[:, : basis.rank].to(statistics.residual)
    total = torch.trace(statistics.residual)
    inside = torch.trace(outliers.T @ statistics.residual @ outliers)
    return float(inside / total) if total > 0 else 0.0


def _residual_basis(
    geometry: ModelGeometry,
    settings: ProjectionSettings,
    statistics: ActivationStatistics | None,
    generator: torch.Generator,
) -> ResidualBasis:
    size = geometry.hidden
    rank = rank_of(settings.rank, size)
    if rank == 0 or statistics is None:
        return ResidualBasis(random_rotation(size, settings.rotation, generator), 0)
    outliers, complement = outlier_basis(statistics.residual, rank)
    if settings.basis == "extended":
        return ResidualBasis(extended_basis(outliers, random_rotation(size, settings.rotation, generator)), rank)
    rotation = random_rotation(size - rank, settings.rotation, generator)
    # Nothing to gain while the outliers are in full precision, but 8 bits and checkpoint/export.py round them.
    outlier_rotation = random_rotation(rank, settings.rotation, generator)
    return ResidualBasis(square_basis(outliers, complement, rotation, outlier_rotation), rank)


def _head_rotations(
    geometry: ModelGeometry,
    settings: ProjectionSettings,
    moments: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Rotation of the values of one attention module with these moments, `[kv_heads, head_dim, head_dim]`."""
    kept = rank_of(settings.values_rank, geometry.head_dim)
    heads = []
    for head in range(geometry.kv_heads):
        rotation = random_rotation(geometry.head_dim - kept, settings.rotation, generator)
        if kept and moments is not None:
            outliers, complement = outlier_basis(moments[head], kept)
            among = random_rotation(kept, "random" if settings.rotation == "random" else "none", generator)
            rotation = square_basis(outliers, complement, rotation, among)
        heads.append(rotation)
    return torch.stack(heads)
