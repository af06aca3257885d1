"""A separately installed distribution contributes a modifier; a broken one beside it only warns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quad_kernels

import quad_modifiers

EXAMPLE = Path(__file__).parent / "example_plugin"

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
    "compressed_largest": compressed.model.layers[0].mlp.up_proj.residual.weight.abs().max().item(),
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
    source, target = folder / "source", folder / "installed"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    run([*install, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)], folder)
    install_broken_plugin(target)
    packages = [str(Path(package.__file__).parents[1]) for package in (quad_modifiers, quad_kernels)]
    paths = [str(target), *packages]
    output = run([sys.executable, "-c", REPORT], folder, PYTHONPATH=os.pathsep.join(paths))
    loaded: dict[str, Any] = json.loads(output.splitlines()[-1])
    return loaded


def install_broken_plugin(target: Path) -> None:
    """Lay out an installed distribution whose plugin module cannot be imported."""
    (target / "broken_plugin.py").write_text("import surely_not_installed\n", encoding="utf-8")
    info = target / "broken_dist-0.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-dist\nVersion: 0.4\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[quad_modifiers]\nbroken = broken_plugin\n", encoding="utf-8")


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command in `folder` and return its output; fail with what it printed."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
