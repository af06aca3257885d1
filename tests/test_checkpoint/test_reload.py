"""A reloaded checkpoint computes what the model computed in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

import quad_modifiers
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.recipe import builtin_recipe_folder

RECIPES = sorted(path.stem for path in builtin_recipe_folder().glob("*.yaml"))
# Saved as plain compressed-tensors, whose own forward pass rounds elsewhere.
PLAIN = ("rtn_w4a4", "quad_w4a4_portable")
ROOT = Path(quad_modifiers.__file__).parents[1]


def recipe_text(name: str) -> str:
    """The published recipe with a rank that suits 84 coordinates."""
    return (builtin_recipe_folder() / f"{name}.yaml").read_text().replace("rank: 64 ", "rank: 12 ")


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PLAIN])
def test_every_recipe_reloads_exactly(name, dtype, compress_toy, logits_of) -> None:
    model_type = ("llama", "mistral", "qwen2", "qwen3")[RECIPES.index(name) % 4]
    size = "even" if name.endswith(("_g32", "fp4")) else "odd"  # groups must divide the widths
    made = compress_toy(recipe_text(name), model_type, size=size, dtype=dtype, tie_word_embeddings=True)
    reloaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert reloaded.dtype == dtype
    assert bool(torch.isfinite(made.logits).all())
    assert torch.equal(logits_of(reloaded), made.logits)
    quantized = [module for module in reloaded.modules() if isinstance(module, QuadLinear)]
    assert len(quantized) == 14
    assert all(isinstance(module.residual, PackedLinear) for module in quantized)


@pytest.mark.parametrize(
    "fields",
    [
        "OutlierSplitGPTQ: {group_size: 8, symmetric: false}",
        "OutlierSplitGPTQ: {bits: 8}",
        "OutlierSplitGPTQ: {bits: 2, method: rtn}",
        'OutlierSplitGPTQ: {ignore: [lm_head, "re:.*down_proj$"]}',
        "DynamicActQuant: {u_type_bits: 3, d_type_bits: null, strategy: group, group_size: 8}",
        "DynamicActQuant: {u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0}",
        "DynamicActQuant: {strategy: group, group_size: 8, sub_scale_bits: 4}",
        "OutlierSplitGPTQ: {group_size: 8, sub_scale_bits: 4}",
        "DynamicActQuant: {u_type_bits: 5, symmetric: false}",
        "DynamicActQuant: {symmetric: false, strategy: group, group_size: 8, d_type_clip_ratio: 1.0}",
        "DynamicActQuant: {symmetric: false, u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0}",
    ],
)
@pytest.mark.parametrize("projection", ["SVDOutlierProjection: {rank: 8}", ""], ids=["projected", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_settings_reload(fields, projection, dtype, compress_toy, logits_of, request) -> None:
    if "symmetric: false" in fields and "GPTQ" in fields and not projection:
        request.getfixturevalue("stock_zero_points")
    recipe = f"quad_stage:\n  quad_modifiers:\n    {projection}\n    {fields}\n"
    made = compress_toy(recipe, "qwen2", dtype=dtype, num_hidden_layers=1, tie_word_embeddings=True)
    reloaded = AutoModelForCausalLM.from_pretrained(made.folder, dtype=dtype)
    config = json.loads((made.folder / "config.json").read_text())
    if config["quantization_config"]["quant_method"] == "quad":
        assert torch.equal(logits_of(reloaded), made.logits)
    else:
        bound = 1e-4 if dtype == torch.float32 else 5e-2
        measured = float((logits_of(reloaded) - made.logits).norm() / made.logits.norm())
        print(f"relative difference {measured:.1e}, bound {bound:.0e}")
        assert measured < bound


SUBPROCESS = """
import sys
if sys.argv[3] == "blocked":
    sys.modules["llmcompressor"] = None
import torch
import quad_modifiers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
if sys.argv[3] == "blocked":
    assert sys.modules["llmcompressor"] is None
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2] + "/ids.pt")).logits, sys.argv[2] + "/logits.pt")
assert "gensim" not in sys.modules and "datasets" not in sys.modules
print(type(model).__name__)
"""


def test_loads_in_a_fresh_process_without_llmcompressor(compressed, tmp_path) -> None:
    from .conftest import PROBE  # the ids behind `compressed.logits`

    torch.save(PROBE, tmp_path / "ids.pt")
    done = run_python(SUBPROCESS, compressed.folder, tmp_path, "blocked")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["QuadLlamaForCausalLM"]
    logits = torch.load(tmp_path / "logits.pt")
    # Another number of threads may sum in another order.
    torch.testing.assert_close(logits, compressed.logits, rtol=1e-3, atol=1e-3)


def test_weights_are_packed_in_memory(compressed) -> None:
    reloaded = AutoModelForCausalLM.from_pretrained(compressed.folder)
    for name, module in reloaded.named_modules():
        if not isinstance(module, QuadLinear):
            continue
        full = module.residual.out_features * module.residual.in_features
        assert dict(module.residual.named_parameters()) == {}, name
        for key, tensor in module.residual.named_buffers():
            assert not tensor.is_floating_point() or tensor.numel() <= full // 8, f"{name}.{key}"
        held = sum(t.numel() * t.element_size() for t in module.residual.buffers())
        assert held <= full // 2 + 4 * module.out_features * 2 + 64
    with torch.no_grad():
        reloaded(torch.tensor([[5, 6]]))
    sizes = [t.numel() for _, t in reloaded.model.layers.named_buffers() if t.is_floating_point()]
    assert max(sizes) <= 128, "a forward pass must not leave an unpacked copy behind"


def test_saved_again_by_save_pretrained(compressed, tmp_path, logits_of) -> None:
    first = AutoModelForCausalLM.from_pretrained(compressed.folder)
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(second), compressed.logits)
    before, after = (load_file(folder / "model.safetensors") for folder in (compressed.folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (compressed.folder, tmp_path / "again"))
    assert new["quantization_config"] == old["quantization_config"]
    assert new["model_type"] == old["model_type"]


def test_saved_again_it_still_fails_loudly_elsewhere(compressed, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(compressed.folder).save_pretrained(tmp_path / "again")
    done = run_python(WITHOUT_US, tmp_path / "again", "LlamaForCausalLM")
    assert "pip install quad-modifiers" in done.stdout, done.stdout + done.stderr


WITHOUT_US = """
import sys, transformers
for name in sys.argv[2:]:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except Exception as error:
        print(name, "RAISED", type(error).__name__, error)
    else:
        print(name, "LOADED")
assert "quad_modifiers" not in sys.modules
"""


def test_without_our_package_it_fails_and_says_what_to_install(compressed) -> None:
    done = run_python(WITHOUT_US, compressed.folder, "AutoModelForCausalLM", "LlamaForCausalLM")
    assert done.returncode == 0, done.stderr
    assert "LOADED" not in done.stdout
    assert done.stdout.count("RAISED") == 2
    auto, _, stock = done.stdout.partition("LlamaForCausalLM RAISED")
    assert "pip install quad-modifiers" in auto
    assert "pip install quad-modifiers" in stock


PLAIN_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2] + "/ids.pt")).logits, sys.argv[2] + "/logits.pt")
assert not [name for name in sys.modules if name.startswith("quad_")]
print(type(model).__name__)
"""


def test_rank_zero_is_plain_compressed_tensors(compress_toy, tmp_path) -> None:
    """The rtn recipe, and a rotation that is folded in: stock transformers loads both."""
    from .conftest import PROBE

    torch.save(PROBE, tmp_path / "ids.pt")
    made = compress_toy(recipe_text("rtn_w4a4"))
    config = json.loads((made.folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "quad" not in config["quantization_config"]
    assert isinstance(config["initializer_range"], float)
    done = run_python(PLAIN_LOAD, made.folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    logits = torch.load(tmp_path / "logits.pt")
    measured = float((logits - made.logits).norm() / made.logits.norm())
    print(f"relative difference {measured:.3f}, bound 0.25 (the largest input of each token lies on a tie of the grid)")
    assert measured < 0.25
    full = float((logits - made.logits.roll(1, 0)).norm() / made.logits.norm())
    assert measured < 0.5 * full


def test_rotation_alone_is_plain_and_exact(compress_toy, logits_of) -> None:
    recipe = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 0, online_rotation: []}
    OutlierSplitGPTQ: {bits: 4}
"""
    made = compress_toy(recipe, "qwen2", tie_word_embeddings=True)
    config = json.loads((made.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["tie_word_embeddings"] is False
    reloaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert type(reloaded).__name__ == "Qwen2ForCausalLM"
    torch.testing.assert_close(logits_of(reloaded), made.logits, rtol=1e-4, atol=1e-4)


def test_projection_alone_needs_us_but_no_quantization(compress_toy, logits_of) -> None:
    made = compress_toy("quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 8}\n")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def test_generation_from_a_checkpoint(compressed) -> None:
    reloaded = AutoModelForCausalLM.from_pretrained(compressed.folder)
    prompt = torch.tensor([[5, 6, 7]])
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(reloaded.generate(prompt, **arguments), compressed.model.generate(prompt, **arguments))


def test_no_quantization_config_means_the_checkpoints_own(compress_toy, logits_of) -> None:
    """Stock transformers loses the config by this argument, and fills the model with random numbers."""
    made = compress_toy()
    again = AutoModelForCausalLM.from_pretrained(made.folder, quantization_config=None)
    assert torch.equal(logits_of(again), made.logits)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM])
def test_other_auto_classes_name_the_one_that_loads_it(auto, quad_checkpoint) -> None:
    with pytest.raises(ValueError, match=rf"{auto.__name__} cannot load it; use AutoModelForCausalLM"):
        auto.from_pretrained(quad_checkpoint)


def test_stock_classes_name_the_one_that_loads_it(quad_checkpoint) -> None:
    with pytest.raises(Exception, match="load it by AutoModelForCausalLM"):
        LlamaForSequenceClassification.from_pretrained(quad_checkpoint)
