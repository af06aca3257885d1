"""The windows of text that an inspection or a comparison runs on."""

from dataclasses import dataclass
from typing import Any

import torch

from quad_modifiers.data import (
    CalibrationData,
    CalibrationSource,
    calibration_data,
    calibration_reading,
    describe_sources,
    held_out_name,
    held_out_prose,
    token_windows,
)
from quad_modifiers.data.sources import source_name
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.records.machine import machine_name, package_versions
from quad_modifiers.tools.inspection.measure.results import Settings


@dataclass(frozen=True)
class Text:
    """Windows to calibrate with and others to measure on: token ids, `[1, length]` each."""

    calibration: list[torch.Tensor]
    measured: list[torch.Tensor]
    settings: Settings


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how much of it; see `inspect_model`."""

    dataset: CalibrationSource = None
    text_column: str = "text"
    samples: int = 16
    eval_windows: int = 4
    seq_length: int = 512
    seed: int = 0
    split: str | None = None
    dataset_config: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 0 or self.eval_windows < 1 or self.seq_length < 2:
            raise ValueError(
                f"samples, eval_windows and seq_length must be at least 0, 1 and 2, not {self.samples}, "
                f"{self.eval_windows} and {self.seq_length}"
            )

    def windows(self, tokenizer: Any, held_out: bool, vocabulary: int) -> Text:
        """Draws the windows, of ids below `vocabulary`.

        Those to measure on come from the held-out prose of the default text if `held_out`, because the
        others calibrated what is measured; from the user's own data set they are windows that do not calibrate here.

        Raises:
            ValueError: if there is not enough text, or the tokenizer has tokens that the model does not.
        """
        found = self._windows(tokenizer, held_out)
        check_vocabulary([*found.calibration, *found.measured], vocabulary, "the text")
        return found

    def _windows(self, tokenizer: Any, held_out: bool) -> Text:
        if held_out and self.dataset is None:
            calibration = [] if self.samples == 0 else self._drawn(tokenizer, self.samples).windows
            measured = token_windows(tokenizer, held_out_prose(), self.seq_length, self.eval_windows, seed=self.seed)
            name = f"{source_name(None)}; measured on {held_out_name()}"
            return self._text(calibration, list(measured.split(1)), name)
        drawn = self._drawn(tokenizer, self.samples + self.eval_windows)
        windows, name = drawn.windows, describe_sources(drawn.sources)
        if len(windows) < self.eval_windows + min(self.samples, 1):
            raise ValueError(
                f"the text has {len(windows)} windows of {self.seq_length} tokens, all needed to measure on; give more "
                "text, or lower seq_length or eval_windows"
            )
        name = name if self.dataset is not None else f"{name}; measured on other windows of these"
        return self._text(windows[: -self.eval_windows], windows[-self.eval_windows :], name)

    def _drawn(self, tokenizer: Any, count: int) -> CalibrationData:
        reading = calibration_reading(
            tokenizer,
            text_column=self.text_column,
            splits=self.split,
            config_name=self.dataset_config,
            seed=self.seed,
        )
        return calibration_data(self.dataset, reading, num_samples=count, sequence_length=self.seq_length)

    def _text(self, calibration: list[torch.Tensor], measured: list[torch.Tensor], name: str) -> Text:
        settings = Settings(
            name, len(calibration), len(measured), self.seq_length, self.seed, package_versions(), machine_name()
        )
        return Text(calibration, measured, settings)
