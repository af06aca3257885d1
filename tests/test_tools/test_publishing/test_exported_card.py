"""The card of an export says what was lost, and what computes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quad_modifiers.checkpoint.dense import export_dense
from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.tools.publishing import check_as_stranger, plan

REPO = "me/toy-export"
PORTABLE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 0, basis: square, down_proj_rank: 0, o_proj_rank_per_head: 0}
    DynamicActQuant: {u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0, strategy: group, group_size: 8}
    OutlierSplitGPTQ: {bits: 4, group_size: 8}
"""


def test_dense(checkpoint: Path, tmp_path: Path) -> None:
    text = plan(export_dense(checkpoint, tmp_path / "dense"), REPO, base_model="org/base", license="mit").card
    assert "Written by `quad export --format dense`" in text
    assert "from a checkpoint in the format QUAD, version 1." in text
    assert "; inputs are not quantized any more (they had these bits: q_proj 4," in text
    assert "it takes the memory of the original model" in text
    assert "quad_modifiers" not in text.split("## How to load it")[1].split("##")[0]
    assert "## What is quantized" not in text
    found = yaml.safe_load(text.split("---")[1])
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["quad-modifiers"]


def test_transforms(make_quad_toy, toy_tokenizer, tmp_path: Path) -> None:
    _, source = make_quad_toy(PORTABLE, num_hidden_layers=1)
    folder = export_compressed_tensors(source, tmp_path / "online", online_hadamard=True)
    toy_tokenizer.save_pretrained(folder)
    text = plan(folder, REPO, check=False).card
    assert "**Not with transformers**" in text
    assert "AutoModelForCausalLM" not in text
    assert f"vllm serve {REPO}" in text
    assert "The online Hadamards are in transform_config" in text
    assert check_as_stranger(folder).model_class == "LlamaForCausalLM"


def test_a_damaged_record_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_dense(checkpoint, tmp_path / "dense")
    record = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**record, "format": "gguf"}))
    with pytest.raises(ValueError, match=r"export\.json: format: .*correct it, or remove the file"):
        plan(folder, REPO, check=False)
