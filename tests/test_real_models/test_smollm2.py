"""The main job on a real model, at a size that two cores manage in minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quad_modifiers import oneshot
from quad_modifiers.data import token_windows, wikipedia_articles
from quad_modifiers.tools.evaluation import perplexity

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]

SAMPLES = 16
WINDOWS = 6


@pytest.fixture(scope="module")
def held_out(smollm2: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return token_windows(tokenizer, wikipedia_articles("held_out"), 512, WINDOWS, seed=0)


@pytest.fixture(scope="module")
def reference(smollm2: Path, held_out: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)  # bfloat16 is slow on many CPUs
    return perplexity(model, held_out, progress=False).value


@pytest.fixture(scope="module")
def projected_and_plain(smollm2: Path, held_out: torch.Tensor, tmp_path_factory) -> dict[str, float]:
    """Perplexity of quad_w4a4 and of its baseline without outliers, from the same calibration."""
    found = {}
    for recipe in ("quad_w4a4", "quarot_w4a4"):
        folder = tmp_path_factory.mktemp("real") / recipe
        in_memory = oneshot(str(smollm2), recipe, num_calibration_samples=SAMPLES, output_dir=folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            ids = held_out[:1, :64]
            torch.testing.assert_close(loaded(ids).logits, in_memory(ids).logits, rtol=0, atol=0)
        found[recipe] = perplexity(loaded, held_out, progress=False).value
    return found


def test_four_bits_keep_the_model(projected_and_plain: dict[str, float], reference: float) -> None:
    ratio = projected_and_plain["quad_w4a4"] / reference
    print(f"quad_w4a4 / full precision: {ratio:.3f} (bound 1.40), with {SAMPLES} calibration windows")
    assert ratio <= 1.40


def test_outlier_coordinates_beat_plain_rotation(projected_and_plain: dict[str, float]) -> None:
    print(projected_and_plain)
    assert projected_and_plain["quad_w4a4"] < 0.9 * projected_and_plain["quarot_w4a4"]
