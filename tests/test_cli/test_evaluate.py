"""`quad eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.evaluation.cache import CACHE_VARIABLE

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
        (("./nowhere",), 2, "there is no folder ./nowhere"),
        (("{model}", "--limit", "0"), 2, "--limit"),
        (("{model}", "--no-perplexity", "--tasks", ","), 2, "nothing to measure"),
        (("{model}", "--perplexity", "nowhere.txt"), 2, "nowhere.txt"),
        (("{model}", "--tasks", "quad_code,quad_code", "--no-perplexity"), 2, "more than once"),
    ],
)
def test_bad_input(quad, model: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = quad("eval", *(each.format(model=model) for each in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.splitlines()[-1].startswith("error: ")


def test_offline_adds_the_offline_tasks(quad, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def stop(_: object, tasks: list[str], *__: object, **___: object) -> None:
        asked.append(tasks)
        raise RuntimeError("enough")

    monkeypatch.setattr("quad_modifiers.evaluation.evaluator.evaluate", stop)
    for options in ((), ("--offline",), ("--tasks", "piqa, arc_easy"), ("--tasks", "piqa,quad_code", "--offline")):
        assert quad("eval", model, *options).code == 1
    offline = ["quad_lastword", "quad_continuation", "quad_code", "quad_wordppl"]
    assert asked == [offline, offline, ["piqa", "arc_easy"], ["piqa", "quad_code", *offline[:2], offline[3]]]
