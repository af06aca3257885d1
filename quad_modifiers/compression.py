"""`oneshot`: from a model and a recipe to a checkpoint."""

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quad_modifiers.checkpoint.contribute import contributions_of
from quad_modifiers.checkpoint.native_runtime import use_native_blocks
from quad_modifiers.checkpoint.opened import Opened, OwnCodeError, load_tokenizer, open_checkpoint
from quad_modifiers.checkpoint.rehearsal import rehearse_saving
from quad_modifiers.checkpoint.source_model import check_in_memory, check_no_adapters, check_source_model
from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.data.calibration import (
    CalibrationSource,
    as_dataloader,
    calibration_data,
    calibration_reading,
)
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.model.rotary import restore_frequencies
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.oneshot_arguments import PASSED, SEQUENTIAL, check_arguments, check_for_recipe, dtype_name
from quad_modifiers.output_folder import check_space, check_target, complete_or_absent, user_path
from quad_modifiers.passes.calibration_stream import work_on
from quad_modifiers.plugins import architectures
from quad_modifiers.process_state import kept_apart
from quad_modifiers.recipe import check_recipe, fresh_recipe, is_recipe_text, resolve_recipe
from quad_modifiers.recipe.order import PROJECT
from quad_modifiers.recipe.overrides import overridden
from quad_modifiers.recipe.patterns import check_patterns, has_patterns
from quad_modifiers.recipe.resolve import read_recipe
from quad_modifiers.recipe.stored_size import stored_size
from quad_modifiers.records.calibration_record import CALIBRATION_NAME, calibration_record
from quad_modifiers.reporting import SUMMARY, file_size, table

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

logger = logging.getLogger(__name__)

_NO_TOKENIZER = object()  # llm-compressor insists on a processor, and uses it for nothing but saving


@kept_apart()
def oneshot(
    model: str | Path | PreTrainedModel,
    recipe: Any,
    *,
    dataset: CalibrationSource = None,
    output_dir: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    processor: str | Path | PreTrainedTokenizerBase | None = None,
    num_calibration_samples: int = 64,
    max_seq_length: int = 512,
    text_column: str = "text",
    splits: Any = None,
    dataset_config_name: str | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    precision: str | torch.dtype = "auto",
    model_revision: str | None = None,
    trust_remote_code_model: bool = False,
    cache_dir: str | Path | None = None,
    device: str | None = None,
    tie_word_embeddings: bool | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Compresses a causal language model by a recipe and, if asked, writes the checkpoint.

    Everything that can be wrong without looking at the weights is checked first: recipe, output folder, model type. An
    argument of `llmcompressor.oneshot` that would have no effect here is refused, with what to do instead.

    Args:
        model: folder, hub id, or loaded transformers model (which is changed in place).
        recipe: path or name of a recipe YAML, its text, or llm-compressor modifiers, of which the run takes copies.
        dataset: calibration text; None takes `quad_modifiers.data.calibration_texts()`: Wikipedia articles that gensim
            ships and sources of Python's standard library. Otherwise a `datasets` name, Dataset, DataLoader, local
            text / jsonl file, list of strings or conversations, or token ids; or several of these with weights,
            `["a.jsonl:0.7", "b.jsonl:0.3"]` or `[(a, 0.7), (b, 0.3)]`. `calibration_windows` says more.
        output_dir: where the checkpoint goes; must not exist or be empty. None writes nothing. A folder that exists is
            filled, its own place and mode stay.
        tokenizer: folder, hub id or tokenizer; the model's own by default.
        processor: llm-compressor's other name for `tokenizer`.
        num_calibration_samples: windows of calibration text.
        max_seq_length: tokens per window.
        text_column: column of the text or the conversations in `dataset`.
        splits: split of a `datasets` name.
        dataset_config_name: configuration of a `datasets` name.
        seed: of the choice of windows.
        overrides: fields of the recipe to change, "Modifier.field=value" each, the value in YAML.
        precision: dtype in which the weights are loaded, such as "bfloat16"; that of the weights by default.
        model_revision: branch, tag or commit of a hub id.
        trust_remote_code_model: True to run the code that model and tokenizer bring along.
        cache_dir: folder in place of the Hub's cache.
        device: where the blocks are worked on, such as "cpu"; the GPU if there is one by default.
        tie_word_embeddings: False gives the head a tensor of its own; True insists that it keeps the embedding's.
        arguments: `pipeline`, `moe_calibrate_all_experts`, `log_dir`, and what llm-compressor's own modifiers read.

    Returns:
        The compressed model, ready to run.

    Raises:
        RecipeError: with line and remedy for everything wrong in the recipe.
        FileNotFoundError, FileExistsError, ValueError, TypeError, OSError: naming the argument that cannot be used.
    """
    from llmcompressor import oneshot as llmcompressor_oneshot

    with _visible_log():
        check_arguments(arguments, list(inspect.signature(oneshot).parameters))
        options = LoadingOptions(
            revision=None if model_revision == "main" else model_revision,  # llm-compressor's default
            trust_remote_code=trust_remote_code_model,
            dtype=dtype_name(precision),
            device=device,
            cache_dir=cache_dir,
        )
        recipe, modifiers = _checked_recipe(recipe, overrides)
        check_for_recipe(arguments, device, modifiers.all)
        output = None if output_dir is None else user_path(output_dir)
        if output is not None:
            check_target(output)
        # The weights stay where they are; blocks are brought to the device one at a time.
        opening = replace(options, device=None)
        source = open_checkpoint(model, options=opening) if isinstance(model, (str, Path)) else model
        _check_model(source, modifiers.all, max_seq_length)
        _check_options(source, options, tie_word_embeddings, modifiers.all)
        modifiers.check_patterns(source)
        start = time.perf_counter()
        tokens = _tokenizer(source, tokenizer, processor, options)
        reading = calibration_reading(
            tokens, text_column=text_column, splits=splits, config_name=dataset_config_name, seed=seed
        )
        data = calibration_data(dataset, reading, num_samples=num_calibration_samples, sequence_length=max_seq_length)
        check_vocabulary(data.windows, _vocabulary(source), "the calibration data")
        loaded: PreTrainedModel = source.load() if isinstance(source, Opened) else source.eval()
        check_source_model(loaded)
        restore_frequencies(loaded)
        before = loaded.get_memory_footprint(return_buffers=False)
        if output is not None:
            beside_weights = rehearse_saving(loaded, tokens, output)
            check_space(output, beside_weights + stored_size(loaded, modifiers.all))
        with _config_on_disk(loaded, options), work_on(device):
            llmcompressor_oneshot(
                model=loaded,
                tokenizer=tokens if tokens is not None else _NO_TOKENIZER,
                recipe=recipe,
                dataset=as_dataloader(data.windows),
                trust_remote_code_model=trust_remote_code_model,
                tie_word_embeddings=tie_word_embeddings is not False,
                **{"pipeline": "independent", **_passed_on(arguments)},
            )
        restore_frequencies(loaded, warn=False)  # a long calibration text may have rescaled them
        _use_native_blocks(loaded)
        record = calibration_record(data.sources, max_seq_length, seed).model_dump_json(indent=1) + "\n"
        contributions_of(loaded).files[CALIBRATION_NAME] = record
        if output is not None:
            _save(loaded, tokens, record, output)
        _log_summary(loaded, before, output, time.perf_counter() - start)
    return loaded


@contextmanager
def _config_on_disk(model: PreTrainedModel, options: LoadingOptions) -> Iterator[None]:
    """Gives a model a config file, which llm-compressor reads to see if it is quantized.

    Where the model has one, llm-compressor finds it, but knows neither a revision nor a cache folder.
    """
    name = model.config._name_or_path
    if name and options.revision is None and options.cache_dir is None:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        try:
            yield
        finally:
            model.config._name_or_path = name


@contextmanager
def _visible_log() -> Iterator[None]:
    """Shows this package's INFO lines while compressing, unless the application has set up logging itself."""
    package = logging.getLogger("quad_modifiers")
    if package.hasHandlers():
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s quad | %(message)s", datefmt="%H:%M:%S"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


@dataclass(frozen=True)
class _Modifiers:
    """The modifiers of a recipe, as llm-compressor will build them, with its text and name for messages."""

    all: "list[Modifier]"
    text: str | None
    name: str

    def check_patterns(self, model: Opened | PreTrainedModel) -> None:
        """Refuses patterns that match nothing, before the weights are loaded."""
        if has_patterns(self.all):
            parts = model.skeleton() if isinstance(model, Opened) else model
            check_patterns(self.all, parts, self.text, self.name)


def _checked_recipe(recipe: Any, overrides: Sequence[str]) -> tuple[Any, _Modifiers]:
    """Returns the recipe as llm-compressor takes it, and its modifiers; its warnings are logged."""
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
    return recipe, _Modifiers(list(Recipe.create_instance(recipe).modifiers), text, name)


def _is_ours(modifier: "Modifier") -> bool:
    """Returns whether a modifier works on known architectures only."""
    from quad_modifiers.modifiers.base import QuadModifier  # imports llm-compressor

    return isinstance(modifier, QuadModifier)


def _passed_on(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that llm-compressor acts on; the others say what is done anyway."""
    return {name: value for name, value in arguments.items() if name in (*PASSED, *SEQUENTIAL)}


def _check_options(
    model: Opened | PreTrainedModel, options: LoadingOptions, tied: bool | None, modifiers: "Sequence[Modifier]"
) -> None:
    """Refuses what cannot have the effect that it asks for."""
    if isinstance(model, PreTrainedModel):
        for name, value in (("model_revision", options.revision), ("precision", options.dtype)):
            if value not in (None, "auto"):
                raise ValueError(f"{name}={value} has no effect on a model that is loaded already; omit it")
    if tied and not model.config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings=True, but head and embedding of the model are two tensors; omit it")
    projections = [type(each).__name__ for each in modifiers if getattr(each, "recipe_role", None) == PROJECT]
    if tied and projections:
        raise ValueError(f"tie_word_embeddings=True, but {projections[0]} gives the head a tensor of its own; omit it")


def _check_model(model: Opened | PreTrainedModel, modifiers: "list[Modifier]", length: int) -> None:
    from quad_modifiers.modifiers.smoothing import check_smoothing

    if not isinstance(model, Opened):
        check_no_adapters(model)
    if not isinstance(model, (Opened, PreTrainedModel)):
        raise TypeError(f"model must be a folder, a hub id or a transformers model, not {type(model).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model.name if isinstance(model, Opened) else 'the model'} is already quantized; start from the original"
        )
    if isinstance(model, PreTrainedModel) and _quantized_linears(model):
        raise ValueError("the model was quantized in memory already; load the original again")
    if any(_is_ours(each) for each in modifiers):
        architecture = find_architecture(model.config, architectures())
        check_smoothing(modifiers, architecture)
        if isinstance(model, PreTrainedModel):
            Decoder(model, architecture)
            check_in_memory(model)
    if isinstance(model, Opened):
        model.check_weights()
    warn_of_length(model.config, length)


def _vocabulary(model: Opened | PreTrainedModel) -> int:
    """Number of tokens that the model embeds."""
    if isinstance(model, Opened):
        return int(model.config.get_text_config().vocab_size)
    return len(model.get_input_embeddings().weight)


def _tokenizer(
    model: Opened | PreTrainedModel, tokenizer: Any, processor: Any, options: LoadingOptions
) -> PreTrainedTokenizerBase | None:
    if tokenizer is not None and processor is not None:
        raise ValueError("tokenizer and processor mean the same here; give one of the two")
    given = processor if tokenizer is None else tokenizer
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None and not isinstance(given, (str, Path)):
        raise TypeError(f"the tokenizer must be a folder, a hub id or a tokenizer, not {type(given).__name__}")
    own = given is None and isinstance(model, Opened)
    source = model.name if isinstance(model, Opened) else model.config._name_or_path
    try:
        return load_tokenizer(given or source, options if own else replace(options, revision=None))
    except OwnCodeError:
        raise
    except (OSError, ValueError) as error:
        if given is not None:
            raise
        logger.warning("no tokenizer found beside the model (%s); the data set must be token ids", type(error).__name__)
        return None


def _use_native_blocks(model: PreTrainedModel) -> None:
    """Lets the model compute as its checkpoint will when it is loaded."""
    if model.device.type != "cpu" or not any(isinstance(module, QuadLinear) for module in model.modules()):
        return
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)  # where no pass of ours did: it wraps every forward
    decoder = Decoder(model, find_architecture(model.config, architectures()))
    use_native_blocks(decoder)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, record: str, folder: Path) -> None:
    with complete_or_absent(folder) as temporary:
        inner = temporary / "checkpoint"
        model.save_pretrained(inner)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        (inner / CALIBRATION_NAME).write_text(record)  # a stock recipe's saver knows nothing of it
        for item in inner.iterdir():
            item.rename(temporary / item.name)
        inner.rmdir()
    logger.info("checkpoint in %s", folder)


def _quantized_linears(model: torch.nn.Module) -> int:
    return sum(isinstance(m, QuadLinear) and m.is_quantized for m in model.modules())


def _log_summary(model: PreTrainedModel, before: int, folder: Path | None, seconds: float) -> None:
    rows = [
        ("quantized linears", str(_quantized_linears(model))),
        ("size before", file_size(before)),
        ("time", f"{seconds:.0f} s"),
    ]
    if folder is not None:
        size = sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
        rows.insert(2, ("size on disk", f"{file_size(size)} ({100 * size / before:.0f} %)"))
    logger.info("done\n%s", table(("", ""), rows), extra={SUMMARY: True})
