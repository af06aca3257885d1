"""What is checked before a compression begins: recipe, output, model, and how they go together."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quad_modifiers.checkpoint.opened import Opened, OwnCodeError, load_tokenizer, open_checkpoint
from quad_modifiers.checkpoint.rehearsal import rehearse_saving
from quad_modifiers.checkpoint.source_model import check_in_memory, check_no_adapters, check_source_model
from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.journal import check_absent, digest_of, unfinished_folder
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.model.rotary import restore_frequencies
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.oneshot_arguments import check_for_recipe
from quad_modifiers.output_folder import check_space, check_target, user_path
from quad_modifiers.passes.calibration_stream import working_device
from quad_modifiers.plugins import architectures
from quad_modifiers.ranks import ranks
from quad_modifiers.recipe import check_recipe, fresh_recipe, is_recipe_text, resolve_recipe
from quad_modifiers.recipe.layer_bits import check_overrides, has_overrides
from quad_modifiers.recipe.order import unties_head
from quad_modifiers.recipe.overrides import overridden
from quad_modifiers.recipe.patterns import check_patterns, has_patterns
from quad_modifiers.recipe.resolve import read_recipe
from quad_modifiers.recipe.stored_size import stored_size
from quad_modifiers.records.machine import package_versions

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # ending of the folder that keeps what is finished
_VERSIONS = ("torch", "transformers", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True)
class Job:
    """A compression that has been checked as far as that goes without the weights.

    Attributes:
        recipe: as llm-compressor takes it.
        modifiers: those of the recipe, as llm-compressor will build them.
        text: text of the recipe, for line numbers; None where they would be those of no file.
        name: name of the recipe in messages.
        source: the model, opened or loaded already.
        options: how it is loaded.
        output: where the checkpoint goes; None writes nothing.
    """

    recipe: Any
    modifiers: "list[Modifier]"
    text: str | None
    name: str
    source: Opened | PreTrainedModel
    options: LoadingOptions
    output: Path | None

    def check_model(self, length: int, tied: bool | None) -> None:
        """Checks the model, and that recipe and options can have their effect on it.

        Args:
            length: tokens of a calibration window.
            tied: whether head and embedding are to share a tensor, None for as it comes.

        Raises:
            TypeError, ValueError: naming what cannot be used.
            RecipeError: for patterns and overrides of the recipe that match nothing.
        """
        _check_source(self.source)
        if any(is_ours(each) for each in self.modifiers):
            _check_architecture(self.source, self.modifiers)
        if isinstance(self.source, Opened):
            self.source.check_weights()
        warn_of_length(self.source.config, length)
        self._check_options(tied)
        if has_patterns(self.modifiers) or has_overrides(self.modifiers):
            parts = self.source.skeleton() if isinstance(self.source, Opened) else self.source
            check_patterns(self.modifiers, parts, self.text, self.name)
            if has_overrides(self.modifiers):
                decoder = Decoder(parts, find_architecture(parts.config, architectures()))
                check_overrides(self.modifiers, decoder, self.text, self.name)

    def _check_options(self, tied: bool | None) -> None:
        if isinstance(self.source, PreTrainedModel):
            for name, value in (("model_revision", self.options.revision), ("precision", self.options.dtype)):
                if value not in (None, "auto"):
                    raise ValueError(f"{name}={value} has no effect on a model that is loaded already; omit it")
        if tied and not self.source.config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True, but head and embedding of the model are two tensors; omit it")
        untying = [type(each).__name__ for each in self.modifiers if unties_head(each)]
        if tied and untying:
            raise ValueError(f"tie_word_embeddings=True, but {untying[0]} gives the head a tensor of its own; omit it")

    def identity(self, model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Returns what an interrupted run and the one that resumes it must have in common, as JSON takes it.

        Args:
            model: as it is loaded.
            windows: of calibration text.
        """
        return {
            "model": digest_of(model.named_parameters()),
            "recipe": self.recipe_digest,
            "calibration data": digest_of((str(index), window) for index, window in enumerate(windows)),
            "device": working_device().type,
            "versions": package_versions(_VERSIONS),
        }

    @property
    def recipe_digest(self) -> str:
        """SHA-256 of all settings of the modifiers, in hexadecimal."""
        recipe = [[type(each).__name__, each.model_dump()] for each in self.modifiers]
        return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model embeds."""
        if isinstance(self.source, Opened):
            return int(self.source.config.get_text_config().vocab_size)
        return len(self.source.get_input_embeddings().weight)

    def tokenizer(self, tokenizer: Any, processor: Any) -> PreTrainedTokenizerBase | None:
        """Returns the tokenizer that was given by one of its two names, or the model's own; None if it has none.

        Raises:
            TypeError, ValueError, OSError: if it cannot be used.
        """
        if tokenizer is not None and processor is not None:
            raise ValueError("tokenizer and processor mean the same here; give one of the two")
        given = processor if tokenizer is None else tokenizer
        if isinstance(given, PreTrainedTokenizerBase):
            return given
        if given is not None and not isinstance(given, (str, Path)):
            raise TypeError(f"the tokenizer must be a folder, a hub id or a tokenizer, not {type(given).__name__}")
        opened = isinstance(self.source, Opened)
        name = self.source.name if isinstance(self.source, Opened) else self.source.config._name_or_path
        options = self.options if given is None and opened else replace(self.options, revision=None)
        try:
            return load_tokenizer(given or name, options)
        except OwnCodeError:
            raise
        except (OSError, ValueError) as error:
            if given is not None:
                raise
            reason = type(error).__name__
            logger.warning("no tokenizer found beside the model (%s); the data set must be token ids", reason)
            return None

    def load(self, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
        """Returns the model in evaluation mode, after saving it has been tried.

        Raises:
            ValueError: if it is not whole, plain and in memory, or cannot be saved in the end.
            OSError: if there is no room for the checkpoint.
        """
        model: PreTrainedModel = self.source.load() if isinstance(self.source, Opened) else self.source.eval()
        check_source_model(model)
        restore_frequencies(model)
        if self.output is not None and ranks().is_first:
            beside_weights = rehearse_saving(model, tokenizer, self.output)
            check_space(self.output, beside_weights + stored_size(model, self.modifiers))
        return model


def checked_job(
    model: str | Path | PreTrainedModel,
    recipe: Any,
    overrides: Sequence[str],
    output_dir: str | Path | None,
    options: LoadingOptions,
    arguments: dict[str, Any],
    resume: bool = False,
) -> Job:
    """Checks recipe and output folder, and opens the model; the arguments are those of `oneshot`.

    Raises:
        RecipeError: with line and remedy for everything wrong in the recipe.
        FileNotFoundError, FileExistsError, ValueError, TypeError, OSError: naming the argument that cannot be used.
    """
    from llmcompressor.recipe import Recipe

    named = isinstance(recipe, (str, Path)) and not is_recipe_text(recipe)
    name = str(recipe) if named else "recipe"
    if overrides:
        recipe, named = overridden(recipe, overrides), False
    for warning in check_recipe(recipe):
        logger.warning("%s", (replace(warning, line=None) if overrides else warning).describe(name))
    recipe = str(resolve_recipe(recipe)) if named else fresh_recipe(recipe)
    text = None
    if isinstance(recipe, str) and not overrides:  # with overrides, its lines are not those of a file
        text = read_recipe(Path(recipe)) if named else recipe
    modifiers = list(Recipe.create_instance(recipe).modifiers)
    check_for_recipe(arguments, options.device, modifiers)
    output = None if output_dir is None else user_path(output_dir)
    if output is not None and ranks().is_first:
        partial = unfinished_folder(output, PARTIAL)
        check_target(output, besides=(partial.name,))
        check_absent(partial, resume)
    elif output is None and resume:
        raise ValueError("resume=True goes on with what is kept beside output_dir; give the output_dir of that run")
    # The weights stay where they are; blocks are brought to the device one at a time.
    opening = replace(options, device=None)
    source = open_checkpoint(model, options=opening) if isinstance(model, (str, Path)) else model
    return Job(recipe, modifiers, text, name, source, options, output)


def _check_source(model: Any) -> None:
    if not isinstance(model, Opened):
        check_no_adapters(model)
    if not isinstance(model, (Opened, PreTrainedModel)):
        raise TypeError(f"model must be a folder, a hub id or a transformers model, not {type(model).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model.name if isinstance(model, Opened) else 'the model'} is already quantized; start from the original"
        )
    if isinstance(model, PreTrainedModel) and quantized_linears(model):
        raise ValueError("the model was quantized in memory already; load the original again")


def _check_architecture(model: Opened | PreTrainedModel, modifiers: "Sequence[Modifier]") -> None:
    """Checks that modifiers which work on known architectures know this one."""
    from quad_modifiers.modifiers.smoothing import check_smoothing

    architecture = find_architecture(model.config, architectures())
    check_smoothing(modifiers, architecture)
    if isinstance(model, PreTrainedModel):
        Decoder(model, architecture)
        check_in_memory(model)


def check_shared(modifiers: "Sequence[Modifier]") -> None:
    """Refuses a recipe that several processes cannot share; docs/developer/many-ranks.md says how they share others.

    Raises:
        ValueError: naming the modifier.
    """
    if ranks().size == 1:
        return
    alone = next((type(each).__name__ for each in modifiers if getattr(each, "runs_alone", False)), None)
    if alone is not None:
        raise ValueError(
            f"{alone} works in one process; leave it out, and run `quad finetune` afterwards, without torchrun"
        )
    if not any(is_ours(each) for each in modifiers):
        raise ValueError(
            "the recipe has no modifier of this package to share its work among the processes of torchrun; "
            "llm-compressor's own oneshot does that for its own modifiers"
        )


def is_ours(modifier: "Modifier") -> bool:
    """Returns whether a modifier works on known architectures only."""
    from quad_modifiers.modifiers.base import QuadModifier  # imports llm-compressor

    return isinstance(modifier, QuadModifier)


def quantized_linears(model: nn.Module) -> int:
    """Returns how many linears of a model have been quantized in memory."""
    return sum(isinstance(each, QuadLinear) and each.is_quantized for each in model.modules())
