"""A separately installed distribution contributes a modifier; a broken one beside it only warns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .installed import install, run, search_path

REPORT = """
import json
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import quad_modifiers
    import transformers  # the plugins are loaded now

import torch
from llmcompressor.core import State
from llmcompressor.recipe import Recipe
from quad_modifiers.plugins import PluginWarning, failed_plugins, modifier_paths, plugin_table
from quad_modifiers.recipe import check_recipe, resolve_recipe, validate_recipe

path = resolve_recipe("weight_clip_w4a16")
warnings_of_recipe = check_recipe(path)
recipe = Recipe.create_instance(str(path))
model = torch.nn.Sequential(torch.nn.Linear(64, 4, bias=False))
with torch.no_grad():
    model[0].weight.normal_(generator=torch.Generator().manual_seed(0))[0, 0] = 1000.0
recipe.modifiers[0].initialize(State(model=model))

from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
toy = AutoModelForCausalLM.from_config(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))
with torch.no_grad():
    toy.model.layers[0].mlp.up_proj.weight[0, 0] = 1000.0
compressed = quad_modifiers.oneshot(
    toy,
    "a_stage:\\n  a_modifiers:\\n    WeightClip: {sigmas: 2.0}\\n    SVDOutlierProjection: {rank: 4, rotation: none}\\n"
    "    OutlierSplitGPTQ: {method: rtn}\\n",
    dataset=torch.randint(0, 64, (8, 128), generator=torch.Generator().manual_seed(0)),
    num_calibration_samples=8, max_seq_length=128, output_dir="compressed")
print(json.dumps({
    "distribution": str(modifier_paths()["WeightClip"].distribution),
    "recipe_file": path.name,
    "recipe_problems": [problem.message for problem in warnings_of_recipe],
    "modifiers": [type(modifier).__name__ for modifier in recipe.modifiers],
    "sigmas": recipe.modifiers[0].sigmas,
    "largest_weight": model[0].weight.max().item(),
    "saved": recipe.yaml(),
    "compressed_recipe": Path("compressed/recipe.yaml").read_text(),
    "compressed_largest": compressed.model.layers[0].mlp.up_proj.residual.dequantized(torch.float32).abs().max().item(),
    "warnings": [str(each.message) for each in caught if issubclass(each.category, PluginWarning)],
    "failed": [str(failure) for failure in failed_plugins()],
    "table": {row.distribution: [list(row.contributes), row.failure] for row in plugin_table()},
    "typo": [problem.message + problem.remedy for problem in validate_recipe(
        "a_stage:\\n  a_modifiers:\\n    WeightClip: {sigma: 1}\\n    BrokenModifier: {}\\n")],
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh Python sees in which the example plugin and a broken plugin are installed."""
    folder = tmp_path_factory.mktemp("plugins")
    target = install("example_plugin", folder)
    install_broken_plugin(target)
    output = run([sys.executable, "-c", REPORT], folder, PYTHONPATH=search_path(target))
    loaded: dict[str, Any] = json.loads(output.splitlines()[-1])
    return loaded


def install_broken_plugin(target: Path) -> None:
    """Lay out an installed distribution whose plugin module cannot be imported."""
    (target / "broken_plugin.py").write_text("import surely_not_installed\n", encoding="utf-8")
    info = target / "broken_dist-0.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-dist\nVersion: 0.4\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[quad_modifiers]\nbroken = broken_plugin\n", encoding="utf-8")


def test_modifier_comes_from_the_installed_distribution(report: dict[str, Any]) -> None:
    assert report["distribution"] == "quad-example-plugin 1.2.3"
    contributes = ["modifier WeightClip", "recipe weight_clip_w4a16"]
    assert report["table"]["quad-example-plugin"] == [contributes, None]


def test_its_recipe_is_found_by_name_and_validates(report: dict[str, Any]) -> None:
    assert report["recipe_file"] == "weight_clip_w4a16.yaml"
    assert report["recipe_problems"] == []


def test_llmcompressor_builds_and_runs_it(report: dict[str, Any]) -> None:
    assert report["modifiers"] == ["WeightClip", "QuantizationModifier"]
    assert report["sigmas"] == 5.0
    assert report["largest_weight"] < 1000.0
    assert "WeightClip: {" in report["saved"] or "WeightClip:\n" in report["saved"]


def test_a_recipe_that_mixes_it_with_our_modifiers_compresses_a_model(report: dict[str, Any]) -> None:
    assert "WeightClip" in report["compressed_recipe"]
    assert "OutlierSplitGPTQ" in report["compressed_recipe"]
    assert report["compressed_largest"] < 500.0  # 1000 before the plugin's modifier clipped it


def test_broken_distribution_is_named_and_left_out(report: dict[str, Any]) -> None:
    (warning,) = report["warnings"]
    assert "plugin 'broken' of broken-dist 0.4 failed to import: ModuleNotFoundError" in warning
    assert report["failed"] == [report["table"]["broken-dist"][1]]


def test_recipe_with_typos_names_the_field_and_the_broken_plugin(report: dict[str, Any]) -> None:
    field, name = report["typo"]
    assert "WeightClip has no field 'sigma'" in field
    assert "Did you mean sigmas?" in field
    assert "no modifier is named 'BrokenModifier'" in name
    assert "broken-dist 0.4" in name
