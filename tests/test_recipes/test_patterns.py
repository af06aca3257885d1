"""A pattern that matches nothing in the model is refused, with its line and a near name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("llmcompressor")
from llmcompressor.recipe import Recipe

from quad_modifiers import oneshot
from quad_modifiers.recipe import RecipeError
from quad_modifiers.recipe.patterns import check_patterns, has_patterns

FRAME = "quad_stage:\n  quad_modifiers:\n    {}\n"
AFTER = "\n    QuantizationModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head]}"  # AWQ alone is refused
IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))


def check(modifier: str, model: torch.nn.Module) -> None:
    recipe = FRAME.format(modifier)
    check_patterns(Recipe.create_instance(recipe).modifiers, model, recipe, "mine.yaml")


@pytest.mark.parametrize(
    "modifier",
    [
        "OutlierSplitGPTQ: {}",
        "OutlierSplitGPTQ: {ignore: []}",
        "OutlierSplitGPTQ: {ignore: [lm_head, down_proj, self_attn.q_proj, 're:.*layers.1.*up_proj$', 're:.*mlp']}",
        "OutlierSplitGPTQ: {ignore: [model.layers.0.mlp.up_proj]}",
        "EmbeddingHeadQuant: {targets: [embed_tokens]}",
        "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head, 're:.*down_proj$']}",
        "GPTQModifier: {targets: [LlamaMLP, 're:.*q_proj$'], scheme: W4A16}",
        "QuantizationModifier: {scheme: {W8A8: ['re:.*mlp.*']}}",
        "SmoothQuantModifier: {mappings: [[['re:.*q_proj', 're:.*k_proj'], 're:.*input_layernorm']]}",
        "AWQModifier: {mappings: [{smooth_layer: 're:.*input_layernorm$', balance_layers: ['re:.*q_proj$']}]}" + AFTER,
    ],
)
def test_patterns_that_match(modifier: str, make_toy) -> None:
    model = make_toy()
    check(modifier, model)
    model.model.layers = model.model.layers[:0]  # the same patterns have nothing to match then
    model.lm_head = model.model.embed_tokens = torch.nn.Identity()
    named = has_patterns(Recipe.create_instance(FRAME.format(modifier)).modifiers)
    assert named == refused(modifier, model)


def refused(modifier: str, model: torch.nn.Module) -> bool:
    try:
        check(modifier, model)
    except RecipeError:
        return True
    return False


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (
            "OutlierSplitGPTQ: {ignore: [lm_head, 're:.*up_prj$']}",
            r"mine\.yaml:3: OutlierSplitGPTQ\.ignore: 're:\.\*up_prj\$' matches no module of the model\. Did you",
        ),
        ("OutlierSplitGPTQ: {ignore: [mlp]}", "'mlp' matches no module of the model. Correct it, or remove it"),
        ("OutlierSplitGPTQ: {ignore: [Linear]}", "'Linear' matches no module"),
        ("OutlierSplitGPTQ: {ignore: [layers.7.mlp.up_proj]}", r"'layers\.7\.mlp\.up_proj' matches no module"),
        (
            "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [down_proj]}",
            r"'down_proj' matches no module .*GPTQModifier wants whole names; write 're:\.\*down_proj\$'",
        ),
        ("GPTQModifier: {targets: [Linaer], scheme: W4A16}", r"GPTQModifier\.targets: 'Linaer' matches no"),
        (
            "QuantizationModifier: {scheme: {W8A8: ['re:.*mlp.up$']}}",
            r"Modifier\.scheme: 're:\.\*mlp\.up\$'",
        ),
        ("SmoothQuantModifier: {mappings: [[['re:.*q_proj'], 're:.*inputnorm']]}", r"mappings: 're:\.\*inputnorm'"),
        (
            "AWQModifier: {mappings: [{smooth_layer: 're:.*norm9$', balance_layers: ['re:.*q_proj$']}]}" + AFTER,
            r"AWQModifier\.mappings: 're:\.\*norm9\$'",
        ),
    ],
)
def test_patterns_that_match_nothing(modifier: str, message: str, make_toy) -> None:
    with pytest.raises(RecipeError, match=message):
        check(modifier, make_toy())


def test_lines_of_a_long_recipe_and_all_problems_at_once(make_toy) -> None:
    recipe = """quad_stage:
  quad_modifiers:
    DynamicActQuant: {u_type_bits: 4}
    OutlierSplitGPTQ:
      ignore:
      - lm_head
      - dwn_proj
      - gat_proj
"""
    with pytest.raises(RecipeError) as caught:
        check_patterns(Recipe.create_instance(recipe).modifiers, make_toy(), recipe)
    assert [problem.line for problem in caught.value.problems] == [7, 8]


def test_the_parts_of_a_projected_linear(make_toy) -> None:
    """A stock quantizer after a projection may name what its linears become."""
    recipe = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    GPTQModifier: {targets: ['re:.*residual$'], scheme: W4A16, ignore: ['re:.*outlier$', lm_head]}
"""
    check_patterns(Recipe.create_instance(recipe).modifiers, make_toy(), recipe)


def test_no_patterns_no_model() -> None:
    assert not has_patterns(Recipe.create_instance(FRAME.format("DynamicActQuant: {}")).modifiers)


@pytest.mark.parametrize("from_disk", [True, False])
def test_refused_before_the_weights_are_loaded(from_disk, make_toy, toy_checkpoint, monkeypatch) -> None:
    for name in ("compression.calibration_data", "checkpoint.opened.Opened.load"):
        monkeypatch.setattr(f"quad_modifiers.{name}", lambda *_, **__: pytest.fail("loading was started"))
    model = toy_checkpoint("llama") if from_disk else make_toy()
    with pytest.raises(RecipeError, match="'o_prj' matches no module"):
        oneshot(model, FRAME.format("OutlierSplitGPTQ: {ignore: [o_prj]}"), dataset=IDS)


def test_through_the_oneshot_of_llmcompressor(make_toy, tmp_path: Path) -> None:
    from llmcompressor import oneshot as stock

    model = make_toy(num_hidden_layers=1)
    model.config.save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(RecipeError, match="'o_prj' matches no module"):
        stock(model=model, recipe=FRAME.format("OutlierSplitGPTQ: {ignore: [o_prj], method: rtn}"), tokenizer=object())
