"""vLLM as what computes: the perplexity from an engine's answers, and what is refused before anything is loaded.

A real engine is in tests/test_vllm.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quad_modifiers.tools.evaluation import evaluate
from quad_modifiers.tools.evaluation.subject import Subject
from quad_modifiers.tools.evaluation.vllm_engine import engine_perplexity
from quad_modifiers.tools.evaluation.window_perplexity import perplexity


class Engine:
    """Answers as `vllm.LLM.generate` does: for each token of a prompt a mapping from ids, with None for the first."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], _settings: Any) -> list[SimpleNamespace]:
        answers = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found = [{ids[i + 1]: SimpleNamespace(logprob=float(logprobs[i, ids[i + 1]]))} for i in range(len(ids) - 1)]
            answers.append(SimpleNamespace(prompt_logprobs=[None, *found]))
        return answers


@pytest.fixture
def settings_of_vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: asked.update(given)))
    return asked


def test_the_engine_s_perplexity_is_that_of_the_model(make_toy, settings_of_vllm) -> None:
    model = make_toy()
    windows = torch.randint(3, 320, (5, 24), generator=torch.Generator().manual_seed(1))
    found, wanted = engine_perplexity(Engine(model), windows), perplexity(model, windows, progress=False)
    assert settings_of_vllm["prompt_logprobs"] == 0
    assert found.tokens == wanted.tokens
    for ours, theirs in (
        (found.value, wanted.value),
        (found.stderr, wanted.stderr),
        (found.window_nll, wanted.window_nll),
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_likelihoods_that_are_not_numbers_are_refused(make_toy, settings_of_vllm) -> None:
    model = make_toy()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite in window 0"):
        engine_perplexity(Engine(model), torch.full((2, 5), 6))


@pytest.mark.skipif("vllm" in sys.modules, reason="vLLM is here")
def test_without_vllm_it_says_so_before_anything_else(quad_checkpoint) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ModuleNotFoundError, match="needs vLLM, which this environment lacks: run it in vLLM's"):
        evaluate(quad_checkpoint, ["no_such_task"], backend="vllm")
    with pytest.raises(ValueError, match="the backend must be transformers or vllm, not 'sglang'"):
        evaluate(quad_checkpoint, backend="sglang")


def test_what_vllm_does_not_take(make_toy, toy_checkpoint) -> None:
    with pytest.raises(TypeError, match="not a model in memory"):
        Subject(make_toy(), backend="vllm")
    with pytest.raises(ValueError, match="leave the device 'cpu' out"):
        Subject(toy_checkpoint("llama"), device="cpu", backend="vllm")
