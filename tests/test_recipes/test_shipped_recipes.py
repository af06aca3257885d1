"""Every recipe of recipes/ validates, says what it is for, and is parsed by llm-compressor without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from llmcompressor.recipe import Recipe

from quad_modifiers.plugins import register_modifiers
from quad_modifiers.recipe import builtin_recipe_folder, check_recipe, list_recipes, resolve_recipe

NAMES = (
    "quad_w4a4",
    "quad_w4a4a8",
    "quad_w4a4a8_tuned",
    "quad_w4a4_square",
    "quad_w4a4_e8",
    "quad_w4a4_portable",
    "quad_w4a8",
    "quad_w4a4_g32",
    "quad_w4a8_g32",
    "quad_nvfp4",
    "quad_mxfp4",
    "quad_w4a16",
    "quarot_w4a4",
    "frtq_w4a4",
    "frtq_w4a4kv4",
    "resq_w4a4",
    "resq_w4a4kv4",
    "rtn_w4a4",
    "smoothquant_quad_w4a4",
)
FILES = sorted(builtin_recipe_folder().glob("*.yaml"))


def test_all_published_recipes_are_there() -> None:
    assert set(NAMES) <= set(list_recipes())
    assert resolve_recipe("quad_w4a4") == builtin_recipe_folder() / "quad_w4a4.yaml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_validates_without_a_warning(path: Path) -> None:
    assert check_recipe(path) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_llmcompressor_reads_every_modifier_and_field(path: Path) -> None:
    register_modifiers()
    recipe = Recipe.create_instance(str(path))
    ((_, stage),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
    written = [(name, fields) for group in stage.values() for name, fields in group.items()]
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == [name for name, _ in written]
    for modifier, (_, fields) in zip(recipe.modifiers, written, strict=True):
        assert {name: getattr(modifier, name) for name in fields} == fields


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_saved_recipe_validates_again(path: Path, tmp_path: Path) -> None:
    register_modifiers()
    saved = tmp_path / "recipe.yaml"
    Recipe.create_instance(str(path)).yaml(file_path=str(saved))
    assert check_recipe(saved) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_says_what_it_does_and_how_to_run_it(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("quad_stage:")[0]
    for part in ("What it does:", "What it costs:", "When to use it:", f"recipe='recipes/{path.name}'"):
        assert part in header
