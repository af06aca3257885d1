"""Parts of a recipe that YAML or llm-compressor would silently drop are errors at their line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from llmcompressor.recipe import Recipe

from quad_modifiers.plugins import QuadPluginManager
from quad_modifiers.recipe import RecipeError, check_recipe, validate_recipe

GOOD = """\
quad_stage:
  quad_modifiers:
    SVDOutlierProjection:
      rank: 64
    DynamicActQuant: {}
    OutlierSplitGPTQ:
      bits: 4
"""

CASES = {
    "empty": ("", 1, "the recipe is empty", "quad_stage"),
    "only-comments": ("# nothing\n", 1, "the recipe is empty", "quad_stage"),
    "null-document": ("--- null\n", 1, "must be a mapping, not empty", "quad_stage"),
    "syntax": ("quad_stage:\n  quad_modifiers: [\n", 3, "not valid YAML", "indentation"),
    "tab": ("quad_stage:\n\tquad_modifiers: {}\n", 2, "not valid YAML", "tabs"),
    "python-tag": ("quad_stage: !!python/name:os.system\n", 1, "not valid YAML", ""),
    "list": ("- OutlierSplitGPTQ: {}\n- DynamicActQuant: {}\n", 1, "not a list", "quad_stage"),
    "text": ("just: some\nwords\n", 3, "not valid YAML", ""),
    "args": ("args: {bits: 4}\n" + GOOD, 1, "drops the top-level key 'args'", "Remove it"),
    "number-key": (GOOD + "7: 8\n", 8, "drops the top-level key '7'", "Remove it"),
    "no-stage": (
        "quad_modifiers:\n  OutlierSplitGPTQ: {}\n",
        1,
        "'quad_modifiers'",
        "Indent it below a stage",
    ),
    "bare-modifier": ("OutlierSplitGPTQ:\n  bits: 4\n", 1, "'OutlierSplitGPTQ'", "into a stage and a group"),
    "stage-typo": (
        GOOD.replace("quad_stage", "quad_stages"),
        1,
        "'quad_stages'",
        "Rename it to 'quad_stage'",
    ),
    "stage-list": ("quad_stage:\n- OutlierSplitGPTQ: {}\n", 1, "is a list", "mapping"),
    "empty-stage": ("quad_stage: {}\n", 1, "contains no modifier", "mapping"),
    "empty-group": ("quad_stage:\n  quad_modifiers: {}\n", 1, "contains no modifier", "mapping"),
    "group-typo": (GOOD.replace("quad_modifiers", "quad_modifier"), 2, "'quad_modifier'", "'quad_modifiers'"),
    "group-misspelt": (GOOD.replace("quad_modifiers", "quad_modifers"), 2, "'quad_modifers'", "'quad_modifiers'"),
    "stage-misspelt": (GOOD.replace("quad_stage", "my_stgae"), 1, "'my_stgae'", "Rename it to 'my_stage'"),
    "stage-alone": (GOOD.replace("quad_stage", "stage"), 1, "'stage'", "Rename it to 'quad_stage'"),
    "other-group": (GOOD.replace("quad_modifiers", "quad"), 2, "'quad'", "under 'quad_modifiers'"),
    "run-type": ("quad_stage:\n  run_type: oneshot\n", 2, "'run_type'", "remove anything else"),
    "group-list": (
        "quad_stage:\n  quad_modifiers:\n  - OutlierSplitGPTQ: {}\n",
        2,
        "is a list",
        "leading '-'",
    ),
    "no-fields": (
        "quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ:\n",
        3,
        "not empty",
        "'OutlierSplitGPTQ: {}'",
    ),
    "group-field": (GOOD + "      group: quad\n", 6, "has the field 'group'", "name of the group|Remove it"),
    "two-stages": (GOOD + GOOD.replace("quad_stage", "more_stage"), 8, "a second stage", "one stage"),
    "duplicate-field": (GOOD + "      bits: 8\n", 8, "'bits' occurs twice (first in line 7)", "Remove one"),
    "duplicate-modifier": (
        GOOD + "    DynamicActQuant:\n      u_type_bits: 8\n",
        8,
        "'DynamicActQuant' occurs twice (first in line 5)",
        "a second group",
    ),
}


@pytest.mark.parametrize(("text", "line", "message", "remedy"), CASES.values(), ids=CASES.keys())
def test_dropped_part_is_an_error_at_its_line(
    manager: QuadPluginManager, text: str, line: int, message: str, remedy: str
) -> None:
    problems = validate_recipe(text, manager)
    first = problems[0]
    assert first.line == line, problems
    assert message in first.message
    assert any(each in first.remedy for each in remedy.split("|"))
    assert first.severity == "error"
    with pytest.raises(RecipeError, match=rf"<recipe>:{line}: "):
        check_recipe(text, manager)


def test_good_recipe_has_no_problem(manager: QuadPluginManager) -> None:
    assert validate_recipe(GOOD, manager) == []
    assert check_recipe(GOOD, manager) == []


def test_anchors_and_merge_keys_are_understood(manager: QuadPluginManager) -> None:
    text = """\
    quad_stage:
      quad_modifiers:
        OutlierSplitGPTQ: &shared
          bits: 4
          ignore: [lm_head]
      second_modifiers:
        OutlierSplitGPTQ:
          <<: *shared
          bits: true me
    """
    (problem,) = validate_recipe(textwrap.dedent(text), manager)
    assert problem.line == 9
    assert "OutlierSplitGPTQ.bits" in problem.message


def test_every_problem_of_a_file_is_listed_with_its_line(manager: QuadPluginManager, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("args: {}\n" + GOOD.replace("rank", "rnak").replace("bits: 4", "bits: four"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        check_recipe(path, manager)
    assert [problem.line for problem in caught.value.problems] == [1, 5, 8]
    for problem in caught.value.problems:
        assert f"{path}:{problem.line}: {problem.message}. " in str(caught.value)


def test_json_recipe(manager: QuadPluginManager, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"quad_stage": {"quad_modifiers": {"OutlierSplitGPTQ": {"bits": 4}}}}', encoding="utf-8")
    assert validate_recipe(path, manager) == []


def test_recipe_saved_by_llmcompressor_validates(
    manager: QuadPluginManager, stand_ins: dict[str, type], tmp_path: Path
) -> None:
    modifiers = [
        stand_ins["SVDOutlierProjection"](rank=8, group="quad"),
        stand_ins["OutlierSplitGPTQ"](group="quad"),
    ]
    path = tmp_path / "recipe.yaml"
    Recipe.create_instance(modifiers).yaml(file_path=str(path))
    assert validate_recipe(path, manager) == []
