"""`oneshot`: from a model and a recipe to a checkpoint."""

import inspect
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quad_modifiers.before_compression import PARTIAL, Job, check_shared, checked_job, quantized_linears
from quad_modifiers.checkpoint.contribute import contributions_of
from quad_modifiers.checkpoint.native_runtime import use_native_blocks
from quad_modifiers.checkpoint.opened import open_checkpoint
from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.compression_size import Offload, check_offload, offload_folder
from quad_modifiers.data.calibration import (
    CalibrationSource,
    as_dataloader,
    calibration_data,
    calibration_reading,
)
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.journal import (
    Journal,
    identity_of,
    journaled,
    note_saving,
    remove_journal,
    settle_saving,
    unfinished_folder,
)
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.model.rotary import restore_frequencies
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.on_disk import offloading
from quad_modifiers.oneshot_arguments import PASSED, SEQUENTIAL, check_arguments, dtype_name
from quad_modifiers.output_folder import complete_or_absent, user_path
from quad_modifiers.passes.calibration_stream import work_on
from quad_modifiers.plugins import architectures
from quad_modifiers.process_state import kept_apart
from quad_modifiers.ranks import joined, ranks
from quad_modifiers.records.calibration_record import CALIBRATION_NAME, calibration_record
from quad_modifiers.records.checksums import complete_checksums, damages, need_checksums
from quad_modifiers.reporting import SUMMARY, file_size, table
from quad_modifiers.torchrun import is_first_rank

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
    resume: bool = False,
    offload: Offload = "auto",
    **arguments: Any,
) -> PreTrainedModel:
    """Compresses a causal language model by a recipe and, if asked, writes the checkpoint.

    Everything that can be wrong without looking at the weights is checked first: recipe, output folder, model type. An
    argument of `llmcompressor.oneshot` that would have no effect here is refused, with what to do instead.

    What is finished is kept in a folder beside `output_dir`, with the ending `.partial`, until the checkpoint is
    complete; in `output_dir` itself, if that exists in a folder that cannot be written to.

    Processes that torchrun started share the work, if all of them call this; the first one writes.

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
        resume: True to go on with an interrupted run of the same model, recipe and data, if there is one; the result is
            that of a run without the interruption.
        offload: where weights and activations are that are not worked on: "disk", in files without a name beside
            `output_dir`, "memory", or "auto" for the disk where they would not fit in memory. The checkpoint's tensors
            are the same. On Linux.
        arguments: `pipeline`, `moe_calibrate_all_experts`, `log_dir`, and what llm-compressor's own modifiers read.

    Returns:
        The compressed model, ready to run.

    Raises:
        RecipeError: with line and remedy for everything wrong in the recipe.
        FileExistsError: if `output_dir` is not empty, or an unfinished run is beside it and `resume` is not set.
        FileNotFoundError, ValueError, TypeError, OSError: naming the argument that cannot be used.
        RankLost: if another of the processes that torchrun started has ended.
    """
    from llmcompressor import oneshot as llmcompressor_oneshot

    with _visible_log(), joined():
        check_arguments(arguments, list(inspect.signature(oneshot).parameters))
        options = LoadingOptions(
            revision=None if model_revision == "main" else model_revision,  # llm-compressor's default
            trust_remote_code=trust_remote_code_model,
            dtype=dtype_name(precision),
            device=device,
            cache_dir=cache_dir,
        )
        finished = None
        if resume and output_dir is not None:
            finished = ranks().from_first(partial(_finished_before, output_dir))
        if finished is not None:
            job = checked_job(model, recipe, overrides, None, options, arguments)
            return _take_finished(finished, job)
        job = checked_job(model, recipe, overrides, output_dir, options, arguments, resume)
        job.check_model(max_seq_length, tie_word_embeddings)
        check_shared(job.modifiers)
        check_offload(offload, job)
        start = time.perf_counter()
        tokens = job.tokenizer(tokenizer, processor)
        reading = calibration_reading(
            tokens, text_column=text_column, splits=splits, config_name=dataset_config_name, seed=seed
        )
        data = ranks().from_first(
            lambda: calibration_data(
                dataset, reading, num_samples=num_calibration_samples, sequence_length=max_seq_length
            )
        )
        check_vocabulary(data.windows, job.vocabulary, "the calibration data")
        folder = offload_folder(offload, job, sum(window.numel() for window in data.windows), max_seq_length)
        with ExitStack() as stack:
            stack.enter_context(offloading(folder))
            loaded = job.load(tokens)
            before = loaded.get_memory_footprint(return_buffers=False)
            stack.enter_context(work_on(device))
            journal = stack.enter_context(journaled(_journal(job, loaded, data.windows, resume)))
            with _config_on_disk(loaded, options):
                llmcompressor_oneshot(
                    model=loaded,
                    tokenizer=tokens if tokens is not None else _NO_TOKENIZER,
                    recipe=job.recipe,
                    dataset=as_dataloader(data.windows),
                    trust_remote_code_model=trust_remote_code_model,
                    tie_word_embeddings=tie_word_embeddings is not False,
                    **{"pipeline": "independent", **_passed_on(arguments)},
                )
            restore_frequencies(loaded, warn=False)  # a long calibration text may have rescaled them
            record = calibration_record(data.sources, max_seq_length, seed).model_dump_json(indent=1) + "\n"
            contributions_of(loaded).files[CALIBRATION_NAME] = record
            if job.output is not None:
                ranks().from_first(partial(_save, loaded, tokens, record, job.output, journal))
        _use_native_blocks(loaded)
        _log_summary(loaded, before, job.output, time.perf_counter() - start)
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
    if package.hasHandlers() or not is_first_rank():
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


def _passed_on(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that llm-compressor acts on; the others say what is done anyway."""
    return {name: value for name, value in arguments.items() if name in (*PASSED, *SEQUENTIAL)}


def _use_native_blocks(model: PreTrainedModel) -> None:
    """Lets the model compute as its checkpoint will when it is loaded."""
    if model.device.type != "cpu" or not any(isinstance(module, QuadLinear) for module in model.modules()):
        return
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)  # where no pass of ours did: it wraps every forward
    decoder = Decoder(model, find_architecture(model.config, architectures()))
    use_native_blocks(decoder)


def _finished_before(output_dir: str | Path) -> Path | None:
    """Returns the checkpoint of a run that was cut off when nothing was left to do but to tidy up."""
    output = user_path(output_dir)
    whole = settle_saving(
        unfinished_folder(output, PARTIAL), output, lambda written: not damages(written, need_checksums(written))
    )
    return output if whole else None


def _take_finished(output: Path, job: Job) -> PreTrainedModel:
    """Tidies up behind a run that had finished, and loads its checkpoint."""
    folder = unfinished_folder(output, PARTIAL)

    def tidy_up() -> None:
        if identity_of(folder).get("recipe", job.recipe_digest) != job.recipe_digest:
            raise ValueError(
                f"the run in {folder} had another recipe; it had finished, and its checkpoint is in {output}: remove "
                f"{folder}, and choose another output"
            )
        remove_journal(folder)

    ranks().from_first(tidy_up)
    logger.info("the interrupted run had finished: its checkpoint is in %s", output)
    return open_checkpoint(output, options=replace(job.options, revision=None)).load()


def _journal(job: Job, model: PreTrainedModel, windows: list[torch.Tensor], resume: bool) -> Journal | None:
    if job.output is None and ranks().size == 1:
        return None
    identity = job.identity(model, windows)
    for what, value in identity.items():
        ranks().agree(f"the {what}", value)
    if job.output is None or not ranks().is_first:
        return None
    return Journal(unfinished_folder(job.output, PARTIAL), identity, resume)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    record: str,
    folder: Path,
    journal: Journal | None,
) -> None:
    kept = None if journal is None or not journal.has_something else journal.folder
    besides = () if journal is None else (journal.folder.name,)
    announce = None if kept is None else partial(note_saving, kept)
    with complete_or_absent(folder, besides, announce) as temporary:
        inner = temporary / "checkpoint"
        model.save_pretrained(inner)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        (inner / CALIBRATION_NAME).write_text(record)  # a stock recipe's saver knows nothing of it
        complete_checksums(inner)
        for item in inner.iterdir():
            item.rename(temporary / item.name)
        inner.rmdir()
    logger.info("checkpoint in %s", folder)


def _log_summary(model: PreTrainedModel, before: int, folder: Path | None, seconds: float) -> None:
    rows = [
        ("quantized linears", str(quantized_linears(model))),
        ("size before", file_size(before)),
        ("time", f"{seconds:.0f} s"),
    ]
    if folder is not None:
        size = sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
        rows.insert(2, ("size on disk", f"{file_size(size)} ({100 * size / before:.0f} %)"))
    logger.info("done\n%s", table(("", ""), rows), extra={SUMMARY: True})
