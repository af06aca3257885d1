"""SVDOutlierProjection: moves activation outliers into a few full-precision coordinates."""

import logging
from typing import Any, ClassVar, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field
from quad_kernels.hadamard import is_hadamard_order, plan_hadamard
from torch import nn

from quad_modifiers.linalg import extended_basis, outlier_basis, random_rotation, square_basis
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.modifiers.preparation import begin_own_pass, calibration_batches, prepare_model
from quad_modifiers.nn.input_split import InputSplit
from quad_modifiers.passes.statistics import ActivationStatistics, collect_statistics
from quad_modifiers.projection.apply import ResidualBasis, project_ends, project_layer, untie_head
from quad_modifiers.reporting import layer_progress

logger = logging.getLogger(__name__)


class SVDOutlierProjection(Modifier):
    """Rotates a model so that activation outliers sit in the first coordinates (QUAD, arXiv 2503.19353, section 3).

    The model computes the same function afterwards. `rank` 0 with a rotation is QuaRot (arXiv 2404.00456).

    Lifecycle:

    - on_initialize
        - check architecture, ranks and weights
        - wrap the linears in pass-through containers
    - on_calibration_start
        - stream the calibration data through the blocks, accumulate second moments
        - eigenvectors, rotation, rewrite of all weights
        - allocate anew what stock quantizers had allocated for the old shapes

    Attributes:
        rank: r, outlier coordinates of the residual stream that stay in full precision.
        basis: "extended" (the paper's, hidden_size grows by r) or "square" (hidden_size stays).
        rotation: rotation of what is left: random "hadamard", "random" orthogonal, or "none".
        seed: seed of the rotation.
        online_rotation: D-type linears whose inputs get an online Hadamard transform.
        o_proj_rank_per_head: outlier coordinates of each head in the o_proj input, by an eigenbasis of the values that
            is folded into v_proj (free at run time).
        down_proj_rank: outlier channels of the down_proj input, by a permutation of the MLP's channels (free at run
            time).
    """

    recipe_role: ClassVar[str] = "project"

    rank: int = Field(default=64, ge=0)
    basis: Literal["extended", "square"] = "extended"
    rotation: Literal["hadamard", "random", "none"] = "hadamard"
    seed: int = 0
    online_rotation: list[Literal["o_proj", "down_proj"]] = Field(default=["o_proj", "down_proj"])
    o_proj_rank_per_head: int = Field(default=0, ge=0)
    down_proj_rank: int = Field(default=0, ge=0)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Checks everything that can be checked without data and wraps the linears."""
        geometry = ModelGeometry.of(state.model)
        geometry.check_rank("rank", self.rank, geometry.hidden, "hidden_size")
        geometry.check_rank("o_proj_rank_per_head", self.o_proj_rank_per_head, geometry.head_dim, "head_dim")
        geometry.check_rank("down_proj_rank", self.down_proj_rank, geometry.intermediate, "intermediate_size")
        prepare_model(state.model)
        return True

    @torch.no_grad()
    def on_calibration_start(self, state: State, event: object, **kwargs: Any) -> None:
        """Collects statistics and rewrites the model."""
        begin_own_pass(state.model)
        model = state.model
        architecture = prepare_model(model)
        geometry = ModelGeometry.of(model)
        statistics = None
        if self.rank or self.o_proj_rank_per_head or self.down_proj_rank:
            batches = calibration_batches(state)
            logger.info("SVDOutlierProjection: second moments of %d calibration batches", len(batches))
            statistics = collect_statistics(model, architecture, batches, geometry)
        self._project(model, architecture, geometry, statistics)
        _reallocate_quantization_parameters(model)

    def _project(
        self,
        model: nn.Module,
        architecture: Architecture,
        geometry: ModelGeometry,
        statistics: ActivationStatistics | None,
    ) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        basis = self._residual_basis(geometry, statistics, generator)
        head_rotations = self._head_rotations(geometry, statistics, generator)
        heads_split = InputSplit(
            geometry.heads * geometry.head_dim,
            self.o_proj_rank_per_head,
            geometry.head_dim,
            keep_width=True,
            hadamard=self._online(architecture, architecture.attention_output),
        )
        mlp_split = InputSplit(
            geometry.intermediate,
            self.down_proj_rank,
            keep_width=True,
            hadamard=self._online(architecture, architecture.mlp_output),
        )
        self._log(geometry, basis, (heads_split, mlp_split))
        untie_head(model, architecture)
        project_ends(model, architecture, basis)
        layers = list(model.get_submodule(architecture.layers).children())
        for index, layer in enumerate(layer_progress(layers, "projecting")):
            order = torch.arange(geometry.intermediate)
            if statistics is not None and self.down_proj_rank:
                order = statistics.mlp[index].argsort(descending=True, stable=True)
            project_layer(layer, architecture, basis, head_rotations[index], heads_split, order, mlp_split)
        model.config.hidden_size = basis.width
        model.config.head_dim = geometry.head_dim
        model.quad_projection = {
            "basis": self.basis,
            "rank": self.rank,
            "hidden_size": geometry.hidden,
            "rotation": self.rotation,
            "seed": self.seed,
        }

    def _residual_basis(
        self, geometry: ModelGeometry, statistics: ActivationStatistics | None, generator: torch.Generator
    ) -> ResidualBasis:
        size = geometry.hidden
        if self.rank == 0 or statistics is None:
            return ResidualBasis(random_rotation(size, self.rotation, generator), 0)
        outliers, complement = outlier_basis(statistics.residual, self.rank)
        energy = torch.trace(outliers.T @ statistics.residual @ outliers) / torch.trace(statistics.residual)
        logger.info(
            "SVDOutlierProjection: %d of %d directions hold %.1f %% of the energy", self.rank, size, 100 * energy
        )
        if self.basis == "extended":
            basis = extended_basis(outliers, random_rotation(size, self.rotation, generator))
        else:
            rotation = random_rotation(size - self.rank, self.rotation, generator)
            # Nothing to gain while the outliers are in full precision, but checkpoint/export.py rounds them.
            outlier_rotation = random_rotation(self.rank, self.rotation, generator)
            basis = square_basis(outliers, complement, rotation, outlier_rotation)
        return ResidualBasis(basis, self.rank)

    def _head_rotations(
        self, geometry: ModelGeometry, statistics: ActivationStatistics | None, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Rotation of the values, per layer `[kv_heads, head_dim, head_dim]`."""
        kept = self.o_proj_rank_per_head
        rotations = []
        for index in range(geometry.layers):
            heads = []
            for head in range(geometry.kv_heads):
                rotation = random_rotation(geometry.head_dim - kept, self.rotation, generator)
                if kept and statistics is not None:
                    outliers, complement = outlier_basis(statistics.heads[index][head], kept)
                    rotation = square_basis(outliers, complement, rotation, torch.eye(kept, dtype=torch.float64))
                heads.append(rotation)
            rotations.append(torch.stack(heads))
        return rotations

    def _online(self, architecture: Architecture, name: str) -> bool:
        roles = dict(zip(architecture.d_type, ("o_proj", "down_proj"), strict=True))
        return roles[name] in self.online_rotation

    def _log(self, geometry: ModelGeometry, basis: ResidualBasis, splits: tuple[InputSplit, InputSplit]) -> None:
        if self.rotation == "hadamard" and not is_hadamard_order(geometry.hidden):
            logger.info(
                "hidden_size %d is no known Hadamard order: a random orthogonal matrix is used", geometry.hidden
            )
        for name, split in zip(("o_proj", "down_proj"), splits, strict=True):
            if split.hadamard:
                plan = plan_hadamard(split.width)
                logger.info("online Hadamard of %s: %s, blocks of %d of %d", name, plan.kind, plan.block, plan.size)
        logger.info("SVDOutlierProjection: residual stream %d -> %d coordinates", geometry.hidden, basis.width)


def _reallocate_quantization_parameters(model: nn.Module) -> None:
    """Allocates scales for the new shapes where a stock quantizer had allocated them for the old ones."""
    from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization

    for module in model.modules():
        if type(module) is nn.Linear and getattr(module, "quantization_scheme", None) is not None:
            initialize_module_for_quantization(module, module.quantization_scheme)
