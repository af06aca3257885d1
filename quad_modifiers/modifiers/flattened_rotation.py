"""FlattenedRotation: a learned rotation in the place of a random one, folded like it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import ClassVar

import torch
from llmcompressor.modifiers import Modifier
from pydantic import Field

from quad_modifiers.journal import Step, open_step
from quad_modifiers.linalg.flattening import Gain
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.passes.row_sample import RowSample, sample_rows
from quad_modifiers.projection.learned_rotation import LearnedRotation, RotationSearch, stream_rows, value_rows
from quad_modifiers.projection.rotate import rotate_residual
from quad_modifiers.reporting import layer_progress

logger = logging.getLogger(__name__)


class FlattenedRotation(QuadModifier):
    """Turns the residual coordinates so that no coordinate of a token stands out, after FRTQ (OpenReview mUB2N8L0vD).

    It comes after a projection and refines its rotation, at no cost at run time: outlier coordinates stay what they
    are, and the model computes the same function. The steps are ours; docs/concepts/frtq.md derives them.

    Lifecycle:

    - run
        - sample the stream before each norm and the inputs of o_proj, on some windows to fit, on others to choose
        - rotation of the stream: preconditioning, flattening, refinement with the grid of DynamicActQuant
        - rotation of the values of each key-value head, likewise
        - rewrite of the weights

    Attributes:
        rounds: rounds of flattening, each a clipping and an orthogonal Procrustes problem; 0 for none.
        start_percentile: bound of the first round, as a percentile of the tokens' largest magnitudes.
        end: bound of the last round, in units of the root mean square of a token.
        refinement_rounds: rounds of DFRot (arXiv 2412.00648) after it at most, with the grid of the recipe's inputs;
            0 for none.
        values: whether the values of each key-value head are turned too.
        tokens: tokens that the rotation of the stream is fitted to, over all norms: its degrees of freedom are half the
            square of the width, so that few tokens are fitted by what others do not share.
        seed: seed that chooses them.
    """

    recipe_role: ClassVar[str | None] = "rotate"
    ignored_by_default: ClassVar[tuple[str, ...]] = ()

    rounds: int = Field(default=50, ge=0)
    start_percentile: float = Field(default=99.9, gt=0.0, le=100.0)
    end: float = Field(default=0.8, gt=0.0)
    refinement_rounds: int = Field(default=0, ge=0)
    values: bool = True
    tokens: int = Field(default=16384, ge=1)
    seed: int = 0

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Refuses a recipe without a projection of this package, or with another one of these.

        Raises:
            ValueError: in either case.
        """
        if any(isinstance(other, FlattenedRotation) for other in others):
            raise ValueError("the recipe has another FlattenedRotation; keep one of them")
        if not any(getattr(type(other), "recipe_role", None) == "project" for other in others):
            raise ValueError(
                "it turns the residual coordinates of a projection, and the recipe has none; put SVDOutlierProjection "
                "before it (rank: 0 for a plain rotation)"
            )
        if not self.rounds and not self.refinement_rounds:
            raise ValueError("rounds and refinement_rounds are both 0, which leaves nothing to do; leave it out")

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Learns the rotations and rewrites the model.

        Raises:
            ValueError: if there was no projection before, or a linear is quantized or has a term.
        """
        _check_projected(decoder)
        fitted, chosen = self._samples(decoder, batches())
        search, log = RotationSearch(self.rounds, self.start_percentile, self.end, self.refinement_rounds), _Log()
        stream = log.kept(lambda: self._of_stream(decoder, search, fitted, chosen))
        heads = self._of_heads(decoder, search, fitted, chosen, log) if self.values else {}
        logger.info("FlattenedRotation: stream %s", _summary([stream]))
        if heads:
            logger.info("FlattenedRotation: values %s", _summary(list(heads.values())))
        rotate_residual(decoder, stream.rotation[0], {path: each.rotation for path, each in heads.items()})

    def _samples(self, decoder: Decoder, data: list[dict[str, torch.Tensor]]) -> tuple[RowSample, RowSample]:
        """Rows to fit to, and rows of other batches to choose by; of a single batch they are the same."""
        kept = max(1, len(data) // 4)
        if len(data) == 1:
            logger.warning("FlattenedRotation: one calibration batch; the rotation is chosen by what it is fitted to")
            return (sample_rows(decoder, data, self.tokens, self.seed),) * 2
        chosen = sample_rows(decoder, data[:kept], max(1, self.tokens // 4), self.seed)
        return sample_rows(decoder, data[kept:], self.tokens, self.seed), chosen

    def _of_stream(
        self, decoder: Decoder, search: RotationSearch, fitted: RowSample, chosen: RowSample
    ) -> LearnedRotation:
        reader = next(linear.module for linear in decoder.linears() if linear.group.reads == "stream")
        split = reader.split
        return search(stream_rows(fitted.stream, split), stream_rows(chosen.stream, split), reader.input_quantization)

    def _of_heads(
        self, decoder: Decoder, search: RotationSearch, fitted: RowSample, chosen: RowSample, log: "_Log"
    ) -> dict[str, LearnedRotation]:
        """The rotations of the values, by the path of the attention module."""
        writers = {group.path: group.linears[0].module for group in decoder.groups() if group.group.reads == "values"}
        found = {}
        for path, writer in layer_progress(list(writers.items()), "turning values"):

            def turn(path: str = path, writer: QuadLinear = writer) -> LearnedRotation:
                rows = [value_rows(sample.values[path], writer.split, decoder.geometry) for sample in (fitted, chosen)]
                return search(rows[0], rows[1], writer.input_quantization)

            found[path] = log.kept(turn)
        return found


class _Log:
    """The rotations that are learned, one after the other, as layers of a step in the journal of the run."""

    def __init__(self) -> None:
        self._step: Step = open_step("rotations")
        self._count, self._resumed = 0, self._step.done

    def kept(self, learn: Callable[[], LearnedRotation]) -> LearnedRotation:
        """Returns the next rotation, learned now or in the run that is gone on with."""
        self._count += 1
        if self._count <= self._resumed:
            tensors, gains = self._step.result(self._count - 1)
            flattening, refinement = (None if gain is None else Gain(**gain) for gain in gains)
            return LearnedRotation(tensors["rotation"], flattening, refinement)
        found = learn()
        gains = [None if gain is None else asdict(gain) for gain in (found.flattening, found.refinement)]
        self._step.finish({"rotation": found.rotation}, gains)
        return found


def _check_projected(decoder: Decoder) -> None:
    norms = [norm for block in decoder.blocks for norm in block.norms()]
    if not all(bool((norm.weight == 1).all()) for norm in (*norms, decoder.final_norm)):
        raise ValueError(
            "FlattenedRotation turns the residual coordinates of a projection, which folds the weights of norms, and a "
            "norm of the model has weights that are not 1; put SVDOutlierProjection before it"
        )
    for linear in decoder.linears():
        if linear.module.is_quantized:
            raise ValueError(f"{linear.name} is quantized already; put FlattenedRotation before what quantizes weights")
        for term in linear.module.terms():
            raise ValueError(
                f"{linear.name} has the term {term.kind!r}, which was made for the basis that FlattenedRotation "
                "changes; put FlattenedRotation before what adds terms"
            )


def _summary(found: list[LearnedRotation]) -> str:
    """Both measures on the tokens that choose, mean over the rotations."""
    parts = []
    for name, searches in (
        ("largest magnitude / RMS", [each.flattening for each in found]),
        ("rounding error / energy", [each.refinement for each in found]),
    ):
        known = [each for each in searches if each is not None]
        if known:
            before, after = fmean(each.before for each in known), fmean(each.after for each in known)
            parts.append(f"{name} {before:.4g} -> {after:.4g} on other tokens")
    return ", ".join(parts) or "unchanged: its inputs are zero, or not quantized"
