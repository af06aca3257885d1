"""Blocks in few launches, as on a GPU: the stock block's numbers, and when they run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quad_kernels import block as launched
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from quad_modifiers.nn.native_block import NativeBlock

BRANCHES = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    LowRankBranch: {rank: 6, rounds: 1, ignore: [lm_head, k_proj]}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {method: rtn}
"""


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns few launches on, on the reference (`tests/test_kernels/test_block.py` has Triton); not for compression."""

    def choose() -> None:
        monkeypatch.setenv("QUAD_KERNELS", "reference")
        monkeypatch.setenv(launched.VARIABLE, "1")

    return choose


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that were made."""
    seen: list[str] = []
    for name in ("block_in", "block_out"):
        function = getattr(launched, name)

        def note(*args: Any, name: str = name, function: Callable[..., Any] = function) -> Any:
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(launched, name, note)
    return seen


def blocks(model: PreTrainedModel) -> list[NativeBlock]:
    return [module for module in model.modules() if isinstance(module, NativeBlock)]


def check(layer: NativeBlock, x: torch.Tensor, arguments: dict[str, Any], calls: list[str]) -> None:
    """The hidden states of a block are those of its stock forward, which runs while somebody listens inside."""
    past = arguments.pop("past_key_values", None)
    calls.clear()
    own = layer(x, past_key_values=copy.deepcopy(past), **arguments)
    assert calls == ["block_in", "block_out"]
    hook = layer.mlp.register_forward_hook(lambda module, args, output: None)
    wanted = layer(x, past_key_values=copy.deepcopy(past), **arguments)
    hook.remove()
    assert calls == ["block_in", "block_out"]
    # A sum in another order puts an input on the other side of a rounding boundary, now and then.
    assert float((own - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "branches"])
def test_a_block_gives_the_hidden_states_of_the_stock_one(
    kind: str, choose: Callable[[], None], calls: list[str], compress_toy: Callable[..., Any]
) -> None:
    folder = compress_toy(BRANCHES).folder if kind == "branches" else compress_toy(model_type=kind).folder
    choose()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(blocks(model)) == 2
    generator = torch.Generator().manual_seed(0)
    for batch, positions in ((1, 1), (2, 3)):
        past = DynamicCache(config=model.config)
        prompt = torch.randint(3, 300, (batch, 5), generator=generator)
        with torch.no_grad():
            model(prompt, past_key_values=past, use_cache=True)
            x = torch.randn(batch, positions, model.config.hidden_size, generator=generator)
            angles = model.model.rotary_emb(x, torch.arange(5, 5 + positions)[None])
            for layer in blocks(model):
                arguments = {"position_embeddings": angles, "use_cache": True, "past_key_values": past}
                check(layer, x, arguments, calls)


def test_it_is_off_by_default_and_not_for_training(
    choose: Callable[[], None], calls: list[str], compressed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose()
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([[5, 17, 40, 8]])
    model(prompt, use_cache=False)  # the embedding can be trained
    assert calls == []
    with torch.no_grad():
        own = model(prompt, use_cache=False).logits
        assert calls == ["block_in", "block_out"] * 2
        monkeypatch.delenv(launched.VARIABLE)
        wanted = model(prompt, use_cache=False).logits
    assert len(calls) == 4
    assert float((own - wanted).norm() / wanted.norm()) < 2e-2
