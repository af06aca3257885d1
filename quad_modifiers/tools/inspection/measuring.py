"""One inspection from beginning to end: what is opened, in which order it is measured, what is put together."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.tools.inspection.baseline import need_same_type, need_unquantized
from quad_modifiers.tools.inspection.evaluation_text import TextOptions
from quad_modifiers.tools.inspection.measure.inputs import measure_inputs, measure_surfaces
from quad_modifiers.tools.inspection.measure.loss import LossMeter, Reference, unquantized_inputs
from quad_modifiers.tools.inspection.measure.results import (
    InputRow,
    Inspection,
    LossRow,
    Stage,
    Subject,
    Surface,
    WeightRow,
)
from quad_modifiers.tools.inspection.measure.spectrum import measure_spectrum
from quad_modifiers.tools.inspection.measure.stream import measure_blocks
from quad_modifiers.tools.inspection.measure.trials import (
    block_trials,
    input_trials,
    stored_parts,
    weight_trials,
)
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights, measure_weights
from quad_modifiers.tools.inspection.projected import project, projection_of
from quad_modifiers.tools.inspection.recommendation import recommend

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "quad_w4a4"


def measure(
    model: str | Path,
    baseline: str | Path | None,
    recipe: str | None,
    rank: int | None,
    layers: Sequence[int] | None,
    text: TextOptions,
) -> Inspection:
    """Returns the numbers of `inspect_model`, which documents arguments and errors."""
    opened = open_checkpoint(model, known_only=True)
    warn_of_length(opened.config, text.seq_length)
    if opened.quad is not None:
        if recipe is not None or rank is not None:
            raise ValueError(f"{opened.name} is a QUAD checkpoint, which has its projection; omit --recipe and --rank")
        original = None if baseline is None else open_checkpoint(baseline, known_only=True)
        if original is not None:
            need_unquantized(original, "the baseline")
            need_same_type(opened, original)
        found = _Checkpoint(opened, original, layers, text).measure()
    else:
        need_unquantized(opened, "what is inspected must be a QUAD checkpoint, or else it")
        if baseline is not None:
            raise ValueError(f"{opened.name} is an unquantized model, its own baseline; omit --baseline")
        found = _Model(opened, recipe or DEFAULT_RECIPE, rank, layers, text).measure()
    return replace(found, recommendation=recommend(found))


class _Model:
    """An unquantized model, before and after a projection in memory."""

    def __init__(
        self, opened: Opened, recipe: str, rank: int | None, layers: Sequence[int] | None, text: TextOptions
    ) -> None:
        self.recipe, self.projection = recipe, projection_of(recipe, rank)
        self.layers = _chosen(layers, opened)
        self.tokenizer = opened.tokenizer()
        self.text = text.windows(self.tokenizer, held_out=False)
        self.opened, self.decoder = opened, Decoder(opened.load(), opened.architecture)

    def measure(self) -> Inspection:
        """Returns all numbers."""
        from quad_modifiers.modifiers.base import prepared_decoder  # imports llm-compressor

        decoder, windows = self.decoder, self.text.measured
        hidden, projection = decoder.geometry.hidden, self.projection
        subject = _subject(self.opened, decoder, "model", hidden, projection.rank, projection.basis)
        projection.check(decoder)
        prepared_decoder(decoder.model)
        logger.info("inspecting %s: spectrum of the residual stream", self.opened.name)
        spectrum = measure_spectrum(decoder, self.text.calibration, windows[0], hidden, projection.rank)
        reference = Reference.of(decoder, windows)
        before = self._stage("before", reference)
        logger.info("projecting by %s, rank %d", self.recipe, projection.rank)
        project(decoder.model, projection, self.text.calibration)
        after = self._stage("after", reference)
        return Inspection(
            subject=replace(subject, recipe=self.recipe),
            settings=self.text.settings,
            reference_perplexity=reference.perplexity,
            reference="the model in full precision",
            spectrum=spectrum,
            inputs=before.inputs + after.inputs,
            weights=before.weights + after.weights,
            surfaces=before.surfaces + after.surfaces,
            losses=before.losses + after.losses,
            blocks=[],
        )

    def _stage(self, stage: Stage, reference: Reference) -> "_Measured":
        decoder, windows = self.decoder, self.text.measured
        logger.info("%s the projection: inputs and weights", stage)
        rounded = RoundedWeights()
        inputs = measure_inputs(decoder, windows, stage)
        weights = measure_weights(decoder, windows[0], rounded, stage)
        surfaces = measure_surfaces(decoder, windows[0], self.layers, stage)
        linears = list(decoder.linears())
        trials = list(input_trials(linears))
        if stage == "after":
            trials += [*weight_trials(linears), *block_trials(linears)]
        meter = LossMeter(decoder, windows, stage, reference)
        losses = [meter.row("nothing", "inputs and weights", "")]
        losses += [meter.trial(trial, rounded) for trial in _progress(trials, f"{stage} the projection")]
        return _Measured(inputs, weights, surfaces, losses)


@dataclass(frozen=True)
class _Measured:
    """The numbers on one side of the projection."""

    inputs: list[InputRow]
    weights: list[WeightRow]
    surfaces: list[Surface]
    losses: list[LossRow]


class _Checkpoint:
    """A QUAD checkpoint, against its original where that is given."""

    def __init__(
        self, opened: Opened, original: Opened | None, layers: Sequence[int] | None, text: TextOptions
    ) -> None:
        self.layers = _chosen(layers, opened)
        self.text = text.windows(opened.tokenizer(), held_out=True)
        self.opened, self.original = opened, original
        self.decoder = Decoder(opened.load(), opened.architecture)
        self.original_decoder = None if original is None else Decoder(original.load(), original.architecture)

    def measure(self) -> Inspection:
        """Returns all numbers."""
        decoder, windows = self.decoder, self.text.measured
        subject = self._subject()
        logger.info("inspecting %s: spectrum and inputs", self.opened.name)
        spectrum = measure_spectrum(decoder, self.text.calibration, windows[0], subject.hidden, subject.rank)
        inputs = measure_inputs(decoder, windows, "after")
        surfaces = measure_surfaces(decoder, windows[0], self.layers, "after")
        blocks, reference = [], None
        if self.original is not None and self.original_decoder is not None:
            logger.info("against %s", self.original.name)
            first = self.original_decoder
            blocks = measure_blocks(first, decoder, windows)
            inputs = measure_inputs(first, windows, "before") + inputs
            surfaces = measure_surfaces(first, windows[0], self.layers, "before") + surfaces
            reference = Reference.of(first, windows)
        losses, reference = self._losses(reference)
        return Inspection(
            subject=subject,
            settings=self.text.settings,
            reference_perplexity=reference.perplexity,
            reference="the checkpoint with unquantized inputs" if self.original is None else "the original model",
            spectrum=spectrum,
            inputs=inputs,
            weights=[],
            surfaces=surfaces,
            losses=losses,
            blocks=blocks,
        )

    def _subject(self) -> Subject:
        quad = self.opened.need_quad()
        basis = quad.residual_basis
        hidden = self.opened.config.hidden_size if basis is None else basis.hidden_size
        rank, kind = (0, None) if basis is None else (basis.rank, basis.basis)
        bits: dict[str, int | None] = {}
        for role, group in self.opened.architecture.roles().items():
            entry = quad.linears[role].input
            bits.setdefault(group.name, None if entry is None else entry.bits)
        file = Path(self.opened.name) / "recipe.yaml"
        return replace(
            _subject(self.opened, self.decoder, "checkpoint", hidden, rank, kind),
            recipe=file.read_text(encoding="utf-8") if file.is_file() else None,
            baseline=None if self.original is None else self.original.name,
            input_bits=bits,
        )

    def _losses(self, reference: Reference | None) -> tuple[list[LossRow], Reference]:
        """Weights alone and everything against the original; then the inputs of one part at a time."""
        decoder, windows = self.decoder, self.text.measured
        linears = list(decoder.linears())
        everything = [linear.module for linear in linears]
        with unquantized_inputs(everything):
            weights_only = Reference.of(decoder, windows)
            whole = LossMeter(decoder, windows, "after", reference or weights_only)
            rows = [whole.row("all", "weights", "as stored")]
        rows.append(whole.row("all", "inputs and weights", "as stored"))
        meter = LossMeter(decoder, windows, "after", weights_only)
        for part, inside in _progress(list(stored_parts(linears)), "inputs of one part at a time"):
            with unquantized_inputs(linear for linear in everything if linear not in inside):
                rows.append(meter.row(part, "inputs", "as stored"))
        return rows, whole.reference


def _progress(items: list[Any], description: str) -> Iterator[Any]:
    return iter(tqdm(items, desc=description, unit="part", leave=False))


def _chosen(layers: Sequence[int] | None, opened: Opened) -> list[int]:
    """Returns the blocks whose surfaces are drawn.

    Raises:
        ValueError: if the model has no such block.
    """
    count = opened.config.num_hidden_layers
    if layers is None:
        return sorted({count // 4, count // 2})
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"{opened.name} has no block {layer}; choose 0 to {count - 1}")
    return sorted(set(layers))


def _subject(opened: Opened, decoder: Decoder, kind: Any, hidden: int, rank: int, basis: str | None) -> Subject:
    config = opened.config
    ends = 2 * config.vocab_size * hidden
    linears = [linear.module for linear in decoder.linears()]
    inside = sum(linear.in_features * linear.out_features for linear in linears)
    return Subject(
        opened.name,
        kind,
        opened.architecture.model_type,
        config.num_hidden_layers,
        hidden,
        inside,
        ends,
        rank,
        basis,
        None,
        groups={group.name: group.writes_stream for group in opened.architecture.roles().values()},
    )
