"""What the model card says of a checkpoint that was fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest

from quad_modifiers.records.tuning_record import TUNING_NAME, TunedQuality, Tuning, read_tuning
from quad_modifiers.tools.publishing import plan

RECORD = Tuning(
    loss="distillation",
    original="org/base",
    data="text.jsonl",
    samples=400,
    tokens=204_800,
    validation_samples=20,
    steps=100,
    best_step=90,
    batch_size=4,
    learning_rate=1e-4,
    seed=0,
    trainable_parameters=7_872_000,
    weight_scales=False,
    before=TunedQuality(perplexity=20.5, divergence=0.16),
    after=TunedQuality(perplexity=19.25, divergence=0.08),
    original_perplexity=18.0,
    seconds=900.0,
)


def write(folder: Path, record: Tuning) -> None:
    (folder / TUNING_NAME).write_text(record.model_dump_json())


def card(checkpoint: Path) -> str:
    return plan(checkpoint, "me/toy-quad", check=False).card


def test_a_tuned_checkpoint_says_on_what(checkpoint: Path) -> None:
    assert "## Fine-tuning" not in card(checkpoint)
    write(checkpoint, RECORD)
    text = card(checkpoint)
    assert "outlier weights (7,872,000 parameters) were trained by distillation from org/base" in text
    assert "text.jsonl, 400 samples, 204,800 tokens" in text
    assert "| perplexity | 20.500 | 19.250 |" in text
    assert "| KL to the original, nats per token | 0.1600 | 0.0800 |" in text
    assert "The original has perplexity 18.000" in text
    assert TUNING_NAME in {name for name, _ in plan(checkpoint, "me/toy-quad", check=False).files}


def test_next_token_tuning_names_no_original(checkpoint: Path) -> None:
    quality = {"before": TunedQuality(perplexity=20.5), "after": TunedQuality(perplexity=15.0)}
    update = {"loss": "next_token", "original": None, "original_perplexity": None, "weight_scales": True, **quality}
    write(checkpoint, RECORD.model_copy(update=update))
    text = card(checkpoint)
    assert "outlier weights and the scales of the quantized weights" in text
    assert "trained on the next token" in text
    assert "KL to the original" not in text


def test_a_damaged_record_is_named(checkpoint: Path) -> None:
    (checkpoint / TUNING_NAME).write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"tuning.json: format_version: .*correct it, or remove the file"):
        read_tuning(checkpoint)
