"""Checksums of a checkpoint: written with it, and what they find."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quad_modifiers
from quad_modifiers.checkpoint.dense import export_dense
from quad_modifiers.records.checksums import CHECKSUMS_NAME, damages, need_checksums, read_checksums, write_checksums
from quad_modifiers.records.inventory import data_start, read_header, weight_files
from quad_modifiers.tools.publishing import plan
from tests.damage import DAMAGES, exchange_files, unclear, unnoticed

OUTLIER = "model.layers.0.self_attn.q_proj.outlier.weight"


@pytest.fixture
def copy(quad_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quad_checkpoint, tmp_path / "copy"))


def flip(folder: Path, tensor: str) -> None:
    """Flips the lowest bit of the first number of a tensor: no other check can see that."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data_start(file) + read_header(file)[tensor]["data_offsets"][0]] ^= 1
    file.write_bytes(data)


def test_a_checkpoint_is_written_with_its_checksums(quad_checkpoint: Path) -> None:
    found = need_checksums(quad_checkpoint)
    assert set(found.tensors) == set(read_header(quad_checkpoint / "model.safetensors"))
    files = {file.name for file in quad_checkpoint.iterdir()} - {"model.safetensors", CHECKSUMS_NAME}
    assert set(found.files) == files
    assert {"config.json", "recipe.yaml", "tokenizer.json", "calibration.json"} <= files
    assert damages(quad_checkpoint, found) == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(quad_checkpoint: Path, damage: Any) -> None:
    """A sample of `python tests/damage.py`."""
    draw = random.Random(damage.__name__)
    assert [found for _ in range(12) if (found := unnoticed(quad_checkpoint, damage, draw)) is not None] == []


def test_a_damaged_recipe_is_refused_in_words(quad_checkpoint: Path) -> None:
    draw, recipe = random.Random(0), (quad_checkpoint / "recipe.yaml").read_text()
    assert [found for _ in range(60) if (found := unclear(recipe, draw)) is not None] == []


def test_shards_that_changed_places(quad_checkpoint: Path, tmp_path: Path) -> None:
    """All tensors are there, in files where the index does not look for them."""
    model = AutoModelForCausalLM.from_pretrained(quad_checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    wanted = write_checksums(tmp_path / "shards")
    assert "model.safetensors.index.json" in wanted.files
    assert damages(tmp_path / "shards", wanted) == []
    named = exchange_files(tmp_path / "shards", random.Random(0))
    assert f"the header of {named} has changed" in [damage.text for damage in damages(tmp_path / "shards", wanted)]


def test_the_same_tensors_in_other_shards(quad_checkpoint: Path, tmp_path: Path) -> None:
    wanted = need_checksums(quad_checkpoint)
    AutoModelForCausalLM.from_pretrained(quad_checkpoint).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert damages(tmp_path / "shards", wanted, only=()) == []
    files = weight_files(tmp_path / "shards")
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    files[1].write_bytes(data)
    (found,) = damages(tmp_path / "shards", wanted, only=())
    assert found.text == f"the tensor {list(read_header(files[1]))[-1]} has changed"


def test_loading_looks_only_when_it_is_asked_to(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy, OUTLIER)
    AutoModelForCausalLM.from_pretrained(copy)
    monkeypatch.setenv("QUAD_VERIFY", "0")
    AutoModelForCausalLM.from_pretrained(copy)
    monkeypatch.setenv("QUAD_VERIFY", "1")
    with pytest.raises(ValueError, match=f"is not what was written: the tensor {OUTLIER} has changed; get it again"):
        AutoModelForCausalLM.from_pretrained(copy)
    (copy / CHECKSUMS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no checksums\.json"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_loading_looks_at_the_config_but_not_at_what_it_does_not_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUAD_VERIFY", "1")
    (copy / "recipe.yaml").unlink()
    AutoModelForCausalLM.from_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = config["rms_norm_eps"] * 2
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json has changed"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_publishing_looks(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "recipe.yaml").write_text("# by hand")
    plan(copy, "me/toy", license="mit", check=False)
    assert "recipe.yaml has changed since the checkpoint was written" in caplog.text
    flip(copy, OUTLIER)
    with pytest.raises(ValueError, match=f"{OUTLIER} has changed.*run `quad verify --write`"):
        plan(copy, "me/toy", license="mit", check=False)
    write_checksums(copy)
    plan(copy, "me/toy", license="mit", check=False)
    (copy / CHECKSUMS_NAME).unlink()  # as versions before there were checksums wrote it
    plan(copy, "me/toy", license="mit", check=False)


def test_exports_have_them_and_those_of_the_source_are_left_behind(quad_checkpoint: Path, tmp_path: Path) -> None:
    export_dense(quad_checkpoint, tmp_path / "dense")
    found = read_checksums(tmp_path / "dense")
    assert found is not None
    assert damages(tmp_path / "dense", found) == []
    assert OUTLIER not in found.tensors


def test_a_stock_recipe_has_them(make_toy, tmp_path: Path) -> None:
    """llm-compressor's own saver writes the tensors."""
    ids = torch.arange(64).view(2, 32) + 3
    quad_modifiers.oneshot(
        make_toy(), "rtn_w4a4", dataset=ids, num_calibration_samples=2, max_seq_length=32, output_dir=tmp_path / "out"
    )
    assert damages(tmp_path / "out", need_checksums(tmp_path / "out")) == []


def test_the_command(quad_checkpoint: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quad_modifiers.tools.cli import main

    count = len(read_header(copy / "model.safetensors"))
    (copy / "README.md").write_text("a card")
    assert main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out == (
        f"{count} tensors and {len(need_checksums(copy).files)} files are what was written\nnot covered: README.md\n"
    )
    flip(copy, OUTLIER)
    (copy / "recipe.yaml").unlink()
    assert main(["verify", str(copy)]) == 1
    assert capsys.readouterr().out == f"the tensor {OUTLIER} has changed\nrecipe.yaml is missing\n"
    assert main(["verify", str(copy), "--write"]) == 0
    capsys.readouterr()
    assert main(["verify", str(copy)]) == 0
    (copy / CHECKSUMS_NAME).write_text('{"format_version": 2}')
    assert main(["verify", str(copy)]) == 2
    assert "checksums.json: format_version" in capsys.readouterr().err
