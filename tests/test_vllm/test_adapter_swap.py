"""Outlier adapters that come and go while `vllm serve` runs, over HTTP."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .random_adapters import random_adapters
from .server_process import Server, serve

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

PROMPT = "The capital of France is Paris, and the capital of Italy is"
BASE = "base"


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path | None, torch.Tensor]]:
    """The base and two adapters of random values, with the log-probabilities of the prompt in transformers."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(PROMPT)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = _log_probabilities(model, ids)
    folder = tmp_path_factory.mktemp("adapters")
    return {BASE: (None, plain), **random_adapters(model, folder, 0.02, lambda each: _log_probabilities(each, ids))}


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The checkpoint with room for two adapters; on the CPU, vLLM wants one slot more."""
    options = ["--served-model-name", BASE, "--max-model-len", "256", "--dtype", "float32"]
    options += ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "128"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(checkpoint, log, options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True") as running:
        yield running


def _post(server: Server, what: str, **content: str) -> None:
    request = urllib.request.Request(
        f"{server.address}/v1/{what}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


def _served(server: Server, name: str) -> torch.Tensor:
    answer = server.client.completions.create(
        model=name, prompt=PROMPT, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    positions = answer.choices[0].prompt_logprobs[1:]
    return torch.tensor([next(iter(position.values()))["logprob"] for position in positions])


def _who_answers(server: Server, name: str, expected: dict[str, tuple[Path | None, torch.Tensor]]) -> str:
    """Return whose log-probabilities in transformers those served under a name are.

    A 4-bit model amplifies the last bit in which two runtimes differ, so they are not equal (on toys they are, see
    test_engine.py), but the adapters are far apart.
    """
    served = _served(server, name)
    distances = {each: float((served - wanted).abs().median()) for each, (_, wanted) in expected.items()}
    nearest, next_nearest = sorted(distances, key=lambda each: distances[each])[:2]
    assert distances[nearest] < 0.3 * distances[next_nearest], distances
    return nearest


def test_adapters_come_and_go(server: Server, expected: dict[str, tuple[Path | None, torch.Tensor]]) -> None:
    from openai import NotFoundError

    assert _who_answers(server, BASE, expected) == BASE
    for name in ("first", "second"):
        with pytest.raises(NotFoundError):
            _served(server, name)
        _post(server, "load_lora_adapter", lora_name=name, lora_path=str(expected[name][0]))
        assert _who_answers(server, name, expected) == name
    assert _who_answers(server, "first", expected) == "first"  # still there beside the second
    _post(server, "unload_lora_adapter", lora_name="first")
    with pytest.raises(NotFoundError):
        _served(server, "first")
    _post(server, "load_lora_adapter", lora_name="third", lora_path=str(expected["first"][0]))
    assert [_who_answers(server, name, expected) for name in ("third", "second", BASE)] == ["first", "second", BASE]
