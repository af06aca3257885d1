"""A compression that was cut off, and resumed: the same checkpoint as without the interruption."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import quad_modifiers
from quad_modifiers.journal import note_saving, unfinished

from .toy_runs import RECIPES, SETTINGS, TEXTS, CutOff, files_of, recipe_text

pytest.importorskip("llmcompressor")


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_anywhere_it_is_the_same(name: str, toy_checkpoint, tmp_path: Path) -> None:
    if name == "tuned":
        pytest.importorskip("peft")
    model, text = toy_checkpoint("llama"), recipe_text(name)
    with pytest.MonkeyPatch.context() as patched:
        whole = CutOff(patched)
        quad_modifiers.oneshot(model, text, output_dir=tmp_path / "whole", **SETTINGS)
    assert whole.count
    wanted = files_of(tmp_path / "whole")
    cuts = {"corrected": range(1, whole.count + 1), "learned": range(1, whole.count, 3)}
    for at in cuts.get(name, [whole.count - 1]):
        output = tmp_path / f"cut-{at}"
        with pytest.MonkeyPatch.context() as patched:
            CutOff(patched, at, after=at % 2 == 0)
            with pytest.raises(KeyboardInterrupt):
                quad_modifiers.oneshot(model, text, output_dir=output, **SETTINGS)
        assert not output.exists()
        with pytest.MonkeyPatch.context() as patched:
            rest = CutOff(patched)
            quad_modifiers.oneshot(model, text, output_dir=output, resume=True, **SETTINGS)
        assert rest.count == whole.count - at + at % 2
        assert files_of(output) == wanted
        assert {each.name for each in tmp_path.iterdir()} >= {"whole", output.name}
        assert not output.with_name(f"{output.name}.partial").exists()


def test_cut_off_twice(cut_off, whole, toy_checkpoint) -> None:
    with pytest.MonkeyPatch.context() as patched:
        CutOff(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            resume(toy_checkpoint, cut_off)
    resume(toy_checkpoint, cut_off)
    assert files_of(cut_off) == whole


@pytest.fixture(scope="module")
def whole(toy_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the run that is cut off below, without the interruption."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("corrected"), output_dir=output, **SETTINGS)
    return files_of(output)


@pytest.fixture(scope="module")
def interrupted(toy_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a run that was cut off behind its third layer, the first of the weights."""
    output = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        CutOff(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("corrected"), output_dir=output, **SETTINGS)
    return output.with_name("out.partial")


@pytest.fixture
def cut_off(interrupted: Path, tmp_path: Path) -> Path:
    """The folder that the output of an interrupted run was to be; what is left of it lies beside."""
    shutil.copytree(interrupted, tmp_path / "out.partial")
    return tmp_path / "out"


def resume(toy_checkpoint, output: Path, **changed: Any) -> None:
    settings = {"model": toy_checkpoint("llama"), "recipe": recipe_text("corrected"), "resume": True, **SETTINGS}
    quad_modifiers.oneshot(output_dir=output, **{**settings, **changed})


def test_without_resume_it_is_refused_before_anything_is_loaded(cut_off, toy_checkpoint) -> None:
    kept = sorted(cut_off.with_name("out.partial").rglob("*"))
    with pytest.raises(FileExistsError, match=r"out\.partial holds an unfinished run; go on with --resume"):
        resume(toy_checkpoint, cut_off, resume=False)
    assert sorted(cut_off.with_name("out.partial").rglob("*")) == kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": recipe_text("two levels")}, "another recipe"),
        ({"overrides": ["OutlierSplitGPTQ.damping=0.05"]}, "another recipe"),
        ({"model": "qwen2"}, "another model"),
        ({"seed": 5}, "another calibration data"),
        ({"dataset": TEXTS[:20]}, "another calibration data"),
    ],
)
def test_another_run_is_refused_by_name(changed: dict[str, Any], message: str, cut_off, toy_checkpoint) -> None:
    if "model" in changed:
        changed = {"model": toy_checkpoint(changed["model"])}
    with pytest.raises(ValueError, match=message):
        resume(toy_checkpoint, cut_off, **changed)
    assert cut_off.with_name("out.partial").exists()


def test_other_versions_are_refused(cut_off, toy_checkpoint) -> None:
    file = cut_off.with_name("out.partial") / "run.json"
    run = json.loads(file.read_text())
    run["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="another versions"):
        resume(toy_checkpoint, cut_off)


def test_other_weights_before_the_step_are_refused(cut_off, toy_checkpoint) -> None:
    file = next(cut_off.with_name("out.partial").glob("*-weights/start.json"))
    file.write_text('"0"')
    with pytest.raises(ValueError, match="begun with other weights"):
        resume(toy_checkpoint, cut_off)


def test_a_layer_that_is_not_whole_is_computed_again(cut_off, whole, toy_checkpoint) -> None:
    """Files are complete or absent; what else lies there, such as one cut off while it was written, is passed over."""
    step = next(cut_off.with_name("out.partial").glob("*-weights"))
    (step / ".layer-0001.safetensors").write_bytes(b"half")
    (step / "layer-0001.safetensors").write_bytes(b"written, but not what the next layer begins with")
    resume(toy_checkpoint, cut_off)
    assert files_of(cut_off) == whole


def test_nothing_to_resume(toy_checkpoint, tmp_path: Path) -> None:
    quad_modifiers.oneshot(
        toy_checkpoint("llama"), recipe_text("corrected"), output_dir=tmp_path / "out", resume=True, **SETTINGS
    )
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="output_dir of that run"):
        quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("corrected"), resume=True, **SETTINGS)


def test_nothing_finished_leaves_nothing(toy_checkpoint, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        CutOff(patched, 1, after=False)
        with pytest.raises(KeyboardInterrupt):
            quad_modifiers.oneshot(
                toy_checkpoint("llama"), recipe_text("corrected"), output_dir=tmp_path / "new" / "out", **SETTINGS
            )
    assert list(tmp_path.iterdir()) == []


def test_something_else_of_that_name_is_left_alone(toy_checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no unfinished run"):
        quad_modifiers.oneshot(
            toy_checkpoint("llama"), recipe_text("corrected"), output_dir=tmp_path / "out", **SETTINGS
        )
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def test_two_at_once(cut_off, toy_checkpoint) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (cut_off.with_name("out.partial") / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another process works in"):
            resume(toy_checkpoint, cut_off)
        hidden = cut_off.with_name(".out.01234567")  # which the other process is filling
        hidden.mkdir()
        note_saving(cut_off.with_name("out.partial"), hidden, is_complete=False)
        with pytest.raises(FileExistsError, match="another process works in"):
            resume(toy_checkpoint, cut_off)
        assert hidden.is_dir()


def test_a_full_disk_does_not_end_the_run(
    toy_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is lost, the run is not."""
    from quad_modifiers.journal import durable

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    monkeypatch.setattr(durable, "save_file", full)
    with caplog.at_level(logging.WARNING, logger="quad_modifiers"):
        quad_modifiers.oneshot(
            toy_checkpoint("llama"), recipe_text("corrected"), output_dir=tmp_path / "out", **SETTINGS
        )
    assert caplog.text.count("could not be resumed from here") == 1
    assert "No space left" in caplog.text
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up(whole, toy_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers before that are kept; the file that was being written leaves nothing."""
    from quad_modifiers.journal import durable

    real, count = durable.save_file, 0

    def fill(tensors: Any, file: Path, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:  # the result of the third layer, but not what the next one begins with
            Path(file).write_bytes(b"some")
            raise OSError(28, "No space left on device")
        real(tensors, file, *arguments)

    monkeypatch.setattr(durable, "save_file", fill)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quad_modifiers.compression.complete_checksums", None)  # the disk is full at the end, too
        with pytest.raises(TypeError):
            resume(toy_checkpoint, tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert not [file for file in partial.rglob("*") if file.is_file() and file.read_bytes() == b"some"]
    assert [len(list(step.glob("layer-*"))) for step in sorted(partial.glob("0*"))] == [2, 1]
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patched:
        rest = CutOff(patched)
        resume(toy_checkpoint, tmp_path / "out")
    assert rest.count == 2  # of the first of the weights' layers only the result was kept
    assert files_of(tmp_path / "out") == whole


def test_a_full_disk_at_the_end_loses_nothing(whole, toy_checkpoint, tmp_path: Path) -> None:
    """What the checkpoint could not be written for, the next run finds."""
    from quad_modifiers import compression

    with pytest.MonkeyPatch.context() as patched:

        def full(folder: Path) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(compression, "complete_checksums", full)
        with pytest.raises(OSError, match="No space left"):
            resume(toy_checkpoint, tmp_path / "out")
    assert {each.name for each in tmp_path.iterdir()} == {"out.partial"}
    with pytest.MonkeyPatch.context() as patched:
        rest = CutOff(patched)
        resume(toy_checkpoint, tmp_path / "out")
    assert rest.count == 0
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "existing folder"])
@pytest.mark.parametrize("moved", [False, True], ids=["before the move", "half moved"])
def test_cut_off_while_the_files_are_moved(exists: bool, moved: bool, whole, cut_off, toy_checkpoint) -> None:
    """Killed, so that nothing tidies up: the hidden folder is complete, and its files are on their way or not."""
    from quad_modifiers import output_folder

    output = cut_off
    if exists:
        output.mkdir()

    real = output_folder.put_in_place

    def killed(temporary: Path, folder: Path, besides: Any = ()) -> None:
        if folder != output:
            real(temporary, folder, besides)
            return
        if moved and exists:
            some = sorted(temporary.iterdir())[0]
            some.rename(output / some.name)
        elif moved:
            temporary.rename(output)
        raise SystemExit  # what would tidy up is below this

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output_folder, "put_in_place", killed)
        with pytest.raises(SystemExit):
            resume(toy_checkpoint, output)
    with pytest.raises(ValueError, match="had another recipe; it had finished, and its checkpoint is in"):
        resume(toy_checkpoint, output, recipe=recipe_text("rounded"))
    with pytest.MonkeyPatch.context() as patched:
        rest = CutOff(patched)
        resume(toy_checkpoint, output)
    assert rest.count == 0
    assert files_of(output) == whole
    assert [each.name for each in output.parent.iterdir()] == ["out"]


def test_in_a_folder_whose_parent_cannot_be_written(
    interrupted, whole, toy_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a volume is mounted: what is finished is kept inside."""
    output = tmp_path / "out"
    shutil.copytree(interrupted, output / "out.partial")
    monkeypatch.setattr(unfinished, "may_write", lambda path: path != tmp_path)
    resume(toy_checkpoint, output)
    assert files_of(output) == whole
