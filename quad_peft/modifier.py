"""OutlierLoRA: fine-tuning of the outlier weights at the end of a compression."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, field_validator

from quad_modifiers.data.token_rows import loader_rows
from quad_modifiers.journal import folder_in_journal
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.nn.from_compressed_tensors import scheme_of
from quad_modifiers.passes.calibration_stream import working_device
from quad_modifiers.recipe.coverage import outlier_names, stock_schemes
from quad_modifiers.recipe.order import PROJECT, QUANTIZE_WEIGHTS, PlacedModifier
from quad_modifiers.records.tuning_record import TUNING_NAME

if TYPE_CHECKING:
    from quad_peft.training.data import TrainingData
    from quad_peft.training.teacher import Teacher
    from quad_peft.training.tuning_loop import Outcome

logger = logging.getLogger(__name__)


_NOTHING_QUANTIZED = "it makes up for quantization, but no weight is quantized; put OutlierSplitGPTQ before it"


class OutlierLoRA(QuadModifier):
    """Tunes the full-precision outlier weights on the calibration data (QUAD, arXiv 2503.19353, section 4.3).

    The quantized weights stay as they are, and so does the format of the checkpoint. It comes last in a recipe, and
    needs the package's extra `peft`.

    Lifecycle:

    - prepare
        - by distillation: last hidden states of the original model for all calibration samples, to a folder that is
          kept with the run, or a temporary one
    - run
        - pack the quantized weights, add an outlier adapter, train it, merge it
    - on_finalize
        - log quality before and after on the samples held back, remove the temporary folder

    Attributes:
        loss: "distillation" towards the original model, or "next_token".
        epochs: passes over the samples.
        batch_size: samples in a step.
        learning_rate: largest learning rate; AdamW, cosine.
        warmup: share of the steps in which the learning rate rises.
        temperature: temperature of the distillation.
        validation: share of the calibration samples that is held back to choose the best state.
        train: what is trained: "outliers", and with it "scales" and "weights", the scales and integers of the
            quantized weights.
        train_weight_scales: True is the same as "scales" in `train`.
        weight_learning_rate: largest learning rate of the integers, in steps of their grid.
        fixed_share: share of the steps, at the end, in which the integers stay and the rest is trained.
        gradient_checkpointing: True for less memory and more time.
        seed: seed that orders the samples.
    """

    recipe_role: ClassVar[str | None] = "tune"
    runs_alone: ClassVar[bool] = True

    loss: Literal["distillation", "next_token"] = "distillation"
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    temperature: float = Field(default=1.0, gt=0)
    validation: float = Field(default=0.05, gt=0, lt=1)
    train: list[str] = Field(default=["outliers"])
    train_weight_scales: bool = False
    weight_learning_rate: float = Field(default=0.003, gt=0)
    fixed_share: float = Field(default=0.2, ge=0, lt=1)
    gradient_checkpointing: bool = False
    seed: int = 0

    _temporary: TemporaryDirectory[str] | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)  # of the states
    _teacher: "Teacher | None" = PrivateAttr(default=None)
    _data: "TrainingData | None" = PrivateAttr(default=None)
    _outcome: "Outcome | None" = PrivateAttr(default=None)

    @field_validator("train")
    @classmethod
    def _check_train(cls, names: list[str]) -> list[str]:
        from quad_peft.training.trained_parts import trained_parts

        return list(trained_parts(names))

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Checks that there will be something to train, and something to make up for.

        Raises:
            ValueError: if nothing is quantized, no projection makes outlier weights, or inputs are quantized by a stock
                modifier.
        """
        placed = [PlacedModifier(each) for each in others]
        if not any(QUANTIZE_WEIGHTS in each.roles for each in placed):
            raise ValueError(_NOTHING_QUANTIZED)
        if any(scheme.input_activations for each in others for scheme in stock_schemes(each)):
            raise ValueError(
                "the inputs are quantized by a stock modifier, through which nothing can be trained; use "
                "DynamicActQuant and OutlierSplitGPTQ"
            )
        packed = next((each.name for each in placed if getattr(each.modifier, "outlier_bits", None)), None)
        if packed is not None:
            raise ValueError(
                f"{packed}.outlier_bits makes integers of the outlier weights, which cannot be trained; leave it out "
                "of all modifiers"
            )
        projections = [each.modifier for each in placed if PROJECT in each.roles]
        if not any(outlier_names(each) for each in projections):
            raise ValueError(
                "there are no outlier weights to train (rank 0, or no projection); put SVDOutlierProjection with "
                "a rank of 16 or more before it"
            )

    def prepare(self, decoder: Decoder, batches: Batches) -> None:
        """Records what the original model says about the samples while it is still there."""
        _check_installed()
        self._data = self._samples(batches())
        self._folder = folder_in_journal("outlier-lora")
        if self._folder is None:
            self._temporary = TemporaryDirectory(prefix="quad-outlier-lora-")
            self._folder = Path(self._temporary.name)
        if self.loss == "distillation":
            from quad_peft.training.teacher import cache_teacher

            device = decoder.model.device
            model = decoder.model.to(working_device()).eval()
            self._teacher = cache_teacher(model, self._data.samples, self._folder)
            model.to(device)

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Trains and merges."""
        model = decoder.model
        _pack_stock_weights(decoder)
        logger.info("OutlierLoRA: %s, %d samples", self.loss, len(self._data.training_samples) if self._data else 0)
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        device = model.device
        with torch.enable_grad():
            self._train(decoder)
        model.to(device).eval()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Logs what the training did."""
        if self._outcome is not None:
            before, after = self._outcome.before, self._outcome.after
            logger.info(
                "OutlierLoRA took %.0f s, %d steps; on the samples held back perplexity %.3f -> %.3f%s",
                self._outcome.seconds,
                self._outcome.steps,
                before.perplexity,
                after.perplexity,
                ""
                if before.divergence is None
                else f" (original {before.original_perplexity:.3f}), KL to the original {before.divergence:.4f} -> "
                f"{after.divergence:.4f}",
            )
        if self._temporary is not None:
            self._temporary.cleanup()
        return super().on_finalize(state, **kwargs)

    def _samples(self, batches: list[dict[str, torch.Tensor]]) -> "TrainingData":
        from quad_peft.training.data import TrainingData

        rows = [row for row in loader_rows(batches) if len(row) > 1]
        if len(rows) < 2:
            raise ValueError(f"OutlierLoRA needs at least 2 calibration samples, not {len(rows)}; give more data")
        return TrainingData(rows, max(1, round(self.validation * len(rows))), "the calibration data")

    def _train(self, decoder: Decoder) -> None:
        from quad_peft import OutlierLoraConfig, get_outlier_model
        from quad_peft.training.trained_parts import SCALES, adapter_fields
        from quad_peft.training.tuning_loop import TuningSettings, model_name, tune

        model = decoder.model
        assert self._data is not None
        assert self._folder is not None
        own = type(self).model_fields
        settings = TuningSettings(**{f.name: getattr(self, f.name) for f in fields(TuningSettings) if f.name in own})
        if self.train_weight_scales:
            settings = replace(settings, train=(*settings.train, SCALES))
        tuned = get_outlier_model(model, OutlierLoraConfig(**adapter_fields(settings.train)))
        try:
            arguments = settings.arguments(self._folder / "run")
            self._outcome = tune(tuned, self._data, settings, arguments, self._teacher)
        except BaseException:
            tuned.unload()
            raise
        tuned.merge_and_unload()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        record = self._outcome.record(
            self._data,
            settings,
            original=None if self._teacher is None else model_name(model),
        )
        self.contribute(decoder, files={TUNING_NAME: record.model_dump_json(indent=1) + "\n"})


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"OutlierLoRA needs {' and '.join(missing)}; install with `pip install 'quad-modifiers[peft]'`"
        )


def _pack_stock_weights(decoder: Decoder) -> None:
    """Packs what a stock quantizer has left, so that the model trains as its checkpoint will run."""
    containers = {linear.name: linear.module for linear in decoder.linears()}
    if not any(container.is_quantized for container in containers.values()):
        raise ValueError(f"OutlierLoRA: {_NOTHING_QUANTIZED}")
    for name, container in containers.items():
        scheme = scheme_of(container.residual)
        if scheme is not None and scheme.input_activations is not None:
            raise ValueError(
                f"{name}: its inputs are quantized by a stock modifier, through which nothing can be trained; use "
                "DynamicActQuant and OutlierSplitGPTQ"
            )
        container.residual = container.packed() or container.residual
