"""Where tuning writes: folders that exist, a home folder, places that cannot be written to; and for whom."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")
pytest.importorskip("peft")

from quad_peft.training import TuningSettings, finetune, merge

SETTINGS = TuningSettings(max_steps=2, batch_size=2, learning_rate=1e-3, evaluations=2)
IDS = torch.randint(3, 320, (12, 24), generator=torch.Generator().manual_seed(7))


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def usual_mask() -> None:
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_current_folder_home_folder_and_modes(
    quad_folder, make_toy, usual_mask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "adapter")
    finetune(quad_folder(), ".", data=IDS, original=make_toy(), settings=SETTINGS, teacher_cache="~/teacher")
    assert "adapter_config.json" in os.listdir(".")
    merge(quad_folder(), "~/adapter", "~/merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.glob("[a-z]*")) == ["adapter", "merged", "teacher"]
    for name in ("adapter", "merged", "teacher"):
        assert modes(tmp_path / name) == {0o640}


def test_states_of_a_run_whose_folder_alone_can_be_written_to(
    quad_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go into the folder, which then counts as empty, and the run can be resumed."""
    output = tmp_path / "volume"
    output.mkdir()
    monkeypatch.setattr("quad_modifiers.journal.unfinished.may_write", lambda path: path != tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quad_peft.training.finetuning.write_curve", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(quad_folder(), output, data=IDS, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    assert [path.name for path in output.iterdir()] == ["volume.training"]
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        finetune(quad_folder(), output, data=IDS, settings=SETTINGS)
    finetune(quad_folder(), output, data=IDS, settings=SETTINGS, resume=True)
    assert "adapter_config.json" in os.listdir(output)
    assert "volume.training" not in os.listdir(output)


def test_places_that_cannot_be_are_refused_beforehand(quad_folder, make_toy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for places in ({"output": tmp_path / "file" / "a"}, {"output": tmp_path / "a", "teacher_cache": tmp_path / "file"}):
        with pytest.raises(NotADirectoryError, match="is a file; choose another output"):
            finetune(quad_folder(), data=IDS, original=make_toy(), settings=SETTINGS, **places)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_generation_config_without_effect_does_not_stop_a_merge(quad_folder, tmp_path: Path, monkeypatch) -> None:
    """transformers refuses to save what it loads."""
    finetune(quad_folder(), tmp_path / "adapter", data=IDS, settings=SETTINGS)
    (tmp_path / "checkpoint").mkdir()
    for file in quad_folder().iterdir():
        (tmp_path / "checkpoint" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "checkpoint" / "generation_config.json").write_text('{"temperature": 0.6}')
    merge(tmp_path / "checkpoint", tmp_path / "adapter", tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.temperature is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").save_pretrained(tmp_path / "again")
