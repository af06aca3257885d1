"""`tuning.json` of a run."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from quad_modifiers.records.machine import package_versions
from quad_modifiers.records.tuning_record import TunedQuality, Tuning
from quad_peft.training.data import TrainingData
from quad_peft.training.tuning_loop import Outcome, TuningSettings


def tuning_record(
    outcome: Outcome,
    data: TrainingData,
    settings: TuningSettings,
    *,
    original: str | None,
    train_weight_scales: bool,
    processes: int = 1,
) -> Tuning:
    """Returns the record of a run on `processes` processes.

    `original` is the name of the original model, None if the loss was that of the next token.
    """
    trained = data.samples[: len(data.samples) - data.validation]
    return Tuning(
        loss="next_token" if original is None else "distillation",
        original=original,
        temperature=settings.temperature,
        data=data.source,
        samples=len(trained),
        tokens=sum(len(sample) for sample in trained),
        validation_samples=data.validation,
        steps=outcome.steps,
        best_step=outcome.best_step,
        batch_size=settings.batch_size * settings.accumulation * processes,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        trainable_parameters=outcome.trainable_parameters,
        weight_scales=train_weight_scales,
        before=TunedQuality(perplexity=outcome.before.perplexity, divergence=outcome.before.divergence),
        after=TunedQuality(perplexity=outcome.after.perplexity, divergence=outcome.after.divergence),
        original_perplexity=outcome.before.original_perplexity,
        seconds=round(outcome.seconds, 1),
        packages={**package_versions(), "peft": version("peft")},
    )


def model_name(model: Any) -> str:
    """Returns a model's name for readers: a Hub id, or the last part of a path."""
    text = str(model) if isinstance(model, (str, Path)) else str(model.config._name_or_path or type(model).__name__)
    return Path(text).name if Path(text).is_dir() else text
