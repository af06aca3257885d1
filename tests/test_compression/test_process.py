"""A run and its process: neither gets anything of the other, nor does a model of one that came before."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")
from quad_modifiers import oneshot
from quad_modifiers.model.rotary import restore_frequencies
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 8}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {sweeps: 1, error_correction: 0.4}
"""
IDS = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))


def compress(model: Any, recipe: Any = RECIPE, **arguments: Any) -> Any:
    return oneshot(
        model, recipe, **{"dataset": IDS, "num_calibration_samples": 8, "max_seq_length": IDS.shape[1], **arguments}
    )


def logits(model: Any, ids: torch.Tensor = IDS[:2]) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def frequencies(model: Any) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq.clone()


def same(first: Any, second: Any) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_is_saved_with_its_own_recipe(make_toy, tmp_path: Path) -> None:
    first = compress(make_toy(num_hidden_layers=1))
    compress(make_toy(num_hidden_layers=1), RECIPE.replace("{rank: 8,", "{rank: 16,"))
    first.save_pretrained(tmp_path / "first")
    text = (tmp_path / "first" / "recipe.yaml").read_text()
    assert all(line in text for line in (" rank: 8\n", "DynamicActQuant:", "OutlierSplitGPTQ:"))
    assert " rank: 16\n" not in text


def test_modifier_objects_work_on_one_model_after_the_other(make_toy) -> None:
    recipe = [SVDOutlierProjection(rank=8), OutlierSplitGPTQ(sweeps=1)]
    found = [compress(make_toy(num_hidden_layers=1), recipe) for _ in range(2)]
    assert same(*found)
    assert not any(modifier.initialized for modifier in recipe)


def test_a_cast_does_not_stay_in_the_rotary_frequencies(make_toy, tmp_path: Path, caplog) -> None:
    ids = torch.randint(3, 320, (1, 300), generator=torch.Generator().manual_seed(4))
    wanted = frequencies(make_toy())
    model = make_toy(num_hidden_layers=1).to(torch.bfloat16)
    assert not torch.equal(frequencies(model).float(), wanted)
    compressed = compress(model, output_dir=tmp_path / "out")
    assert torch.equal(frequencies(compressed), wanted)
    assert "model.rotary_emb had other rotary frequencies" in caplog.text
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), logits(compressed, ids))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_a_long_text_does_not_stay_in_the_rotary_frequencies(rope, make_toy, tmp_path: Path, caplog) -> None:
    model = make_toy(num_hidden_layers=1, max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    wanted = frequencies(model)
    long = torch.randint(3, 320, (8, 160), generator=torch.Generator().manual_seed(4))
    logits(model, long[:1])
    assert not torch.equal(frequencies(model), wanted)
    compressed = compress(model, dataset=long, max_seq_length=160, output_dir=tmp_path / "out")
    assert torch.equal(frequencies(compressed), wanted)
    assert caplog.text.count("had other rotary frequencies") == 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for length in (40, 100, 160, 40):
        assert torch.equal(logits(reloaded, long[:1, :length]), logits(compressed, long[:1, :length]))


def test_frequencies_that_are_right_stay(make_toy, caplog) -> None:
    model = make_toy(dtype=torch.bfloat16)
    before = frequencies(model)
    restore_frequencies(model)
    assert torch.equal(frequencies(model), before)
    assert not caplog.records


@contextmanager
def odd_process() -> Iterator[None]:
    """Settings that another part of a program may have made."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_settings_of_the_process_do_not_get_into_a_checkpoint(make_toy) -> None:
    wanted = compress(make_toy(num_hidden_layers=1))
    model = make_toy(num_hidden_layers=1)
    with odd_process():
        found = compress(model)
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert same(found, wanted)


def process_state() -> dict[str, Any]:
    import numpy

    return {
        "python": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in ("", "transformers", "datasets", "quad_modifiers")},
    }


def test_a_run_leaves_the_process_as_it_was(make_toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # llm-compressor sets it
    model = make_toy(num_hidden_layers=1)
    compress(make_toy(num_hidden_layers=1))  # what importing libraries for the first time changes is theirs
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    before = process_state()
    model = compress(model)
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []
    assert model.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tuning_leaves_the_cache_on(make_toy, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    recipe = RECIPE + "    OutlierLoRA: {epochs: 0.5, batch_size: 2, validation: 0.3}\n"
    model = make_toy(num_hidden_layers=1)
    before = process_state()
    compress(model, recipe, output_dir=tmp_path / "out")
    after = process_state()
    assert [name for name in ("python", "torch", "numpy", "levels") if before[name] != after[name]] == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache
