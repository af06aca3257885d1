"""`quad eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.records.evaluation_record import Evaluation
from quad_modifiers.tools.console import print_table
from quad_modifiers.tools.evaluation.cache import CACHE_VARIABLE

pytest.importorskip("lm_eval")
pytest.importorskip("gensim")


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))


@pytest.fixture
def model(make_toy: Any, toy_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint that may be written to."""
    make_toy("llama").save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_beside_a_baseline(quad, model: Path, toy_checkpoint: Any, text: Path) -> None:
    tasks = "quad_continuation,quad_code"
    settings = ("--limit", 2, "--tasks", tasks, "--perplexity", text, "--window-length", 32)
    done = quad("eval", model, "--baseline", toy_checkpoint("llama", seed=1), *settings)
    assert done.code == 0, done.err
    for part in ("quad_continuation", "quad_code", "average", "above guessing", "text.txt", f"written to {model}"):
        assert part in done.out
    assert "Running loglikelihood" in done.err
    written = json.loads((model / "evaluation.json").read_text())
    assert [each["task"] for each in written["comparisons"]] == tasks.split(",")
    assert written["average"]["items"] == 4
    again = quad("eval", model, "--baseline", toy_checkpoint("llama", seed=1), *settings)
    assert "quad_code was measured before" in again.err
    assert again.out == done.out


def test_alone(quad, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "results.json"
    done = quad("eval", model, "--limit", 1, "--tasks", "quad_wordppl", "--no-perplexity", "-o", output)
    assert done.code == 0, done.err
    assert "baseline" not in done.out
    assert json.loads(output.read_text())["results"]["quad_wordppl"]
    assert not (model / "evaluation.json").exists()


def test_results_are_not_replaced_by_less(quad, model: Path, text: Path) -> None:
    (model / "evaluation.json").write_text('{"format_version": 1, "results": {"piqa": {"acc,none": 0.5}}}')
    command = ("eval", model, "--limit", 1, "--tasks", "quad_wordppl", "--no-perplexity")
    done = quad(*command)
    assert done.code == 2
    assert "results that this run does not measure: piqa, all items of each task instead of 1;" in done.err
    assert quad(*command, "--overwrite").code == 0
    assert quad(*command).code == 0
    done = quad("eval", model, "--limit", 1, "--tasks", "quad_code", "--no-perplexity")
    assert "does not measure: quad_wordppl;" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("./nowhere",), 2, "there is no model folder ./nowhere"),
        (("{model}", "--limit", "0"), 2, "--limit"),
        (("{model}", "--no-perplexity", "--tasks", ","), 2, "nothing to measure"),
        (("{model}", "--perplexity", "nowhere.txt"), 2, "nowhere.txt"),
        (("{model}", "--tasks", "quad_code,quad_code", "--no-perplexity"), 2, "more than once"),
        (("{model}", "--seed", "-1"), 2, "--seed"),
        (("{model}", "--device", "gpu"), 2, "the device 'gpu' cannot be used"),
        (("{model}", "--device", "cuda:77"), 2, "the device 'cuda:77' cannot be used"),
        (("{model}", "--output", "{model}"), 2, "is a folder; --output is the JSON file"),
        (
            ("{model}", "--output", "{model}/config.json/results.json"),
            2,
            "config.json is a file; choose another output",
        ),
        (("{model}", "--perplexity", "{model}/a.txt", "--no-perplexity"), 2, "give one of the two"),
        (("{model}/typo",), 2, "there is no model folder"),
    ],
)
def test_bad_input(
    quad, model: Path, arguments: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for measuring in ("run_task", "perplexity"):  # nothing is measured before
        monkeypatch.setattr(f"quad_modifiers.tools.evaluation.evaluator.{measuring}", None)
    done = quad("eval", *(each.format(model=model) for each in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_offline_adds_the_offline_tasks(quad, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def stop(_: object, tasks: list[str], *__: object, **___: object) -> None:
        asked.append(tasks)
        raise RuntimeError("enough")

    monkeypatch.setattr("quad_modifiers.tools.evaluation.evaluator.evaluate", stop)
    for options in (
        (),
        ("--offline",),
        ("--tasks", "piqa, arc_easy"),
        ("--tasks", "piqa,quad_code", "--offline"),
        ("--tasks", "quad_offline", "--offline"),
    ):
        assert quad("eval", model, *options).code == 1
    offline = ["quad_lastword", "quad_continuation", "quad_code", "quad_wordppl"]
    assert asked == [
        offline,
        offline,
        ["piqa", "arc_easy"],
        ["piqa", "quad_code", *offline[:2], offline[3]],
        ["quad_offline"],
    ]


def test_what_a_run_must_cover(quad, model: Path, toy_checkpoint: Any, text: Path) -> None:
    baseline = ("--baseline", toy_checkpoint("llama", seed=1))
    command = ("eval", model, "--limit", 2, "--tasks", "", "--perplexity", text, "--window-length")
    assert quad(*command, 32, *baseline).code == 0
    before = (model / "evaluation.json").read_bytes()
    name = toy_checkpoint("llama", seed=1).name
    assert f"does not measure: the baseline {name};" in quad(*command, 32).err
    assert "the perplexity on text.txt in windows of 32;" in quad(*command, 16, *baseline).err
    assert (model / "evaluation.json").read_bytes() == before
    assert quad(*command, 32, *baseline).code == 0


def test_the_group_covers_its_tasks(quad, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quad_modifiers.tools.evaluation.evaluator.evaluate", _enough)
    everything = ["quad_lastword", "quad_continuation", "quad_code", "quad_wordppl"]
    for old, new in (("quad_code", "quad_offline"), ("quad_offline", ",".join(everything))):
        (model / "evaluation.json").write_text(json.dumps({"format_version": 1, "tasks": [old]}))
        assert "enough" in quad("eval", model, "--tasks", new).err


def test_a_failed_write_does_not_take_the_table_along(
    quad, model: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.setattr("quad_modifiers.records.evaluation_record.replace_file", _enough)
    done = quad("eval", model, "--tasks", "", "--perplexity", text, "--window-length", 32, "--limit", 2)
    assert done.code == 1
    assert "text.txt" in done.out


def test_limit_of_a_short_text(quad, model: Path, text: Path) -> None:
    text.write_text(text.read_text()[:2000])
    done = quad("eval", model, "--tasks", "", "--perplexity", text, "--window-length", 32, "--limit", 10_000)
    assert done.code == 0, done.err


def test_text_of_another_column(quad, model: Path, tmp_path: Path, text: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"body": text.read_text()}))
    command = ("eval", model, "--tasks", "", "--perplexity", file, "--window-length", 32, "--limit", 2)
    assert "there is no column 'text'" in quad(*command).err
    assert quad(*command, "--text-column", "body").code == 0


def test_tasks_of_other_metrics_are_shown(quad, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"squad": {"alias": "squad", "f1,none": 0.123}, "piqa": {"acc,none": 0.7, "f1,none": 0.9}}
    found = Evaluation(
        format_version=1, results=results, baseline="org/x", baseline_results={"squad": {"f1,none": 0.25}}
    )
    monkeypatch.setattr("quad_modifiers.tools.evaluation.evaluator.evaluate", lambda *_, **__: found)
    done = quad("eval", model, "--no-perplexity")
    (row,) = [line.split() for line in done.out.splitlines() if "f1" in line]
    assert row == ["squad", "f1", "0.123", "0.250"]


def test_brackets_in_names_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("", "quad[r64]"), [("a", "b")], title="baseline: [/b]")
    shown = capsys.readouterr().out
    assert "quad[r64]" in shown
    assert "baseline: [/b]" in shown


def _enough(*_: object, **__: object) -> None:
    raise RuntimeError("enough")


def test_vllm_that_is_missing(quad, quad_checkpoint: Path) -> None:
    done = quad("eval", quad_checkpoint, "--backend", "vllm", "--no-perplexity")
    assert done.code != 0
    assert "--backend vllm needs vLLM, which this environment lacks" in done.err
    assert done.err.count("\n") == 1
