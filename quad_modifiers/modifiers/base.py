"""What all QUAD modifiers share: the checks before anything is touched, the containers, the calibration batches."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import remove_dispatch
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from torch import nn

from quad_modifiers.checkpoint.contribute import contributions_of
from quad_modifiers.checkpoint.generation_settings import settle_generation
from quad_modifiers.checkpoint.native_runtime import use_native_blocks
from quad_modifiers.checkpoint.opened import find_tokenizer
from quad_modifiers.checkpoint.save import attach_saver
from quad_modifiers.checkpoint.source_model import check_in_memory, check_source_model
from quad_modifiers.data.calibration import calibration_windows
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.model.rotary import restore_frequencies
from quad_modifiers.modifiers.coming_widths import check_group_sizes
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.on_disk import let_go
from quad_modifiers.plugins import architectures
from quad_modifiers.process_state import kept_apart
from quad_modifiers.recipe import RecipeError, validate_modifiers
from quad_modifiers.recipe.layer_bits import check_overrides
from quad_modifiers.recipe.patterns import check_patterns
from quad_modifiers.recipe.storable import decoder_places

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512

Batches = Callable[[], list[dict[str, torch.Tensor]]]
"""Returns the calibration batches: `input_ids`, optional `attention_mask`. A modifier that needs none does not call."""


class QuadModifier(Modifier):
    """A modifier that works on the groups of a decoder.

    A subclass has its settings as fields and overrides `run`. It overrides `check` if its settings may not fit a model,
    and `prepare` if there is something to set up before any modifier of the recipe calibrates.

    Lifecycle:

    - on_initialize
        - the first modifier of a recipe: check of the recipe as a whole, for this model, and of what is saved beside
          the weights
        - check the patterns and the overrides of the fields, then `check`
        - check architecture and weights, wrap the linears in pass-through containers
        - `prepare`
    - on_calibration_start
        - take the model out of llm-compressor's offloading, move biases to the containers
        - `run`

    Attributes:
        recipe_role: what it does, one of `quad_modifiers.recipe.order.ROLES`.
        ignored_by_default: names of linears that it leaves alone, where it has no field `ignore`.
        has_own_pass: whether it runs the model itself, so that no other modifier may calibrate in the same pass.
        makes_quad_checkpoint: True: what is made of the model has to fit into our format.
        runs_alone: whether it cannot be run by several processes at once, each with the whole model.
    """

    recipe_role: ClassVar[str | None] = None
    ignored_by_default: ClassVar[tuple[str, ...]] = ("lm_head",)
    has_own_pass: ClassVar[bool] = True
    makes_quad_checkpoint: ClassVar[bool] = True
    runs_alone: ClassVar[bool] = False

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Refuses a recipe whose other modifiers, before it and after it, do not go with this one.

        It is called without a model too, by `quad recipes validate`.

        Raises:
            ValueError: with a message "what is wrong; what to do".
        """

    def check(self, decoder: Decoder) -> None:
        """Refuses settings that do not fit the model, before anything of it is touched."""

    def prepare(self, decoder: Decoder, batches: Batches) -> None:
        """Sets up what later modifiers have to see; every modifier of the recipe does before any calibrates."""

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Does the work."""
        raise NotImplementedError(f"{type(self).__name__} has no `run`")

    def contribute(
        self,
        decoder: Decoder,
        *,
        basis: dict[str, Any] | None = None,
        sections: dict[str, dict[str, Any]] | None = None,
        files: dict[str, str] | None = None,
    ) -> None:
        """Declares what the checkpoint of this model is to hold.

        Args:
            decoder: the model.
            basis: how the residual stream was projected.
            sections: content for `quad.sections` of config.json, by the name of a `CheckpointSection`.
            files: texts of files beside the weights, by name.
        """
        held = contributions_of(decoder.model)
        held.basis = held.basis if basis is None else basis
        held.sections |= sections or {}
        held.files |= files or {}

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Prepares the model, then the modifier.

        Raises:
            ValueError: if the model cannot be worked on, or the settings do not fit it.
            RecipeError: if the recipe cannot be used on this model.
        """
        decoder = Decoder(state.model, find_architecture(state.model.config, architectures()))
        if self is next((each for each in recipe_modifiers() if isinstance(each, QuadModifier)), None):
            _check_beforehand(decoder)
        check_patterns([self], state.model)
        check_overrides([self], decoder)
        self.check(decoder)
        with kept_apart():
            decoder = prepared_decoder(state.model)
            contributions_of(state.model).recipe = active_session().lifecycle.recipe.yaml()
            self.prepare(decoder, lambda: calibration_batches(state))
        return True

    def on_calibration_start(self, state: State, event: object, **kwargs: Any) -> None:
        """Runs the modifier.

        Raises:
            ValueError: from `run`, or if the pass is shared with another modifier.
        """
        if self.has_own_pass:
            _begin_own_pass(state.model)
        decoder = prepared_decoder(state.model)
        for linear in decoder.linears():
            linear.module.take_bias()
        with kept_apart(), torch.no_grad():
            self.run(decoder, lambda: calibration_batches(state))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Lets the model compute as its checkpoint will when it is loaded: on the CPU with native blocks."""
        restore_frequencies(state.model, warn=False)  # a long calibration text may have rescaled them
        decoder = Decoder(state.model, find_architecture(state.model.config, architectures()))
        if any(isinstance(linear.module, QuadLinear) for linear in decoder.linears()):
            use_native_blocks(decoder)
        return True


def recipe_modifiers() -> list[Modifier]:
    """Returns the modifiers of the recipe that is being initialized or, in a pass of its own, the one that runs."""
    return list(active_session().lifecycle.recipe.modifiers)


def _check_beforehand(decoder: Decoder) -> None:
    """Refuses what could not be saved in the end, and settles what can be."""
    modifiers = recipe_modifiers()
    problems = validate_modifiers(modifiers, decoder_places(decoder))
    if any(problem.severity == "error" for problem in problems):
        raise RecipeError("recipe", problems)
    check_group_sizes(decoder, modifiers)
    settle_generation(decoder.model)


def prepared_decoder(model: nn.Module) -> Decoder:
    """Returns the decoder of a model whose linears are wrapped in `QuadLinear` pass-throughs and that has our saver.

    Calling it again changes nothing.

    Raises:
        ValueError: if the architecture is not supported, the model is quantized already, or a weight is NaN or Inf.
    """
    architecture = find_architecture(model.config, architectures())
    decoder = Decoder(model, architecture)
    if any(isinstance(linear.module, QuadLinear) for linear in decoder.linears()):
        return decoder
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the model is already quantized (its config has a quantization_config); start from the original"
        )
    check_source_model(model)
    decoder.check_linears()
    check_finite(model)
    restore_frequencies(model)
    for linear in decoder.linears():
        linear.replace(QuadLinear(linear.module, linear.role))
    attach_saver(model, architecture)
    return decoder


def check_finite(model: nn.Module) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        ValueError: naming the first bad tensor.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"{name} has {bad} NaN or infinite values; the model is damaged, get it again")
        let_go(parameter)


def _begin_own_pass(model: nn.Module) -> None:
    """Takes the model out of llm-compressor's offloading and checks that the pass belongs to one modifier.

    An offloaded module copies an assigned parameter into the old storage, which a tied weight shares and whose dtype
    it keeps; the block-wise passes move one block at a time themselves.

    A pipeline of the user that calibrates all modifiers at once is refused: the order of the recipe would be lost.
    """
    remove_dispatch(model, onload_tensors=False)
    check_in_memory(model)
    modifiers = active_session().lifecycle.recipe.modifiers
    if len(modifiers) > 1:
        raise ValueError(
            "QUAD modifiers calibrate one after the other; use llm-compressor's default, pipeline='independent'"
        )


def calibration_batches(state: State) -> list[dict[str, torch.Tensor]]:
    """Returns the calibration batches of the session, or the default text where the user gave no data set."""
    loader = state.data.calib if state.data is not None else None
    if loader is not None:
        batches = [dict(batch) for batch in loader]
        if not batches:
            raise ValueError("the calibration data is empty; give at least 4 samples")
        ids = (batch["input_ids"] for batch in batches)
        check_vocabulary(ids, len(state.model.get_input_embeddings().weight), "the calibration data")
        return batches
    windows = calibration_windows(
        None, _tokenizer_of(state.model), num_samples=DEFAULT_SAMPLES, sequence_length=DEFAULT_LENGTH
    )
    batches = [{"input_ids": window} for window in windows]
    if state.data is not None:
        state.data.calib = batches
    return batches


def _tokenizer_of(model: nn.Module) -> Any:
    source = model.config._name_or_path
    found = find_tokenizer(source)
    if found is None:
        raise ValueError(
            f"no dataset was given and no tokenizer was found beside the model ({source!r}), so the default text "
            "cannot be tokenized; give `dataset` as token ids, or `tokenizer` with quad_modifiers.oneshot"
        )
    return found
