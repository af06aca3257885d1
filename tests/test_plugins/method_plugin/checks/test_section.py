"""A section of the checkpoint: what a modifier adds beyond the linears comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, QUANTIZE, Compress, Compressed, logits_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.checkpoint.loader import QuadQuantizationConfig

TEXT = "Made on a Tuesday: ÄÖÜ"


@pytest.fixture(scope="module")
def noted(compress: Compress) -> Compressed:
    return compress(PROJECT, f"NoteMethod: {{text: '{TEXT}'}}", *QUANTIZE, name="noted")


def test_it_is_saved_loaded_and_saved_again(noted: Compressed, tmp_path: Path) -> None:
    assert noted.quad["sections"] == {"head_transform": {}, "method_note": {"length": len(TEXT.encode())}}
    loaded = AutoModelForCausalLM.from_pretrained(noted.folder)
    assert bytes(loaded.method_note.tolist()).decode() == TEXT
    assert torch.equal(logits_of(loaded), noted.logits)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.method_note, loaded.method_note)
    assert (tmp_path / "model.safetensors").read_bytes() == (noted.folder / "model.safetensors").read_bytes()


def test_even_an_unquantized_model_keeps_it(compress: Compress) -> None:
    made = compress("NoteMethod: {text: plain}")
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert bytes(loaded.method_note.tolist()) == b"plain"
    assert torch.equal(logits_of(loaded), made.logits)


def test_a_missing_or_mis_shaped_buffer_is_named(noted: Compressed, tmp_path: Path) -> None:
    shutil.copytree(noted.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    note = tensors.pop("method_note")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="method_note is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for wrong, message in ((note[:3], r"shape \[3\]"), (note.to(torch.int8), "dtype I8, needed is torch.uint8")):
        save_file(tensors | {"method_note": wrong.contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_section_is_named(noted: Compressed, tmp_path: Path) -> None:
    shutil.copytree(noted.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quad"]["sections"]["method_note"] = {"length": -1}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="method_note has the length -1"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_forms_without_a_place_for_it_are_refused(noted: Compressed, tmp_path: Path) -> None:
    plain = QuadQuantizationConfig(dequantize=True)
    with pytest.raises(ValueError, match="a model with method_note has no plain form"):
        AutoModelForCausalLM.from_pretrained(noted.folder, quantization_config=plain)
    with pytest.raises(ValueError, match="the section 'method_note' has no place in the format"):
        export_compressed_tensors(noted.folder, tmp_path / "exported")
