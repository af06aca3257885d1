"""What the model card says of the text that a checkpoint was calibrated with."""

from __future__ import annotations

from pathlib import Path

import pytest

from quad_modifiers.data import SourceUsed
from quad_modifiers.records.calibration_record import CALIBRATION_NAME, calibration_record, read_calibration
from quad_modifiers.tools.publishing import plan

SOURCES = (
    SourceUsed("org/chats", "chat", 0.7, 1200, 45, 23_040),
    SourceUsed("a Tensor", "token ids", 0.3, None, 19, 9_728),
)


def test_sources_kinds_shares_and_amounts_are_told(checkpoint: Path) -> None:
    (checkpoint / CALIBRATION_NAME).unlink()
    assert "## Calibration" not in plan(checkpoint, "me/toy-quad", check=False).card
    record = calibration_record(SOURCES, 512, 3)
    (checkpoint / CALIBRATION_NAME).write_text(record.model_dump_json())
    assert read_calibration(checkpoint) == record
    text = plan(checkpoint, "me/toy-quad", check=False).card
    assert "| org/chats | chat | 70 % | 1,200 | 45 | 23,040 |" in text
    assert "| a Tensor | token ids | 30 % |  | 19 | 9,728 |" in text
    assert "Windows of up to 512 tokens, drawn with seed 3." in text
    assert "rendered by the tokenizer's chat template" in text


def test_a_damaged_record_is_named(checkpoint: Path) -> None:
    (checkpoint / CALIBRATION_NAME).write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"calibration.json: format_version: .*correct it, or remove the file"):
        plan(checkpoint, "me/toy-quad", check=False)
