"""Toy models in folders, and results that are kept in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quad_modifiers
from quad_modifiers.tools.evaluation.cache import CACHE_VARIABLE

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""
WORDS = ["seven", "wizards", "mixed", "one", "jug", "of", "potent", "black", "liquid", "then", "measured", "twice"]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where results are kept."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text for a perplexity."""
    file = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (600,), generator=generator).tolist()
    file.write_text(" ".join(WORDS[pick] for pick in picks))
    return file


@pytest.fixture(scope="session")
def quad_toy(tmp_path_factory: pytest.TempPathFactory, make_toy: Callable[..., Any], toy_tokenizer: Any) -> Path:
    """A QUAD checkpoint with tokenizer; never write to it."""
    pytest.importorskip("llmcompressor")
    ids = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("evaluation") / "toy-quad"
    quad_modifiers.oneshot(
        make_toy("llama"), RECIPE, dataset=ids, num_calibration_samples=8, max_seq_length=48, output_dir=folder
    )
    toy_tokenizer.save_pretrained(folder)
    return folder
