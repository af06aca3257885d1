"""The whole: a model and its baseline, tasks and perplexity, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("gensim")

from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.records.evaluation_record import EVALUATION_NAME, Evaluation, task_scores, write_evaluation
from quad_modifiers.tools.evaluation import evaluate, evaluator
from quad_modifiers.tools.publishing import read_evaluation

TASKS = ["quad_continuation", "quad_wordppl"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Model and task of everything that is measured."""
    made: list[tuple[str, str]] = []
    run_task, perplexity = evaluator.run_task, evaluator.perplexity

    def counted_run(lm: Any, task: Any, *rest: Any) -> Any:
        made.append((Path(lm.pretrained).name, task.name))
        return run_task(lm, task, *rest)

    def counted_perplexity(model: Any, windows: Any) -> Any:
        made.append((Path(model.name_or_path).name, "perplexity"))
        return perplexity(model, windows, progress=False)

    monkeypatch.setattr(evaluator, "run_task", counted_run)
    monkeypatch.setattr(evaluator, "perplexity", counted_perplexity)
    return made


def test_a_checkpoint_beside_its_original(
    quad_checkpoint: Path, toy_checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    found = evaluate(quad_checkpoint, TASKS, toy_checkpoint("llama"), limit=4, text=text, window_length=32, seed=3)
    assert found.baseline == toy_checkpoint("llama").name
    choice, words = found.comparisons
    assert (choice.task, choice.metric, choice.items, choice.chance) == ("quad_continuation", "acc_norm", 4, 0.25)
    assert choice.value == found.results["quad_continuation"]["acc_norm,none"]
    assert choice.baseline == found.baseline_results["quad_continuation"]["acc_norm,none"]
    assert choice.difference == choice.value - choice.baseline
    assert (words.task, words.metric, words.chance, words.items) == ("quad_wordppl", "word_perplexity", None, 4)
    assert words.value == pytest.approx(found.results["quad_wordppl"]["word_perplexity,none"])
    assert found.average is None  # a single accuracy
    (perplexity,) = found.perplexity
    assert (perplexity.text, perplexity.window_length, perplexity.tokens) == ("text.txt", 32, 4 * 31)
    low, high = perplexity.ratio_interval
    assert low < perplexity.value / perplexity.baseline < high
    assert (found.limit, found.seed, found.n_shot["quad_continuation"]) == (4, 3, 0)
    assert found.packages["lm-eval"]
    write_evaluation(found, tmp_path / EVALUATION_NAME)
    assert read_evaluation(tmp_path) == found
    assert {score.metric for score in task_scores(found)} == {"acc", "acc_norm", "word_perplexity", "bits_per_byte"}


def test_an_interrupted_run_goes_on_where_it_stopped(
    toy_checkpoint: Any, text: Path, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, original = toy_checkpoint("llama"), toy_checkpoint("llama", seed=1)
    settings = {"limit": 2, "text": text, "window_length": 32}
    counted = evaluator.run_task

    def interrupted(lm: Any, task: Any, *rest: Any) -> Any:
        if lm.pretrained == str(original):
            raise KeyboardInterrupt
        return counted(lm, task, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "run_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, TASKS, original, **settings)
    every = [*TASKS, "perplexity"]
    assert calls == [(model.name, what) for what in every]
    calls.clear()
    first = evaluate(model, TASKS, original, **settings)
    assert calls == [(original.name, what) for what in every]
    calls.clear()
    assert evaluate(model, TASKS, original, **settings) == first
    assert calls == []
    evaluate(model, TASKS[:1], **{**settings, "limit": 3, "text": None})
    assert calls == [(model.name, TASKS[0])]
    calls.clear()
    assert evaluate(model, TASKS, original, **settings, fresh=True) == first
    assert len(calls) == 6


def test_a_changed_model_is_measured_again(make_toy: Any, toy_tokenizer: Any, tmp_path: Path, calls: list) -> None:
    found = []
    for seed in (0, 1):
        make_toy("llama", seed=seed).save_pretrained(tmp_path / "model")
        toy_tokenizer.save_pretrained(tmp_path / "model")
        found.append(evaluate(tmp_path / "model", ["quad_wordppl"], limit=2, text=None))
    assert len(calls) == 2
    assert found[0].comparisons[0].value != found[1].comparisons[0].value


def test_a_model_in_memory(make_toy: Any, toy_tokenizer: Any, toy_checkpoint: Any, kept: Path) -> None:
    settings = {"limit": 2, "text": None}
    in_memory = evaluate(make_toy("llama"), ["quad_wordppl"], tokenizer=toy_tokenizer, **settings)
    assert not kept.exists()
    from_folder = evaluate(toy_checkpoint("llama"), ["quad_wordppl"], **settings)
    assert in_memory.comparisons == from_folder.comparisons


def test_other_tokenizers_have_no_perplexity_in_common(
    make_toy: Any, toy_tokenizer: Any, toy_checkpoint: Any, text: Path, tmp_path: Path, caplog: Any
) -> None:
    make_toy("llama").save_pretrained(tmp_path / "other")
    other = toy_tokenizer.train_new_from_iterator([text.read_text()], 300, show_progress=False)
    other.save_pretrained(tmp_path / "other")
    found = evaluate(toy_checkpoint("llama"), [], tmp_path / "other", limit=2, text=text, window_length=16)
    assert found.perplexity[0].baseline is None
    assert "tokenizers differ" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"limit": 0}, ValueError, "limit must be at least 1, not 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": -1}, ValueError, "seed must not be negative, not -1"),
        ({"tasks": "quad_code"}, TypeError, r"write \['quad_code'\]"),
        ({"tasks": [], "text": None}, ValueError, "nothing to measure"),
        ({"model": "./nowhere"}, FileNotFoundError, r"there is no model folder \./nowhere"),
        ({"text": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
        ({"window_length": 1}, ValueError, "at least 2 tokens, not 1"),
        ({"windows": 10**6}, ValueError, "lower the number of windows"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(toy_checkpoint: Any, text: Path, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(**{"model": toy_checkpoint("llama"), "text": text, **arguments})


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        evaluate(tmp_path)


def test_results_of_groups_and_what_is_no_metric_can_be_read() -> None:
    results = {"mmlu": {"alias": "mmlu", "sample_len": 3, "sample_count": {"acc,none": 3}, "acc,none": 0.5}}
    found = Evaluation(format_version=1, results=results)
    assert [score.metric for score in task_scores(found)] == ["acc"]


@pytest.mark.slow
def test_full_precision_scores_between_guessing_and_certainty(smollm2: Path) -> None:
    options = LoadingOptions(dtype="float32")  # bfloat16 is slow on many CPUs
    found = evaluate(
        smollm2, ["quad_lastword", "quad_continuation", "quad_code"], limit=100, text=None, options=options
    )
    for each in found.comparisons:
        print(each.task, each.value, each.stderr)
        assert each.chance + 0.2 < each.value < 0.9


def test_a_model_in_memory_and_the_process_are_left_as_they_were(make_toy, toy_tokenizer, text: Path) -> None:
    model, before = make_toy().train(), torch.get_rng_state()
    evaluate(model, ["quad_wordppl"], limit=2, text=text, window_length=32, tokenizer=toy_tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_a_text_with_tokens_that_the_model_does_not_embed(make_toy, toy_tokenizer, text: Path, calls) -> None:
    with pytest.raises(ValueError, match=r"the text, tokenized for .*, has the token id .* embeds the ids 0 to 99"):
        evaluate(make_toy(vocab_size=100), [], text=text, window_length=32, tokenizer=toy_tokenizer)
    assert not calls


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_processor_without_bfloat16_is_told_of_float32(
    fast, make_toy, toy_tokenizer, text: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("quad_modifiers.tools.evaluation.subject.fast_dtype", lambda device: fast)
    folder = tmp_path / "original"
    make_toy(dtype=torch.bfloat16).save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    for dtype, hinted in (("auto", fast == torch.float32), ("float32", False)):
        caplog.clear()
        options = LoadingOptions(dtype=dtype)
        evaluate(folder, [], limit=1, text=text, window_length=32, options=options, fresh=True)
        assert ("--dtype float32" in caplog.text) == hinted
