"""One training run: settings, the loop, resuming. Used by `finetune` and by the `OutlierLoRA` modifier."""

import json
import logging
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from quad_modifiers.output_folder import give_usual_modes, replace_file
from quad_modifiers.records.machine import package_versions
from quad_modifiers.records.tuning_record import TunedQuality, Tuning
from quad_peft.equalize import equalize_outliers
from quad_peft.integer_change import fix_integers, scatter_changes
from quad_peft.training.data import Collator, TrainingData
from quad_peft.training.measure import Quality, measure
from quad_peft.training.teacher import Teacher
from quad_peft.training.trained_parts import OUTLIERS, SCALES, WEIGHTS, trained_parts
from quad_peft.training.trainer import NonFiniteError, QuadTrainer

logger = logging.getLogger(__name__)

LAST_GOOD = "last_good"
_EQUALIZED = 4  # samples that the magnitudes of outlier coordinates are measured on
_BEFORE = "before.json"


@dataclass(frozen=True)
class TuningSettings:
    """How to train.

    Attributes:
        epochs: passes over the training samples.
        max_steps: steps after which the run ends; None runs all epochs.
        batch_size: samples in a forward pass, on each process.
        accumulation: forward passes in a step.
        learning_rate: largest learning rate; AdamW with betas 0.9 and 0.95, cosine to zero.
        warmup: share of the steps in which the learning rate rises.
        temperature: temperature of the distillation.
        gradient_checkpointing: True to compute every block twice and keep only its input in memory.
        evaluations: number of evaluations on the validation samples during the run; after each the state is saved.
        seed: seed that orders the samples.
        report_to: integrations of transformers, such as "tensorboard".
        train: what is trained, see `trained_parts.PARTS`.
        weight_learning_rate: largest learning rate of the weights' integers, in steps of their grid.
        fixed_share: share of the steps, at the end, in which the integers stay and the rest is trained.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 2e-5
    warmup: float = 0.05
    temperature: float = 1.0
    gradient_checkpointing: bool = False
    evaluations: int = 10
    seed: int = 0
    report_to: tuple[str, ...] = ()
    train: tuple[str, ...] = (OUTLIERS,)
    weight_learning_rate: float = 0.003
    fixed_share: float = 0.2

    def __post_init__(self) -> None:
        """Checks the ranges."""
        object.__setattr__(self, "train", trained_parts(self.train))
        for name in ("epochs", "learning_rate", "temperature", "weight_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        for name, smallest in (("batch_size", 1), ("accumulation", 1), ("evaluations", 2)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {smallest}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps ({self.max_steps}) must be at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup ({self.warmup}) is a share of the steps, from 0 to below 1")
        if not 0 <= self.fixed_share < 1:
            raise ValueError(f"fixed_share ({self.fixed_share}) is a share of the steps, from 0 to below 1")

    def arguments(self, folder: Path, device: str | None = None) -> TrainingArguments:
        """As transformers' Trainer takes them; states go to `folder`.

        Raises:
            ValueError: for a device other than "cpu" and "cuda".
        """
        if device not in (None, "cpu", "cuda"):
            raise ValueError(
                f"training runs on cpu or cuda, not on {device!r}; choose among several GPUs with CUDA_VISIBLE_DEVICES"
            )
        every = 1 / self.evaluations  # below 1: a share of all steps
        arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=device == "cpu",
            num_train_epochs=self.epochs,
            max_steps=-1 if self.max_steps is None else self.max_steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.learning_rate,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,
            gradient_checkpointing=self.gradient_checkpointing,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=1,  # and the best one
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            logging_steps=min(every, 0.01),
            logging_nan_inf_filter=False,
            prediction_loss_only=True,
            remove_unused_columns=False,
            ddp_broadcast_buffers=False,  # packed weights, the same everywhere
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
            seed=self.seed,
            report_to=list(self.report_to) or "none",
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel: `accelerate launch` is for several devices
        return arguments


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        history: log entries of the Trainer: dicts with "step" and "loss", or "eval_loss".
        steps: number of optimizer steps.
        best_step: step whose weights the model has now; 0 if none was better than the start.
        trainable_parameters: number of trained parameters.
        before, after: quality on the validation samples.
        seconds: duration in this process, the time before an interruption not counted.
        moved_integers: number of integers that differ from the checkpoint's.
    """

    history: list[dict[str, float]]
    steps: int
    best_step: int
    trainable_parameters: int
    before: Quality
    after: Quality
    seconds: float
    moved_integers: int = 0

    def record(
        self,
        data: TrainingData,
        settings: TuningSettings,
        *,
        original: str | None,
        processes: int = 1,
    ) -> Tuning:
        """Returns the content of `tuning.json`; without an `original`, the loss was that of the next token."""
        trained = data.samples[: len(data.samples) - data.validation]
        return Tuning(
            loss="next_token" if original is None else "distillation",
            original=original,
            temperature=settings.temperature,
            data=data.source,
            samples=len(trained),
            tokens=sum(len(sample) for sample in trained),
            validation_samples=data.validation,
            steps=self.steps,
            best_step=self.best_step,
            batch_size=settings.batch_size * settings.accumulation * processes,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            trainable_parameters=self.trainable_parameters,
            weight_scales=SCALES in settings.train,
            weights=WEIGHTS in settings.train,
            moved_integers=self.moved_integers,
            before=TunedQuality(perplexity=self.before.perplexity, divergence=self.before.divergence),
            after=TunedQuality(perplexity=self.after.perplexity, divergence=self.after.divergence),
            original_perplexity=self.before.original_perplexity,
            seconds=round(self.seconds, 1),
            packages={**package_versions(), "peft": version("peft")},
        )


def model_name(model: Any) -> str:
    """Returns a model's name for readers: a Hub id, or the last part of a path."""
    text = str(model) if isinstance(model, (str, Path)) else str(model.config._name_or_path or type(model).__name__)
    return Path(text).name if Path(text).is_dir() else text


def tune(
    model: Any,
    data: TrainingData,
    settings: TuningSettings,
    arguments: TrainingArguments,
    teacher: Teacher | None = None,
    pad_token: int = 0,
) -> Outcome:
    """Trains the adapter of a PEFT model and leaves it at its best state on the validation samples, or as it was.

    Goes on from the last complete state in the folder of `arguments`, to the same result as without an interruption.

    Without `teacher` it trains on the next token. If the loss becomes NaN, NonFiniteError ends the run, and the weights
    from before that step are saved in `last_good`.
    """
    start, folder = time.perf_counter(), Path(arguments.output_dir)
    equalize_outliers(model, data.samples[:_EQUALIZED])
    collator = Collator(pad_token)
    use_cache = model.config.use_cache
    trainer = QuadTrainer(
        model=model,
        args=arguments,
        train_dataset=data.training_samples,
        eval_dataset=data.validation_samples,
        data_collator=collator,
        teacher=teacher,
        temperature=settings.temperature,
        weight_learning_rate=settings.weight_learning_rate,
        fixed_share=settings.fixed_share,
    )
    model.config.use_cache = use_cache  # the Trainer switches it off for good, and a checkpoint would say so
    checkpoint = last_complete_state(folder)
    start_weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    scatter_changes(model, settings.seed)
    held = (data.validation_samples, collator, settings.batch_size, teacher)
    before = _quality_before(folder, trainer, held)
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        if trainer.is_world_process_zero():
            model.save_pretrained(folder / LAST_GOOD)
            give_usual_modes(folder / LAST_GOOD)
        raise NonFiniteError(f"{error}. The weights from before that step are in {folder / LAST_GOOD}") from error
    state = trainer.state
    best = int(state.best_global_step or state.global_step)
    moved = fix_integers(model)
    after = measure(model, *held)
    if not after.loss < before.loss:  # nor if it is NaN
        logger.warning(
            "no state is better on the validation samples than the start, whose loss is %.4g (the best one's: %.4g); "
            "the weights are left as they were: lower the learning rate, or train longer",
            before.loss,
            after.loss,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start_weights:
                    parameter.copy_(start_weights[name])
        best, after, moved = 0, before, fix_integers(model)
    _warn_if_worse(before, after)
    trainer.accelerator.wait_for_everyone()  # the main process removes the folder that all read the best state from
    size = sum(weight.numel() for weight in start_weights.values())
    seconds = time.perf_counter() - start
    return Outcome(state.log_history, state.global_step, best, size, before, after, seconds, moved)


def _warn_if_worse(before: Quality, after: Quality) -> None:
    for name, old, new in zip(before._fields, before, after, strict=True):
        if old is not None and new is not None and new > old:
            logger.warning(
                "the %s on the validation samples rose from %.4g to %.4g; lower the learning rate, or train longer",
                name,
                old,
                new,
            )


def last_complete_state(folder: Path) -> Path | None:
    """Returns the Trainer's newest saved state, None if there is none.

    One that was cut off while it was written is passed over.
    """
    steps = [int(m[1]) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    states = (folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True))
    return next(filter(_is_complete, states), None)


def _is_complete(checkpoint: Path) -> bool:
    try:  # written last
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False


def _quality_before(folder: Path, trainer: QuadTrainer, held: tuple[Any, ...]) -> Quality:
    """Measures the model, or reads what an interrupted run measured."""
    file = folder / _BEFORE
    if file.is_file():
        return Quality(*json.loads(file.read_text()))
    quality = measure(trainer.model, *held)
    if trainer.is_world_process_zero():
        replace_file(file, json.dumps(quality))
    return quality
