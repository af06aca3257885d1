"""One inspection from beginning to end: what is opened, in which order it is measured, what is put together."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions, in_fast_dtype
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.passes.calibration_stream import work_on, working_device
from quad_modifiers.projection.apply import apply_projection
from quad_modifiers.projection.rank import rank_of
from quad_modifiers.tools.inspection.evaluation_text import TextOptions
from quad_modifiers.tools.inspection.measure.inputs import measure_inputs, measure_surfaces
from quad_modifiers.tools.inspection.measure.loss import LossMeter, Reference, unquantized_inputs
from quad_modifiers.tools.inspection.measure.results import Inspection, LossRow, Stage, Subject
from quad_modifiers.tools.inspection.measure.spectrum import measure_spectrum
from quad_modifiers.tools.inspection.measure.stream import measure_blocks
from quad_modifiers.tools.inspection.measure.trials import block_trials, input_trials, stored_parts, weight_trials
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights, measure_weights
from quad_modifiers.tools.inspection.recommendation import recommend

if TYPE_CHECKING:
    from quad_modifiers.modifiers.flattened_rotation import FlattenedRotation
    from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "quad_w4a4"
_PROJECTION, _ROTATION = "SVDOutlierProjection", "FlattenedRotation"
_progress = partial(tqdm, unit="part", leave=False)


def measure(
    model: str | Path,
    baseline: str | Path | None,
    recipe: str | None,
    rank: int | None,
    layers: Sequence[int] | None,
    text: TextOptions,
    options: LoadingOptions = DEFAULTS,
    baseline_revision: str | None = None,
) -> Inspection:
    """Returns the numbers of `inspect_model`, which documents arguments and errors."""
    if baseline_revision is not None and baseline is None:
        raise ValueError(f"the baseline's revision {baseline_revision!r} is given, but no baseline; omit it")
    opened = open_checkpoint(model, known_only=True, options=options)
    warn_of_length(opened.config, text.seq_length)
    if opened.quad is not None:
        if recipe is not None or rank is not None:
            raise ValueError(f"{opened.name} is a QUAD checkpoint, which has its projection; omit --recipe and --rank")
        how = replace(options, revision=baseline_revision)
        original = None if baseline is None else open_checkpoint(baseline, known_only=True, options=how)
        if original is not None:
            original.need_unquantized("the baseline")
            opened.need_same_type(original)
        with work_on(options.device):
            device, found = working_device(), _measure_checkpoint(opened, original, layers, text)
    else:
        opened.need_unquantized("what is inspected must be a QUAD checkpoint, or else it")
        if baseline is not None:
            raise ValueError(f"{opened.name} is an unquantized model, its own baseline; omit --baseline")
        with work_on(options.device):
            device, found = working_device(), _measure_model(opened, recipe or DEFAULT_RECIPE, rank, layers, text)
    return replace(found, recommendation=recommend(found, device))


def _measure_model(
    opened: Opened, recipe: str, rank: int | None, layers: Sequence[int] | None, options: TextOptions
) -> Inspection:
    """Measures an unquantized model, before and after a projection in memory."""
    projection = projection_of(recipe, rank)
    chosen = _chosen(layers, opened)
    text = options.windows(opened.tokenizer(), False, opened.config.vocab_size)
    model = opened.load()
    if opened.options.dtype == "auto":
        model = in_fast_dtype(model)
    decoder, windows = Decoder(model, opened.architecture), text.measured
    from quad_modifiers.modifiers.base import prepared_decoder  # imports llm-compressor

    hidden = decoder.geometry.hidden
    outliers = rank_of(projection.rank, hidden)
    subject = _subject(opened, decoder, "model", hidden, outliers, projection.basis, recipe)
    projection.check(decoder)
    decoder = prepared_decoder(decoder.model)
    logger.info("inspecting %s: spectrum of the residual stream", opened.name)
    spectrum = measure_spectrum(decoder, text.calibration, windows[0], hidden, outliers)
    reference = Reference.of(decoder, windows)
    found = Inspection(subject, text.settings, reference.perplexity, "the model in full precision", spectrum)
    _add_side(found, "before", decoder, windows, chosen, reference)
    logger.info("projecting by %s, rank %d", recipe, outliers)
    project(decoder, projection, text.calibration, rotations_of(recipe))
    _add_side(found, "after", decoder, windows, chosen, reference)
    return found


def _add_side(
    found: Inspection,
    stage: Stage,
    decoder: Decoder,
    windows: list[torch.Tensor],
    layers: list[int],
    reference: Reference,
) -> None:
    """Adds the numbers on one side of the projection."""
    logger.info("%s the projection: inputs and weights", stage)
    rounded = RoundedWeights()
    found.inputs.extend(measure_inputs(decoder, windows, stage))
    found.weights.extend(measure_weights(decoder, windows[0], rounded, stage))
    found.surfaces.extend(measure_surfaces(decoder, windows[0], layers, stage))
    linears = list(decoder.linears())
    trials = list(input_trials(linears))
    if stage == "after":
        trials += [*weight_trials(linears), *block_trials(linears)]
    meter = LossMeter(decoder, windows, stage, reference)
    found.losses.append(meter.row("nothing", "inputs and weights", ""))
    found.losses.extend(meter.trial(trial, rounded) for trial in _progress(trials, f"{stage} the projection"))


def _measure_checkpoint(
    opened: Opened, original: Opened | None, layers: Sequence[int] | None, options: TextOptions
) -> Inspection:
    """Measures a QUAD checkpoint, against its original where that is given."""
    chosen = _chosen(layers, opened)
    text = options.windows(opened.tokenizer(), True, opened.config.vocab_size)
    decoder, windows = Decoder(opened.load(), opened.architecture), text.measured
    first = None if original is None else Decoder(original.load(), original.architecture)
    subject = _checkpoint_subject(opened, decoder, original)
    logger.info("inspecting %s: spectrum and inputs", opened.name)
    spectrum = measure_spectrum(decoder, text.calibration, windows[0], subject.hidden, subject.rank)
    inputs = measure_inputs(decoder, windows, "after")
    surfaces = measure_surfaces(decoder, windows[0], chosen, "after")
    blocks, reference, against = [], None, "the checkpoint with unquantized inputs"
    if first is not None:
        against = "the original model"
        logger.info("against %s", subject.baseline)
        blocks = measure_blocks(first, decoder, windows)
        inputs = measure_inputs(first, windows, "before") + inputs
        surfaces = measure_surfaces(first, windows[0], chosen, "before") + surfaces
        reference = Reference.of(first, windows)
    losses, perplexity = _checkpoint_losses(decoder, windows, reference)
    found = Inspection(subject, text.settings, perplexity, against, spectrum)
    return replace(found, inputs=inputs, surfaces=surfaces, losses=losses, blocks=blocks)


def _checkpoint_subject(opened: Opened, decoder: Decoder, original: Opened | None) -> Subject:
    quad = opened.need_quad()
    basis = quad.residual_basis
    hidden = opened.config.hidden_size if basis is None else basis.hidden_size
    rank, kind = (0, None) if basis is None else (basis.rank, basis.basis)
    bits: dict[str, int | None] = {}
    formats = list(quad.variants())
    for role, group in opened.architecture.roles().items():
        entries = [linear.input.bits for each, linear in formats if each == role and linear.input is not None]
        bits.setdefault(group.name, min(entries, default=None))
    file = Path(opened.name) / "recipe.yaml"
    recipe = file.read_text(encoding="utf-8") if file.is_file() else None
    return replace(
        _subject(opened, decoder, "checkpoint", hidden, rank, kind, recipe),
        baseline=None if original is None else original.name,
        input_bits=bits,
    )


def _checkpoint_losses(
    decoder: Decoder, windows: list[torch.Tensor], reference: Reference | None
) -> tuple[list[LossRow], float]:
    """Returns the losses and the reference's perplexity: weights, everything, then the inputs of one part at a time."""
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
    return rows, whole.reference.perplexity


def _chosen(layers: Sequence[int] | None, opened: Opened) -> list[int]:
    """Returns the blocks whose surfaces are drawn; refuses those that the model does not have."""
    count = opened.config.num_hidden_layers
    if layers is None:
        return sorted({count // 4, count // 2})
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"{opened.name} has no block {layer}; choose 0 to {count - 1}")
    return sorted(set(layers))


def _subject(
    opened: Opened, decoder: Decoder, kind: Any, hidden: int, rank: int, basis: str | None, recipe: str | None
) -> Subject:
    config, linears = opened.config, [linear.module for linear in decoder.linears()]
    inside = sum(linear.in_features * linear.out_features for linear in linears)
    ends = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    layers, model_type = config.num_hidden_layers, opened.architecture.model_type
    groups = {group.name: group.writes_stream for group in opened.architecture.roles().values()}
    return Subject(opened.name, kind, model_type, layers, hidden, inside, ends, rank, basis, recipe, groups=groups)


def projection_of(recipe: str, rank: int | None) -> "SVDOutlierProjection":
    """Returns the projection of a recipe, with another rank if one is given.

    Raises:
        RecipeError: if the recipe cannot be used.
        FileNotFoundError: if there is no such recipe.
        ValueError: if it has no projection, or the rank is negative.
    """
    from quad_modifiers.recipe import check_recipe

    check_recipe(recipe)
    modifiers = _modifiers(recipe)
    found = [modifier for modifier in modifiers if type(modifier).__name__ == _PROJECTION]
    if not found:
        names = ", ".join(type(modifier).__name__ for modifier in modifiers)
        raise ValueError(
            f"the recipe {recipe} has no {_PROJECTION}, only {names}; choose one with it, such as quad_w4a4"
        )
    first, kind = found[0], type(found[0])
    if rank is None:
        return first
    return kind(**{**first.model_dump(include=set(kind.model_fields)), "rank": rank})


def rotations_of(recipe: str) -> list["FlattenedRotation"]:
    """Returns the modifiers of a recipe that turn what its projection left."""
    return [modifier for modifier in _modifiers(recipe) if type(modifier).__name__ == _ROTATION]


def _modifiers(recipe: str) -> list[Any]:
    from llmcompressor.recipe import Recipe

    from quad_modifiers.recipe import resolve_recipe

    return list(Recipe.create_instance(str(resolve_recipe(recipe))).modifiers)


def project(
    decoder: Decoder,
    projection: "SVDOutlierProjection",
    windows: list[torch.Tensor],
    rotations: Sequence["FlattenedRotation"] = (),
) -> None:
    """Projects a model in place, and turns it; its function stays. The decoder comes from `prepared_decoder`."""
    for linear in decoder.linears():
        linear.module.take_bias()
    batches = [{"input_ids": window} for window in windows]
    apply_projection(decoder, projection.plan(decoder, lambda: batches))
    for rotation in rotations:
        rotation.run(decoder, lambda: batches)
