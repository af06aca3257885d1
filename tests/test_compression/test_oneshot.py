"""`quad_modifiers.oneshot` from a folder to a folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quad_modifiers

pytest.importorskip("llmcompressor")

RECIPE = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""
TEXTS = [f"Document {index} measures the bridge {index * 7} times. " * 20 for index in range(30)]
SETTINGS = {"num_calibration_samples": 6, "max_seq_length": 48}


@pytest.mark.parametrize("source", ["list", "jsonl", "default"])
def test_folder_to_folder(source, toy_checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = {"list": TEXTS, "default": None, "jsonl": tmp_path / "texts.jsonl"}[source]
    if source == "jsonl":
        dataset.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    with caplog.at_level(logging.INFO, logger="quad_modifiers"):
        model = quad_modifiers.oneshot(
            toy_checkpoint("qwen2"), RECIPE, dataset=dataset, output_dir=tmp_path / "out", **SETTINGS
        )
    assert ("Wikipedia" in caplog.text) == (source == "default")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
    for word in ("quantized linears", "size before", "size on disk", "time"):
        assert word in caplog.text


def test_same_seed_same_checkpoint(toy_checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quad_modifiers.oneshot(
            toy_checkpoint("llama"), RECIPE, dataset=TEXTS, output_dir=tmp_path / name, seed=3, **SETTINGS
        )
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_model_object_without_output(make_toy, toy_tokenizer) -> None:
    model = make_toy()
    path = model.config._name_or_path
    returned = quad_modifiers.oneshot(model, RECIPE, dataset=TEXTS, tokenizer=toy_tokenizer, **SETTINGS)
    assert returned is model
    assert model.config._name_or_path == path


def test_a_modifier_can_be_imported_first() -> None:
    """Importing llmcompressor registers all modifiers, in the middle of the import of one of them."""
    root = Path(quad_modifiers.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    code = "from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
