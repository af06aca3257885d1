import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import quad_modifiers
from quad_modifiers.tools.demo import demonstrate as demo
from quad_modifiers.tools.demo.token_speed import SpeedTask

SPEED = SpeedTask(prompt=24, context=8, new=4, runs=1)


@pytest.fixture
def compressed(monkeypatch):
    """Stand in for the compression: copies the model; the list says how often."""
    calls = []

    def oneshot(model, recipe, output_dir):
        calls.append(recipe)
        shutil.copytree(model, output_dir)

    monkeypatch.setattr(quad_modifiers, "oneshot", oneshot, raising=False)
    return calls


def test_run_compares_and_reuses(toy_checkpoint, toy_tokenizer, compressed, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "toy"
    shutil.copytree(toy_checkpoint("llama"), folder)
    toy_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    toy_tokenizer.save_pretrained(folder)
    toy_tokenizer.chat_template = None
    monkeypatch.setattr(demo, "held_out_prose", lambda: ["Held-out text about bridges. " * 20])

    demo.run("smollm2", folder, "some.yaml", tmp_path / "out", window_length=16, window_count=2, speed_task=SPEED)
    report = capsys.readouterr().out
    assert "ratio 1.000" in report
    assert "from      its PyPI package, dequantized from about 4 bits" in report
    assert "2 windows of 16 tokens of held-out Wikipedia articles of gensim" in report
    assert "layers 1.00x smaller" in report
    assert "peak memory" in report
    assert "decode, tokens per second: 4 tokens after 8\n" in report
    assert "prefill, tokens per second: 24 tokens at once\n" in report

    demo.run("smollm2", folder, "some.yaml", tmp_path / "out", window_length=16, window_count=2, speed_task=SPEED)
    assert compressed == ["some.yaml"]
    assert "reused" in capsys.readouterr().out


@pytest.mark.parametrize(("fast", "seen"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_the_original_runs_in_the_dtype_that_this_processor_is_fast_in(
    toy_checkpoint, toy_tokenizer, compressed, monkeypatch, tmp_path, capsys, fast, seen
):
    folder = tmp_path / "toy"
    AutoModelForCausalLM.from_pretrained(toy_checkpoint("llama"), dtype=torch.bfloat16).save_pretrained(folder)
    toy_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    toy_tokenizer.save_pretrained(folder)
    toy_tokenizer.chat_template = None
    monkeypatch.setattr(demo, "held_out_prose", lambda: ["Held-out text about bridges. " * 20])
    monkeypatch.setattr("quad_modifiers.checkpoint.whole_model.fast_dtype", lambda device: fast)
    demo.run("smollm2", folder, "some.yaml", tmp_path / "out", window_length=16, window_count=2, speed_task=SPEED)
    assert f"before in {seen}\n" in capsys.readouterr().out


def test_force_replaces_only_when_complete(toy_checkpoint, compressed, monkeypatch, tmp_path):
    output = tmp_path / "out"
    original = toy_checkpoint("llama")
    demo.compress(original, "a", output, force=False)
    (output / "old").touch()
    demo.compress(original, "b", output, force=True)
    assert not (output / "old").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def fail(**arguments):
        raise ValueError("no")

    monkeypatch.setattr(quad_modifiers, "oneshot", fail)
    with pytest.raises(ValueError, match="no"):
        demo.compress(original, "c", output, force=True)
    assert (output / "config.json").is_file()


def test_force_leaves_the_folder_itself(toy_checkpoint, compressed, tmp_path):
    """It may be a link to another disk, or a mount point."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    original = toy_checkpoint("llama")
    for recipe in ("a", "b"):
        demo.compress(original, recipe, tmp_path / "out" / "deep", force=True)
        (tmp_path / "out" / "deep" / "old").mkdir(exist_ok=True)
    before = (tmp_path / "disk" / "deep").stat().st_ino
    demo.compress(original, "c", tmp_path / "out" / "deep", force=True)
    assert (tmp_path / "disk" / "deep").stat().st_ino == before
    assert not (tmp_path / "disk" / "deep" / "old").exists()
    assert (tmp_path / "out" / "deep" / "config.json").is_file()


@pytest.mark.parametrize("with_older", [False, True])
def test_a_demonstration_that_was_killed_starts_again(toy_checkpoint, compressed, tmp_path, caplog, with_older):
    original, output = toy_checkpoint("llama"), tmp_path / "out"
    if with_older:
        demo.compress(original, "a", output, force=False)
    for left in (".new", ".new.partial", "..new.0123abcd"):
        (output / left).mkdir(parents=True)
        (output / left / "run.json").touch()
    with caplog.at_level("INFO", logger="quad_modifiers"):
        demo.compress(original, "b", output, force=True)
    assert compressed[-1] == "b"
    assert sorted(entry.name for entry in output.iterdir()) == sorted(entry.name for entry in original.iterdir())
    assert "cut off" in caplog.text


@pytest.mark.parametrize("name", ["mine.txt", ".news", ".new.txt", "..new.mine"])
def test_a_folder_that_is_no_checkpoint_is_never_replaced(toy_checkpoint, compressed, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        demo.compress(toy_checkpoint("llama"), "a", tmp_path, force=True)
    assert not compressed
