"""`tuning.json`: that a checkpoint was fine-tuned, and on what; kept with the adapter and with the merged checkpoint.

Fine-tuning writes it, merging copies it, the model card reports it.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.records.json_record import read_record

TUNING_NAME = "tuning.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TunedQuality(_Strict):
    """Means over the validation samples: text like that trained on, but held back.

    Attributes:
        perplexity: perplexity of the checkpoint.
        divergence: KL(original || checkpoint) in nats per token; None if the original was not at hand.
    """

    perplexity: float = Field(gt=0)
    divergence: float | None = None


class Tuning(_Strict):
    """The content of tuning.json.

    Attributes:
        format_version: 1; a reader refuses any other.
        loss: "distillation" from the original model, or "next_token".
        original: name of the original model; None for "next_token".
        temperature: temperature of the distillation.
        data: name of the training text, for readers.
        samples, tokens: numbers of samples and tokens in the training text.
        validation_samples: number of samples held back.
        steps: number of optimizer steps.
        best_step: step with the best validation, whose weights these are; 0 if none was better than the start.
        batch_size: samples in a step.
        learning_rate: largest learning rate.
        seed: seed that orders the samples.
        trainable_parameters: number of trained parameters.
        weight_scales: the scales of the quantized weights were trained too.
        weights: the integers of the quantized weights were trained too.
        moved_integers: number of integers that differ from those before the training.
        before, after: quality on the validation samples.
        original_perplexity: perplexity of the original model on the validation samples, if it was at hand.
        seconds: duration of the training.
        packages: versions of the packages.
    """

    format_version: Literal[1] = 1
    loss: Literal["distillation", "next_token"]
    original: str | None = None
    temperature: float = 1.0
    data: str = Field(min_length=1)
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    validation_samples: int = Field(ge=1)
    steps: int = Field(ge=1)
    best_step: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int
    trainable_parameters: int = Field(ge=1)
    weight_scales: bool
    weights: bool = False
    moved_integers: int = Field(default=0, ge=0)
    before: TunedQuality
    after: TunedQuality
    original_perplexity: float | None = None
    seconds: float = Field(ge=0)
    packages: dict[str, str] = {}


def read_tuning(folder: Path) -> Tuning | None:
    """Returns the record in a folder, None if there is none; ValueError names the field that is wrong."""
    return read_record(Tuning, folder / TUNING_NAME)
