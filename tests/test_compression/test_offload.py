"""Weights and activations on the disk while they are not worked on: the same checkpoint."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

import quad_modifiers
from quad_modifiers import compression_size, on_disk
from quad_modifiers.checkpoint.opened import open_checkpoint
from quad_modifiers.checkpoint.save import write_tensors

from .toy_runs import SETTINGS, CutOff, files_of, recipe_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="is for Linux")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets all tensors of a toy be worth a file; sizes of those that were written."""
    monkeypatch.setattr(on_disk, "LEAST", 1)
    sizes: list[int] = []
    real = on_disk.os.write

    def write(handle: int, data: memoryview) -> int:
        sizes.append(len(data))
        return real(handle, data)

    monkeypatch.setattr(on_disk.os, "write", write)
    return sizes


@pytest.mark.parametrize("name", ["corrected", "cache", "ends", "smoothed", "learned", "tuned"])
def test_the_checkpoint_is_the_same(name: str, toy_checkpoint, tmp_path: Path, written: list[int]) -> None:
    if name == "tuned":
        pytest.importorskip("peft")
    model, text = toy_checkpoint("llama"), recipe_text(name)
    quad_modifiers.oneshot(model, text, output_dir=tmp_path / "memory", offload="memory", **SETTINGS)
    assert not written
    found = quad_modifiers.oneshot(model, text, output_dir=tmp_path / "disk", offload="disk", **SETTINGS)
    weights = sum(each.numel() * each.element_size() for each in open_checkpoint(model).load().parameters())
    assert sum(written) > weights
    assert files_of(tmp_path / "disk") == files_of(tmp_path / "memory")
    assert {each.name for each in tmp_path.iterdir()} == {"memory", "disk"}
    assert found.generate(input_ids=found.dummy_inputs["input_ids"], max_new_tokens=3).shape[1] > 3


def test_an_interrupted_run_goes_on_on_the_disk(toy_checkpoint, tmp_path: Path, written: list[int]) -> None:
    model, text = toy_checkpoint("llama"), recipe_text("corrected")
    quad_modifiers.oneshot(model, text, output_dir=tmp_path / "whole", offload="memory", **SETTINGS)
    with pytest.MonkeyPatch.context() as patched:
        CutOff(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            quad_modifiers.oneshot(model, text, output_dir=tmp_path / "out", offload="memory", **SETTINGS)
    quad_modifiers.oneshot(model, text, output_dir=tmp_path / "out", offload="disk", resume=True, **SETTINGS)
    assert written
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("free", [10**6, 10**14])
def test_auto_takes_the_disk_where_memory_is_short(
    free: int,
    toy_checkpoint,
    tmp_path: Path,
    written: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compression_size, "free_memory", lambda: free)
    with caplog.at_level(logging.INFO, "quad_modifiers"):
        quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("rounded"), output_dir=tmp_path / "out", **SETTINGS)
    assert bool(written) == (free == 10**6)
    assert ("not worked on are on the disk" in caplog.text) == (free == 10**6)


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = compression_size.free_memory()
    assert free is not None
    assert 0 < free < 2**50
    monkeypatch.setattr(compression_size, "CONTAINER", tmp_path)
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1800\nfile 700\nkernel 500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert compression_size.free_memory() > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    assert compression_size.free_memory() == 2700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offload": "disc"}, "offload must be one of auto, disk, memory, not 'disc'"),
        ({"offload": "disk"}, "has its files beside output_dir, and none is given"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, message: str, toy_checkpoint) -> None:
    with pytest.raises(ValueError, match=message):
        quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("rounded"), **arguments, **SETTINGS)


def test_a_recipe_of_others_is_refused(toy_checkpoint, tmp_path: Path) -> None:
    recipe = "quant_stage:\n  quant_modifiers:\n    QuantizationModifier: {targets: Linear, scheme: W4A16}\n"
    with pytest.raises(ValueError, match="is for the modifiers of this package, and the recipe has none"):
        quad_modifiers.oneshot(toy_checkpoint("llama"), recipe, output_dir=tmp_path / "out", offload="disk", **SETTINGS)


def test_a_shard_is_small_unless_another_size_is_asked_for(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(160_000_000, dtype=torch.int8) for name in ("a", "b")}
    for size, count in (("5GB", 2), ("1GB", 1)):
        folder = tmp_path / size
        folder.mkdir()
        with on_disk.offloading(tmp_path):
            write_tensors(tensors, folder, size)
        assert len([*folder.glob("*.safetensors")]) == count
