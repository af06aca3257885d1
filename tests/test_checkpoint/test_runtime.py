"""What transformers users do with a loaded model: batches, caches, compilation, placement, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear

PROMPTS = [[5, 17, 40, 8, 21, 30], [90, 12, 77]]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def loaded(compressed) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(compressed.folder).eval()


def packed_linears(model: PreTrainedModel) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_the_kernels_have_their_layout_after_loading(loaded) -> None:
    """The memory of the unpacking is needed once, while loading, and not at the first request."""
    assert len(packed_linears(loaded)) == 14
    assert all(module.weight_packed.numel() == 0 for module in packed_linears(loaded))
    containers = [module for module in loaded.modules() if isinstance(module, QuadLinear)]
    assert all(container.input_quantization is not None for container in containers)
    assert all(container.residual.input_quantization == container.input_quantization for container in containers)


def test_batch_with_padding_generates_what_each_prompt_does_alone(loaded) -> None:
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    together = loaded.generate(padded, attention_mask=mask, **NEW)[:, longest:]
    alone = [loaded.generate(torch.tensor([prompt]), **NEW)[0, len(prompt) :] for prompt in PROMPTS]
    assert torch.equal(together, torch.stack(alone))


def test_padding_and_batching_do_not_change_the_logits(loaded, compressed) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        wanted = loaded(prompt).logits
        batched = loaded(prompt.expand(5, -1)).logits
    torch.testing.assert_close(batched, wanted.expand(5, -1, -1), rtol=1e-4, atol=1e-4)


def test_static_cache(loaded) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    wanted = loaded.generate(prompt, **NEW)
    assert torch.equal(loaded.generate(prompt, cache_implementation="static", disable_compile=True, **NEW), wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(loaded, compressed, logits_of, backend: str) -> None:
    torch._dynamo.reset()
    if backend == "inductor":
        pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    loaded.forward = torch.compile(loaded.forward, fullgraph=True, backend=backend)
    logits = logits_of(loaded)
    if backend == "aot_eager":
        assert torch.equal(logits, compressed.logits)
    # Fusing changes the rounding before a quantizer, which moves values from one grid point to the next.
    assert float((logits - compressed.logits).norm() / compressed.logits.norm()) < 0.15


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(device_map, compressed, logits_of) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, device_map=device_map)
    assert torch.equal(logits_of(model), compressed.logits)


@pytest.mark.parametrize("buffers", [False, True])
def test_layers_offloaded_to_disk(buffers, compressed, logits_of, tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        compressed.folder, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=buffers
    )
    for _ in range(2):
        assert torch.equal(logits_of(model), compressed.logits)
    offloaded = packed_linears(model.model.layers[1])
    assert all(module.weight_scale.is_meta == buffers for module in offloaded)
    assert all((module._prepared is None) == buffers for module in offloaded), "nothing stays in memory"


def test_saved_after_use_it_is_the_same_checkpoint(loaded, compressed, logits_of, tmp_path: Path) -> None:
    logits_of(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), compressed.logits)
    assert torch.equal(logits_of(loaded), compressed.logits), "saving must not disturb the model"


@pytest.mark.parametrize("name", ["onednn", "reference"])
def test_a_forced_backend_computes_the_same(name: str, compressed, logits_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAD_KERNELS", name)
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    logits = logits_of(model)
    assert float((logits - compressed.logits).norm() / compressed.logits.norm()) < 0.15
    layer = next(module for module in model.modules() if isinstance(module, QuadLinear))
    assert f"kernels={name}" in repr(layer)


def test_a_backend_that_cannot_run_is_an_error_at_load(compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAD_KERNELS", "warp-drive")
    with pytest.raises(RuntimeError, match="there is no kernel backend 'warp-drive'"):
        AutoModelForCausalLM.from_pretrained(compressed.folder)
