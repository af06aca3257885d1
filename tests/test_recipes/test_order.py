"""Modifiers in a wrong order or in bad company are refused; sensible company is not."""

from __future__ import annotations

import pytest
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.recipe import Recipe

from quad_modifiers.plugins import QuadPluginManager
from quad_modifiers.recipe import Problem, RecipeError, check_recipe, validate_modifiers, validate_recipe

PROJECTION = "SVDOutlierProjection: {}"
PLAIN_ROTATION = "SVDOutlierProjection: {rank: 0}"
DOWN_SPLIT = "SVDOutlierProjection: {rank: 0, down_proj_rank: 64}"
ACTIVATIONS = "DynamicActQuant: {}"
WEIGHTS = "OutlierSplitGPTQ: {}"
SMOOTH = "SmoothQuantModifier: {}"
STOCK_W4A16 = "GPTQModifier: {scheme: W4A16, ignore: [lm_head]}"
STOCK_SPLIT = 'GPTQModifier: {scheme: W4A16, ignore: [lm_head, "re:.*outlier$"]}'
STOCK_W4A4 = 'QuantizationModifier: {scheme: W4A4, ignore: [lm_head, "re:.*outlier$"]}'
STOCK_HEAD = "QuantizationModifier: {scheme: W8A16, targets: [lm_head]}"
STOCK_DOWN = 'QuantizationModifier: {scheme: W4A16, targets: ["re:.*down_proj.*"]}'
STOCK_DOWN_SPLIT = 'QuantizationModifier: {scheme: W4A16, targets: ["re:.*down_proj.*"], ignore: ["re:.*outlier$"]}'
STOCK_CONTAINER = 'QuantizationModifier: {scheme: W4A16, targets: ["re:.*q_proj$"], ignore: ["re:.*outlier$"]}'


def validate(manager: QuadPluginManager, *modifiers: str) -> list[Problem]:
    """Validate a recipe with one modifier a line, from line 3, each in a group of its own."""
    groups = [f"  g{number}_modifiers: {{{modifier}}}" for number, modifier in enumerate(modifiers)]
    return validate_recipe("\n".join(["# header", "quad_stage:", *groups]), manager)


@pytest.mark.parametrize(
    "modifiers",
    [
        (PROJECTION, ACTIVATIONS, WEIGHTS),
        (PROJECTION, WEIGHTS, ACTIVATIONS),
        (PLAIN_ROTATION, ACTIVATIONS, WEIGHTS),
        (SMOOTH, PROJECTION, ACTIVATIONS, WEIGHTS),
        (ACTIVATIONS, WEIGHTS),
        (PROJECTION, WEIGHTS),
        (PROJECTION, STOCK_SPLIT),
        (PROJECTION, STOCK_W4A4),
        (PROJECTION, ACTIVATIONS, STOCK_SPLIT),
        (PLAIN_ROTATION, STOCK_W4A16),
        (PROJECTION, STOCK_DOWN),
        (PROJECTION, WEIGHTS, STOCK_HEAD),
        (PROJECTION, ACTIVATIONS, WEIGHTS, "Tuner: {}"),
        (SMOOTH, STOCK_W4A16),
        ("SpinQuantModifier: {}", SMOOTH, STOCK_W4A16),
        (PROJECTION, "OutlierSplitGPTQ: {ignore: [lm_head, down_proj]}", STOCK_DOWN_SPLIT),
        (PROJECTION, 'OutlierSplitGPTQ: {ignore: [lm_head, "re:.*down_proj$"]}', STOCK_DOWN_SPLIT),
    ],
    ids=lambda modifiers: "+".join(each.split(":")[0] for each in modifiers),
)
def test_sensible_company(manager: QuadPluginManager, modifiers: tuple[str, ...]) -> None:
    assert validate(manager, *modifiers) == []


@pytest.mark.parametrize(
    ("modifiers", "line", "message", "remedy"),
    [
        (
            (WEIGHTS, PROJECTION),
            4,
            "SVDOutlierProjection comes after OutlierSplitGPTQ (line 3)",
            "before Outlier",
        ),
        ((ACTIVATIONS, PROJECTION, WEIGHTS), 4, "after DynamicActQuant (line 3)", "before DynamicActQuant"),
        ((STOCK_W4A16, PROJECTION), 4, "after GPTQModifier (line 3)", "before GPTQModifier"),
        (
            (PROJECTION, SMOOTH, WEIGHTS),
            4,
            "SmoothQuantModifier comes after SVDOutlierProjection",
            "before SVD",
        ),
        ((PROJECTION, "AWQModifier: {}", STOCK_SPLIT), 4, "AWQModifier comes after SVDOut", "before SVD"),
        (
            ("Tuner: {}", PROJECTION),
            4,
            "SVDOutlierProjection comes after Tuner",
            "before Tuner",
        ),
        (("Tuner: {}", WEIGHTS), 4, "OutlierSplitGPTQ comes after Tuner", "before Tuner"),
        (("Tuner: {}", ACTIVATIONS), 4, "DynamicActQuant comes after Tuner", "before Tuner"),
        ((PROJECTION, PROJECTION, WEIGHTS), 4, "second projection", "Keep one"),
        (("SpinQuantModifier: {}", WEIGHTS), 3, "SpinQuantModifier rotates plain linears", "rank: 0"),
        ((ACTIVATIONS, "QuIPModifier: {}"), 4, "QuIPModifier", "before DynamicActQuant"),
        (("SpinQuantModifier: {}", PROJECTION), 4, "second projection after SpinQuant", "rank: 0"),
        ((PROJECTION, "QuIPModifier: {}"), 4, "QuIPModifier is a second projection", "Keep one"),
        (
            (WEIGHTS, STOCK_W4A16),
            4,
            "weights of linears that OutlierSplitGPTQ (line 3) quantizes too",
            "targets and ignore",
        ),
        ((WEIGHTS, WEIGHTS), 4, "the weights of linears that", "Remove one"),
        ((PROJECTION, WEIGHTS, STOCK_SPLIT), 5, "the weights of linears that", "Remove one"),
        ((ACTIVATIONS, STOCK_W4A4), 4, "input activations of linears that DynamicAct", "W4A16"),
        ((ACTIVATIONS, ACTIVATIONS, WEIGHTS), 4, "input activations of linears", "Remove one"),
        (
            (PROJECTION, STOCK_W4A16),
            4,
            "quantize the outlier linears too",
            'ignore: [lm_head, "re:.*outlier$"]',
        ),
        (
            (PROJECTION, STOCK_CONTAINER),
            4,
            "q_proj, which SVDOutlierProjection (line 3) makes a container",
            "residual",
        ),
        (("Wanderer: {}", WEIGHTS), 3, "recipe_role is 'wander'", "smooth, project"),
        (("AWQModifier: {}", WEIGHTS), 3, "llm-compressor refuses the recipe", ""),
    ],
    ids=lambda value: "+".join(each.split(":")[0] for each in value) if isinstance(value, tuple) else "",
)
def test_wrong_order_or_company(
    manager: QuadPluginManager, modifiers: tuple[str, ...], line: int, message: str, remedy: str
) -> None:
    problems = validate(manager, *modifiers)
    assert [(problem.line, problem.severity) for problem in problems] == [(line, "error")], problems
    assert message in problems[0].message
    assert remedy in problems[0].remedy


@pytest.mark.parametrize("modifiers", [(PROJECTION,), (SMOOTH,), (SMOOTH, PROJECTION)])
def test_nothing_quantized_is_a_warning(manager: QuadPluginManager, modifiers: tuple[str, ...]) -> None:
    (problem,) = validate(manager, *modifiers)
    assert (problem.severity, problem.line) == ("warning", 3)
    assert "nothing is quantized" in problem.message
    assert "warning: nothing" in problem.describe("mine.yaml")


def test_modifiers_built_in_python_follow_the_same_rules(stand_ins: dict[str, type[Modifier]]) -> None:
    projection, weights = stand_ins["SVDOutlierProjection"], stand_ins["OutlierSplitGPTQ"]
    assert check_recipe([projection(), weights()]) == []
    assert check_recipe(weights()) == []
    assert check_recipe([projection(), [GPTQModifier(scheme="W4A16", ignore=["lm_head", "re:.*outlier$"])]]) == []
    (warning,) = check_recipe(projection())
    assert warning.severity == "warning"
    for recipe in ([weights(), projection()], Recipe.create_instance([weights(), projection()])):
        with pytest.raises(RecipeError, match="<recipe>: SVDOutlierProjection comes after OutlierSplitGPTQ, but"):
            check_recipe(recipe)


def test_stock_recipes_are_left_to_llmcompressor() -> None:
    recipe = [SpinQuantModifier(), SmoothQuantModifier(), QuantizationModifier(scheme="W4A4")]
    assert validate_modifiers(recipe) == []


def test_not_a_recipe(stand_ins: dict[str, type[Modifier]]) -> None:
    with pytest.raises(TypeError, match=r"element 1 of the recipe is a str.*not in a list"):
        check_recipe([stand_ins["OutlierSplitGPTQ"](), "recipes/quad_w4a4.yaml"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"a recipe must be a path.*not int"):
        check_recipe(4)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="contains no modifier"):
        check_recipe([])
