"""`oneshot`: from a model and a recipe to a checkpoint."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quad_modifiers.checkpoint.native_runtime import use_native_blocks
from quad_modifiers.checkpoint.opened import Opened, load_tokenizer, open_checkpoint
from quad_modifiers.checkpoint.rehearsal import rehearse_saving
from quad_modifiers.data.calibration import CalibrationSource, as_dataloader, calibration_windows
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.output_folder import check_space, check_target, complete_or_absent, user_path
from quad_modifiers.plugins import architectures
from quad_modifiers.recipe import check_recipe, is_recipe_text, resolve_recipe
from quad_modifiers.recipe.stored_size import stored_size
from quad_modifiers.reporting import SUMMARY, file_size, table

logger = logging.getLogger(__name__)

_NO_TOKENIZER = object()  # llm-compressor insists on a processor, and uses it for nothing but saving


def oneshot(
    model: str | Path | PreTrainedModel,
    recipe: Any,
    *,
    dataset: CalibrationSource = None,
    output_dir: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    num_calibration_samples: int = 64,
    max_seq_length: int = 512,
    text_column: str = "text",
    splits: Any = None,
    dataset_config_name: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> PreTrainedModel:
    """Compresses a causal language model by a recipe and, if asked, writes the checkpoint.

    Everything that can be wrong without looking at the weights is checked first: recipe, output folder, model type.

    Args:
        model: folder, hub id, or loaded transformers model (which is changed in place).
        recipe: path or name of a recipe YAML, its text, or llm-compressor modifiers.
        dataset: calibration text; None takes `quad_modifiers.data.calibration_texts()`: Wikipedia articles that gensim
            ships and sources of Python's standard library. Otherwise a `datasets` name, Dataset, DataLoader, local
            text / jsonl file, list of strings, or token ids.
        output_dir: where the checkpoint goes; must not exist or be empty. None writes nothing. A folder that exists is
            filled, its own place and mode stay.
        tokenizer: folder, hub id or tokenizer; the model's own by default.
        num_calibration_samples: windows of calibration text.
        max_seq_length: tokens per window.
        text_column: column of the text in `dataset`.
        splits: split of a `datasets` name.
        dataset_config_name: configuration of a `datasets` name.
        seed: of the choice of windows.
        arguments: passed on to `llmcompressor.oneshot`.

    Returns:
        The compressed model, ready to run.

    Raises:
        RecipeError: with line and remedy for everything wrong in the recipe.
        FileNotFoundError, FileExistsError, ValueError, TypeError, OSError: naming the argument that cannot be used.
    """
    from llmcompressor import oneshot as llmcompressor_oneshot

    with _visible_log():
        named = isinstance(recipe, (str, Path)) and not is_recipe_text(recipe)
        for warning in check_recipe(recipe):
            logger.warning("%s", warning.describe(str(recipe) if named else "recipe"))
        if named:
            recipe = str(resolve_recipe(recipe))
        output = None if output_dir is None else user_path(output_dir)
        if output is not None:
            check_target(output)
        modifiers = _modifiers(recipe)
        source = open_checkpoint(model) if isinstance(model, (str, Path)) else model
        _check_model(source, _needs_known_architecture(modifiers), max_seq_length)
        start = time.perf_counter()
        processor = _tokenizer(source, tokenizer)
        windows = calibration_windows(
            dataset,
            processor,
            num_samples=num_calibration_samples,
            sequence_length=max_seq_length,
            text_column=text_column,
            splits=splits,
            dataset_config_name=dataset_config_name,
            seed=seed,
        )
        loaded: PreTrainedModel = source.load() if isinstance(source, Opened) else source.eval()
        before = loaded.get_memory_footprint(return_buffers=False)
        if output is not None:
            beside_weights = rehearse_saving(loaded, processor, output)
            check_space(output, beside_weights + stored_size(loaded, modifiers))
        with _config_on_disk(loaded):
            llmcompressor_oneshot(
                model=loaded,
                tokenizer=processor if processor is not None else _NO_TOKENIZER,
                recipe=recipe,
                dataset=as_dataloader(windows),
                pipeline=arguments.pop("pipeline", "independent"),
                **arguments,
            )
        _use_native_blocks(loaded)
        if output is not None:
            _save(loaded, processor, output)
        _log_summary(loaded, before, output, time.perf_counter() - start)
    return loaded


@contextmanager
def _config_on_disk(model: PreTrainedModel) -> Iterator[None]:
    """Gives a model that was built in memory a config file, which llm-compressor reads to see if it is quantized."""
    name = model.config._name_or_path
    if name:
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


def _modifiers(recipe: Any) -> list[Any]:
    from llmcompressor.recipe import Recipe

    return list(Recipe.create_instance(recipe).modifiers)


def _needs_known_architecture(modifiers: list[Any]) -> bool:
    """Returns whether a modifier works on known architectures only."""
    from quad_modifiers.modifiers.base import QuadModifier  # imports llm-compressor

    return any(isinstance(modifier, QuadModifier) for modifier in modifiers)


def _check_model(model: Opened | PreTrainedModel, known_only: bool, length: int) -> None:
    if not isinstance(model, (Opened, PreTrainedModel)):
        raise TypeError(f"model must be a folder, a hub id or a transformers model, not {type(model).__name__}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model.name if isinstance(model, Opened) else 'the model'} is already quantized; start from the original"
        )
    if isinstance(model, PreTrainedModel) and _quantized_linears(model):
        raise ValueError("the model was quantized in memory already; load the original again")
    if known_only:
        find_architecture(model.config, architectures())
    if isinstance(model, Opened):
        model.check_weights()
    warn_of_length(model.config, length)


def _tokenizer(
    model: Opened | PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    source = model.name if isinstance(model, Opened) else model.config._name_or_path
    try:
        return load_tokenizer(tokenizer or source)
    except (OSError, ValueError) as error:
        if tokenizer is not None:
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


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    with complete_or_absent(folder) as temporary:
        inner = temporary / "checkpoint"
        model.save_pretrained(inner)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
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
