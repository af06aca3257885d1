"""The windows of text that an inspection or a comparison runs on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quad_modifiers.data import CalibrationSource, calibration_windows, token_windows, wikipedia_articles
from quad_modifiers.data.calibration_texts import DESCRIPTION
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

    def __post_init__(self) -> None:
        if self.samples < 0 or self.eval_windows < 1 or self.seq_length < 2:
            raise ValueError(
                f"samples, eval_windows and seq_length must be at least 0, 1 and 2, not {self.samples}, "
                f"{self.eval_windows} and {self.seq_length}"
            )

    def windows(self, tokenizer: Any, held_out: bool) -> Text:
        """Draws the windows.

        Those to measure on come from the held-out Wikipedia articles of the default text if `held_out`, because the
        others calibrated what is measured; from the user's own data set they are windows that do not calibrate here.

        Raises:
            ValueError: if there is not enough text.
        """
        if held_out and self.dataset is None:
            calibration = [] if self.samples == 0 else self._drawn(tokenizer, self.samples)
            articles = wikipedia_articles("held_out")
            measured = token_windows(tokenizer, articles, self.seq_length, self.eval_windows, seed=self.seed)
            return self._text(calibration, list(measured.split(1)), "held-out articles")
        drawn = self._drawn(tokenizer, self.samples + self.eval_windows)
        if len(drawn) < self.eval_windows + min(self.samples, 1):
            raise ValueError(
                f"the text has {len(drawn)} windows of {self.seq_length} tokens, all needed to measure on; give more "
                "text, or lower seq_length or eval_windows"
            )
        return self._text(drawn[: -self.eval_windows], drawn[-self.eval_windows :], "other windows of these")

    def _drawn(self, tokenizer: Any, count: int) -> list[torch.Tensor]:
        how: dict[str, Any] = {"sequence_length": self.seq_length, "text_column": self.text_column, "seed": self.seed}
        return calibration_windows(self.dataset, tokenizer, num_samples=count, **how)

    def _text(self, calibration: list[torch.Tensor], measured: list[torch.Tensor], measured_on: str) -> Text:
        if self.dataset is None:
            name = f"{DESCRIPTION}; measured on {measured_on}"
        else:
            name = str(self.dataset) if isinstance(self.dataset, (str, Path)) else type(self.dataset).__name__
        settings = Settings(
            name, len(calibration), len(measured), self.seq_length, self.seed, package_versions(), machine_name()
        )
        return Text(calibration, measured, settings)
