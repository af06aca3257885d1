"""Fields of a recipe changed by "Modifier.field=value"."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("llmcompressor")
from quad_modifiers import oneshot
from quad_modifiers.recipe import RecipeError
from quad_modifiers.recipe.overrides import overridden

RECIPE = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    OutlierSplitGPTQ: {bits: 4}
"""


def fields(text: str) -> dict[str, dict[str, object]]:
    return yaml.safe_load(text)["quad_stage"]["quad_modifiers"]


@pytest.mark.parametrize(
    ("override", "modifier", "field", "value"),
    [
        ("SVDOutlierProjection.rank=16", "SVDOutlierProjection", "rank", 16),
        ("SVDOutlierProjection.basis=square", "SVDOutlierProjection", "basis", "square"),
        ("SVDOutlierProjection.online_rotation=[]", "SVDOutlierProjection", "online_rotation", []),
        ("OutlierSplitGPTQ.group_size=null", "OutlierSplitGPTQ", "group_size", None),
        ("OutlierSplitGPTQ.ignore=[lm_head, 're:.*=x']", "OutlierSplitGPTQ", "ignore", ["lm_head", "re:.*=x"]),
    ],
)
def test_values_are_yaml(override: str, modifier: str, field: str, value: object) -> None:
    changed = fields(overridden(RECIPE, [override]))
    wanted = fields(RECIPE)
    wanted[modifier][field] = value
    assert changed == wanted
    assert list(changed) == list(wanted)


def test_deeper_paths_and_several_overrides() -> None:
    recipe = "a_stage:\n  a_modifiers:\n    QuantizationModifier: {scheme: {W8A8: [Linear]}}\n"
    changed = overridden(
        recipe, ["QuantizationModifier.scheme.W8A8=['re:.*mlp.*']", "QuantizationModifier.ignore=[lm_head]"]
    )
    found = yaml.safe_load(changed)["a_stage"]["a_modifiers"]["QuantizationModifier"]
    assert found == {"scheme": {"W8A8": ["re:.*mlp.*"]}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("OutlierSplitGPTQ.bitz=4", r"mine\.yaml with OutlierSplitGPTQ\.bitz=4: OutlierSplitGPTQ has no field 'bitz'"),
        ("SVDOutlierProjection.rank=-1", r"SVDOutlierProjection\.rank: .* greater than or equal to 0, not -1"),
        ("OutlierSplitGPTQ.bits=[", "is not YAML"),
        ("OutlierSplitGPTQ.bits", "names no field; write Modifier.field=value"),
        ("OutlierSplitGPTQ=4", "names no field; write Modifier.field=value"),
        ("OutlierGPTQ.bits=4", r"the recipe has no OutlierGPTQ; did you mean OutlierSplitGPTQ\?"),
        ("OutlierSplitGPTQ.bits.low=4", "goes into 'bits', which is no mapping"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE)
    with pytest.raises(ValueError, match=message):
        overridden(file, [override])


def test_an_error_of_the_file_keeps_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.replace("bits", "bitz"))
    with pytest.raises(RecipeError, match=r"mine\.yaml:4: OutlierSplitGPTQ has no field 'bitz'"):
        overridden(file, ["SVDOutlierProjection.rank=16"])


def test_a_modifier_that_occurs_twice() -> None:
    entry = "QuantizationModifier: {{scheme: W8A8, targets: ['re:.*{}$']}}"
    groups = {"a": entry.format("q_proj"), "b": entry.format("k_proj")}
    twice = "a_stage:\n" + "".join(f"  {name}_modifiers:\n    {each}\n" for name, each in groups.items())
    with pytest.raises(ValueError, match=r"the recipe has 2 QuantizationModifier; change its file"):
        overridden(twice, ["QuantizationModifier.scheme=W4A16"])


def test_modifiers_are_set_directly() -> None:
    with pytest.raises(TypeError, match="set the fields of modifiers directly"):
        oneshot("nothing", [], overrides=["OutlierSplitGPTQ.bits=4"])
