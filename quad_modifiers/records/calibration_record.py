"""`calibration.json`: the text that a checkpoint was calibrated with; kept with it and reported in the model card."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.data.used import SourceUsed
from quad_modifiers.records.json_record import read_record
from quad_modifiers.records.machine import package_versions

CALIBRATION_NAME = "calibration.json"
_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "gensim", "datasets")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CalibrationSourceRecord(_Strict):
    """One source of the calibration text.

    Attributes:
        name: name of the source; of a file its last part.
        kind: "text", "chat" (rendered by the tokenizer's chat template) or "token ids".
        share: its share of the windows that were asked for, above 0 and at most 1.
        texts: number of texts or conversations that were read; None for token ids.
        windows, tokens: numbers of windows and of tokens in them that were taken.
    """

    name: str = Field(min_length=1)
    kind: Literal["text", "chat", "token ids"]
    share: float = Field(gt=0, le=1)
    texts: int | None = Field(default=None, ge=0)
    windows: int = Field(ge=0)
    tokens: int = Field(ge=0)


class CalibrationRecord(_Strict):
    """The content of calibration.json.

    Attributes:
        format_version: 1; a reader refuses any other.
        window_length: tokens of a window; those of tokenized samples may be shorter.
        seed: seed that drew texts and windows.
        sources: what the windows are made of.
        packages: versions of the packages.
    """

    format_version: Literal[1] = 1
    window_length: int = Field(ge=2)
    seed: int
    sources: tuple[CalibrationSourceRecord, ...] = Field(min_length=1)
    packages: dict[str, str] = {}


def calibration_record(sources: Sequence[SourceUsed], window_length: int, seed: int) -> CalibrationRecord:
    """Returns the record of a calibration."""
    rows = tuple(CalibrationSourceRecord(**asdict(each)) for each in sources)
    return CalibrationRecord(window_length=window_length, seed=seed, sources=rows, packages=package_versions(_PACKAGES))


def read_calibration(folder: Path) -> CalibrationRecord | None:
    """Returns the record in a folder, None if there is none; ValueError names the field that is wrong."""
    return read_record(CalibrationRecord, folder / CALIBRATION_NAME)
