"""`finetune`: from a QUAD checkpoint and a text to an adapter folder."""

import logging
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quad_modifiers.checkpoint.opened import Opened, find_tokenizer, open_checkpoint
from quad_modifiers.checkpoint.source_model import check_source_model
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions, in_fast_dtype
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.journal import open_unfinished, unfinished_folder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.output_folder import check_parent, check_space, check_target, complete_or_absent, user_path
from quad_modifiers.process_state import kept_apart
from quad_modifiers.records.tuning_record import TUNING_NAME, Tuning
from quad_peft.integer_change import integer_changes
from quad_peft.layer import QuadLoraLayer
from quad_peft.training.curve import write_curve
from quad_peft.training.data import TrainingData, training_data
from quad_peft.training.teacher import LiveTeacher, Teacher, cache_teacher
from quad_peft.training.trained_parts import SCALES, adapter_fields
from quad_peft.training.tuning_loop import Outcome, TuningSettings, model_name, tune

logger = logging.getLogger(__name__)

_TENSORBOARD = "runs"
_MEMORY_PER_INTEGER = 20  # bytes: change, gradient, two moments, and the change at the start
_STATE_PER_INTEGER = 12  # bytes: change and two moments


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    Attributes:
        adapter: folder of the adapter.
        record: content of its `tuning.json`.
        is_main_process: False in the processes of `accelerate launch` that wrote nothing.
    """

    adapter: Path
    record: Tuning
    is_main_process: bool = True


@kept_apart()
def finetune(
    checkpoint: str | Path,
    output: str | Path,
    *,
    data: Any = None,
    original: str | Path | Any | None = None,
    settings: TuningSettings | None = None,
    length: int = 512,
    samples: int | None = None,
    packed: bool = True,
    validation: float = 0.05,
    text_column: str = "text",
    split: str | None = None,
    dataset_config: str | None = None,
    train_weight_scales: bool = False,
    teacher_cache: str | Path | None = None,
    resume: bool = False,
    options: LoadingOptions = DEFAULTS,
    original_revision: str | None = None,
) -> FinetuneResult:
    """Trains the outlier weights of a QUAD checkpoint, or more of it, and writes them as a PEFT adapter.

    With `original`, by distillation: the loss is the divergence from the original model, which brings back what the
    quantization lost. Without it, on the next token, which also teaches the text.

    States of the run are kept in a folder beside `output`, with the ending `.training`, until it is done; in `output`
    itself, if that exists in a folder that cannot be written to. Under `accelerate launch` the batches are divided
    among the processes.

    Args:
        checkpoint: folder or Hub id of a QUAD checkpoint.
        output: folder for the adapter; must not exist or be empty.
        data: see `training_data`; Wikipedia articles and Python code by default.
        original: folder or Hub id of the original model, or the model.
        settings: settings of the training.
        length: tokens in a sample.
        samples: largest number of samples; all by default.
        packed: True for windows of one stream of text; False makes one padded sample of each document.
        validation: share of the samples that is held back for evaluation during the training.
        text_column: field or column of the text.
        split: split of a `datasets` name or a DatasetDict.
        dataset_config: configuration of a `datasets` name.
        train_weight_scales: True to train the weights' scales too, as "scales" in the settings' `train` does. Such an
            adapter can be merged, but is not a LoRA.
        teacher_cache: folder for the original model's hidden states; computed once, then the model is not needed in
            memory. By default they are computed as they are needed.
        resume: True to continue an interrupted run of the same settings, if there is one.
        options: how checkpoint and original are loaded; its revision is that of the checkpoint. The device is that of
            the training, "cpu" or "cuda".
        original_revision: branch, tag or commit of the original's Hub id.

    Raises:
        FileExistsError: if `output` is not empty, or an unfinished run is beside it and `resume` is not set.
        FileNotFoundError, TypeError, ImportError: for `checkpoint` and `data` that cannot be used.
        ValueError: if the checkpoint is not a QUAD checkpoint or has rank 0; if the unfinished run had other settings;
            for data without text.
        NonFiniteError: if the loss becomes NaN, naming the step and where the last good state is.
    """
    from quad_peft import OutlierLoraConfig, get_outlier_model

    output, settings = user_path(output), settings or TuningSettings()
    folder = unfinished_folder(output, ".training")
    if train_weight_scales:
        settings = replace(settings, train=(*settings.train, SCALES))
    check_target(output, besides=(folder.name,))
    if teacher_cache is not None:
        check_parent(user_path(teacher_cache) / "teacher")
    device, options = options.device, replace(options, device=None)  # the trainer moves the models
    opened = open_checkpoint(checkpoint, options=options)
    opened.check_weights()
    opened.need_quad()
    how = replace(options, revision=original_revision)
    source = None if original is None else _opened_original(original, opened.config, how)
    model, tokenizer = opened.load(), find_tokenizer(opened.name, options)
    found = training_data(
        data,
        tokenizer,
        length=length,
        samples=samples,
        packed=packed,
        validation=validation,
        text_column=text_column,
        split=split,
        dataset_config=dataset_config,
        seed=settings.seed,
    )
    check_vocabulary(found.samples, opened.config.vocab_size, "the training data")
    if isinstance(source, Opened):
        source = source.load()  # before a folder is made: it may lack weights
    model = get_outlier_model(model, OutlierLoraConfig(**adapter_fields(settings.train)))
    _round_as_stored(model, opened.config.dtype)
    original_name = None if original is None else model_name(original)
    arguments = settings.arguments(folder, device)
    _check_launch(arguments)
    if source is not original and arguments.device.type == "cpu":
        source = in_fast_dtype(source)
    writes = arguments.process_index == 0
    identity = {  # what an interrupted run and the one that resumes it must have in common
        "checkpoint": model.peft_config["default"].base_fingerprint,
        "original": original_name,
        "data": found.fingerprint,
        "validation": found.validation,
        "train_weight_scales": SCALES in settings.train,
        **asdict(settings),
    }
    with arguments.main_process_first(local=False):
        if writes:
            _check_room(model, folder)
            open_unfinished(folder, identity, resume)
    with arguments.main_process_first(local=False):
        teacher = _teacher(source, found, teacher_cache)
    outcome = tune(model, found, settings, arguments, teacher, _pad_token(tokenizer))
    record = outcome.record(
        found,
        settings,
        original=original_name,
        processes=arguments.world_size,
    )
    with arguments.main_process_first(local=False):
        if writes:
            _write(model, record, outcome, output, folder)
    return FinetuneResult(output, record, writes)


def _check_launch(arguments: Any) -> None:
    """Refuses processes that do not know of each other: all would write to one folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise ValueError(
            f"the launcher started {started} processes, but transformers sees {arguments.world_size}; without a GPU "
            "set ACCELERATE_USE_CPU=true and start `accelerate launch --multi_gpu --num_processes N`"
        )


def _opened_original(original: Any, checkpoint: Any, options: LoadingOptions) -> Any:
    """Returns an original, opened but not loaded; checks that it can be that of a checkpoint with this config."""
    if isinstance(original, (str, Path)):
        original = open_checkpoint(original, options=options)
        original.check_weights()
    elif options.revision is not None:
        raise ValueError(f"the revision {options.revision!r} has no effect on an original that is loaded; omit it")
    if not isinstance(original, Opened):
        check_source_model(original)
    config = original.config
    is_quad = (
        original.quad is not None
        if isinstance(original, Opened)
        else any(isinstance(module, QuadLinear) for module in original.modules())
    )
    if is_quad:
        raise ValueError(
            "the original model is a QUAD checkpoint itself; distill from the model that the checkpoint was made from"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the original model is quantized; distill from the model that the checkpoint was made from")
    for name in ("vocab_size", "num_hidden_layers"):
        mine, theirs = getattr(checkpoint, name), getattr(config, name, None)
        if mine != theirs:
            raise ValueError(
                f"the original model has {name} {theirs}, the checkpoint {mine}; distill from the model that the "
                "checkpoint was made from"
            )
    return original


def _round_as_stored(model: Any, dtype: torch.dtype | None) -> None:
    """Lets a model that was loaded in a wider dtype than its checkpoint's compute what the merged checkpoint will."""
    if dtype is None or dtype.itemsize >= model.dtype.itemsize:
        return
    for module in model.modules():
        if isinstance(module, QuadLoraLayer):
            module.stored_dtype = dtype


def _check_room(model: Any, folder: Path) -> None:
    """Says what the training of integers needs, and checks that its saved states fit on the disk."""
    weights = sum(change.numel() for change in integer_changes(model))
    if weights:
        logger.info(
            "training the integers of %s weights: %.1f GB of memory beside model and activations, two states of %.1f "
            "GB each on the disk",
            f"{weights:,}",
            _MEMORY_PER_INTEGER * weights / 1e9,
            _STATE_PER_INTEGER * weights / 1e9,
        )
        check_space(folder, 2 * _STATE_PER_INTEGER * weights)


def _teacher(original: Any, data: TrainingData, cache: str | Path | None) -> Teacher | None:
    if original is None:
        return None
    return LiveTeacher(original) if cache is None else cache_teacher(original, data.samples, user_path(cache))


def _write(model: Any, record: Tuning, outcome: Outcome, output: Path, run: Path) -> None:
    """Writes the adapter folder, complete or not at all, and removes the folder of the run."""
    with complete_or_absent(output, besides=(run.name,)) as temporary:
        model.save_pretrained(temporary)
        (temporary / TUNING_NAME).write_text(record.model_dump_json(indent=1) + "\n")
        axis = "cross-entropy [nats]" if record.loss == "next_token" else "KL(original || tuned) [nats]"
        write_curve(outcome.history, temporary, axis)
        if (run / _TENSORBOARD).is_dir():
            shutil.copytree(run / _TENSORBOARD, temporary / _TENSORBOARD)
    shutil.rmtree(run)
    logger.info("wrote %s", output)


def _pad_token(tokenizer: Any) -> int:
    found = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0) if tokenizer else 0
    return int(found)
