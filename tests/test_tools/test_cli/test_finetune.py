"""`quad finetune` and `quad merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("peft")

QUICK = ("--seq-length", 32, "--max-steps", 2, "--batch-size", 2, "--evaluations", 2, "--samples", 12)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    lines = [{"text": f"{i}. Seven wizards mixed a jug of black liquid and measured it twice."} for i in range(200)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_finetune_and_merge(quad, quad_checkpoint, toy_checkpoint, records, tmp_path) -> None:
    adapter, merged, again = tmp_path / "adapter", tmp_path / "merged", tmp_path / "again"
    done = quad(
        "finetune",
        quad_checkpoint,
        "--data",
        records,
        "--distill-from",
        toy_checkpoint("llama"),
        "-o",
        adapter,
        "--merge",
        merged,
        "--report-to",
        "none",
        *QUICK,
    )
    assert done.code == 0, done.err
    for line in ("KL to the original", "perplexity of the original", str(adapter), str(merged)):
        assert line in done.out
    for line in (f"wrote {adapter}", "validation samples:"):
        assert line in done.err
    record = json.loads((merged / "tuning.json").read_text())
    assert (record["data"], record["steps"], record["samples"]) == ("text.jsonl", 2, 11)
    done = quad("merge", quad_checkpoint, adapter, "-o", again)
    assert done.code == 0, done.err
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", ["no text field", "not quad", "output exists", "merge exists", "no data"])
def test_bad_input_is_one_line(fault, quad, quad_checkpoint, toy_checkpoint, records, tmp_path) -> None:
    checkpoint, data, options = quad_checkpoint, records, ["-o", tmp_path / "adapter"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    if fault == "no text field":
        records.write_text('{"body": "some text"}\n')
        message = "there is no column 'text'; the columns are 'body'"
    elif fault == "not quad":
        checkpoint, message = toy_checkpoint("llama"), "is no QUAD checkpoint"
    elif fault == "output exists":
        options, message = ["-o", full], "exists and is not empty"
    elif fault == "merge exists":
        options, message = [*options, "--merge", full], "exists and is not empty"
    else:
        data, message = tmp_path / "nowhere.jsonl", "nowhere.jsonl"
    done = quad("finetune", checkpoint, "--data", data, *options, *QUICK)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_folder_that_is_none(quad, quad_checkpoint, tmp_path) -> None:
    done = quad("merge", quad_checkpoint, tmp_path, "-o", tmp_path / "merged")
    assert done.code == 2
    assert "has no adapter_config.json; it is no adapter" in done.err


@pytest.mark.parametrize("command", ["finetune", "merge"])
def test_help_names_the_python_function(quad, command) -> None:
    done = quad(command, "--help")
    assert done.code == 0
    assert f"quad_peft.training.{command}" in done.out
