"""The main job on a real model, at a size that two cores manage in minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quad_modifiers import oneshot
from quad_modifiers.data import token_windows, wikipedia_articles
from quad_modifiers.tools.evaluation import perplexity

pytestmark = pytest.mark.slow

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


def perplexity_of(recipe: str, smollm2: Path, folder: Path, held_out: torch.Tensor) -> float:
    """Compress, save, reload; the reloaded model computes what the one in memory does."""
    in_memory = oneshot(str(smollm2), recipe, num_calibration_samples=SAMPLES, output_dir=folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = held_out[:1, :64]
        torch.testing.assert_close(loaded(ids).logits, in_memory(ids).logits, rtol=0, atol=0)
    return perplexity(loaded, held_out, progress=False).value


# One test: the tests of a module may run in several processes, and each would compress again.
def test_four_bits_keep_the_model_and_beat_a_plain_rotation(
    smollm2: Path, held_out: torch.Tensor, reference: float, tmp_path: Path
) -> None:
    projected = perplexity_of("quad_w4a4", smollm2, tmp_path / "quad", held_out)
    print(f"quad_w4a4 / full precision: {projected / reference:.3f} (bound 1.40), with {SAMPLES} calibration windows")
    assert projected / reference <= 1.40
    plain = perplexity_of("quarot_w4a4", smollm2, tmp_path / "quarot", held_out)  # the same, without outliers
    print(f"quad_w4a4 / quarot_w4a4: {projected / plain:.3f} (bound 0.9)")
    assert projected < 0.9 * plain
