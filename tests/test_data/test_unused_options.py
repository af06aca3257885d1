"""The choice of a column, split or configuration is refused where the data have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from quad_modifiers.data import calibration_windows
from quad_modifiers.tools.evaluation.perplexity_text import perplexity_text

IDS = torch.zeros(8, 32, dtype=torch.int64)
CHOICES = {"text_column": "body", "splits": "train", "dataset_config_name": "en"}


@pytest.mark.parametrize("option", CHOICES)
@pytest.mark.parametrize(
    ("source", "name"),
    [(None, "the default text"), (["text"] * 9, "a list"), (IDS, "a Tensor"), (DataLoader([]), "a DataLoader")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sources_without_a_choice(source, name: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}='{CHOICES[option]}' has no effect on {name}; omit it"):
        calibration_windows(source, None, num_samples=4, sequence_length=32, **{option: CHOICES[option]})


def test_files(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    for file, options in ((text, list(CHOICES)), (tmp_path / "a.jsonl", ["splits", "dataset_config_name"])):
        for option in options:
            with pytest.raises(ValueError, match=rf"{option}=.* has no effect on {file}"):
                calibration_windows(file, None, num_samples=4, sequence_length=32, **{option: CHOICES[option]})


def test_text_of_a_perplexity(text: Path) -> None:
    with pytest.raises(ValueError, match="text_column='body' has no effect on the default text"):
        perplexity_text("wikipedia", text_column="body")
    with pytest.raises(ValueError, match=rf"text_column='body' has no effect on {text}"):
        perplexity_text(text, text_column="body")
