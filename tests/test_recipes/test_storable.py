"""What a checkpoint could not hold is refused with the recipe, before a model is named."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.recipe import coverage, validate_recipe
from quad_modifiers.recipe.storable import sample_places
from quad_modifiers.tools.cli import main

PROJECTION = "SVDOutlierProjection: {rank: 8}"
STOCK = 'GPTQModifier: {targets: [Linear], scheme: %s, ignore: [lm_head, "re:.*outlier$"]}'
TUNING = "OutlierLoRA: {}"


def text(*modifiers: str) -> str:
    return "quad_stage:\n  quad_modifiers:\n" + "".join(f"    {modifier}\n" for modifier in modifiers)


@pytest.mark.parametrize(
    ("modifiers", "line", "message", "remedy"),
    [
        ((PROJECTION, STOCK % "FP8"), 4, "type float, strategy tensor cannot be stored", "Use int"),
        ((PROJECTION, STOCK % "NVFP4A16"), 4, "weights of 4 bits, type float", "per channel or group"),
        ((PROJECTION, STOCK % "W5A16"), 4, "weights of 5 bits", "2, 4 or 8 bits"),
        ((PROJECTION, STOCK % "W4AFP8"), 4, "inputs of 8 bits, type float", "DynamicActQuant"),
        (
            (PROJECTION, 'GPTQModifier: {scheme: W4A16, ignore: ["re:.*outlier$"]}'),
            4,
            "lm_head is quantized by GPTQModifier",
            "Add 'lm_head' to its ignore list",
        ),
        (
            ("DynamicActQuant: {}", 'OutlierSplitGPTQ: {ignore: ["re:.*layers.1[0-9].*"]}'),
            4,
            "layer 10 self_attn.q_proj is quantized differently from layer 0: not quantized against 4 bits",
            "Name q_proj as a whole",
        ),
        (
            (
                'OutlierSplitGPTQ: {ignore: ["re:.*layers.1[.].*"], group_size: 32}',
                'GPTQModifier: {scheme: W8A16, targets: ["re:.*layers.1[.].*residual$"]}',
            ),
            4,
            "differently from layer 0: 8 bits in groups of 128 against 4 bits in groups of 32",
            "not single layers",
        ),
        ((PROJECTION, TUNING), 4, "no weight is quantized", "OutlierSplitGPTQ before it"),
        (("SVDOutlierProjection: {rank: 0}", "OutlierSplitGPTQ: {}", TUNING), 5, "no outlier weights", "rank of 16"),
        ((PROJECTION, "OutlierSplitGPTQ: {outlier_bits: 8}", TUNING), 5, "cannot be trained", "leave it out"),
        (("OutlierSplitGPTQ: {outlier_bits: 8}",), 3, "outlier_bits (8) is for outlier columns", "put SVDOutlier"),
        (
            ("SVDOutlierProjection: {rank: 0}", "OutlierSplitGPTQ: {outlier_bits: 8}"),
            4,
            "there are none (rank 0, or no projection)",
            "leave it out",
        ),
        (
            (PROJECTION, "DynamicActQuant: {outlier_bits: 8}", "OutlierSplitGPTQ: {}"),
            4,
            "DynamicActQuant: outlier_bits (8) needs outlier weights in 8 bits",
            "set OutlierSplitGPTQ.outlier_bits: 8",
        ),
        (
            (PROJECTION, "DynamicActQuant: {outlier_bits: 8}", STOCK % "W4A16"),
            4,
            "needs outlier weights in 8 bits",
            "OutlierSplitGPTQ.outlier_bits",
        ),
        (
            (
                PROJECTION,
                "DynamicActQuant: {outlier_bits: 8, u_type_bits: null, d_type_bits: null}",
                "OutlierSplitGPTQ: {outlier_bits: 8}",
            ),
            4,
            "the outlier coordinates of quantized inputs, and none are",
            "leave it out",
        ),
        (
            (PROJECTION, "OutlierSplitGPTQ: {outlier_bits: 4}"),
            4,
            "OutlierSplitGPTQ.outlier_bits: Input should be 8, not 4",
            "outlier_bits",
        ),
        ((PROJECTION, STOCK % "W4A8", TUNING), 5, "quantized by a stock modifier", "use DynamicActQuant"),
        (
            (PROJECTION, STOCK.replace("GPTQ", "AutoRound") % "W4A16"),
            4,
            "AutoRoundModifier after SVDOutlierProjection (line 3) is not supported",
            "GPTQModifier",
        ),
    ],
)
def test_refused_with_line_and_remedy(
    modifiers: tuple[str, ...],
    line: int,
    message: str,
    remedy: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text(*modifiers))
    problem = validate_recipe(recipe)[0]
    assert (problem.line, problem.severity) == (line, "error")
    assert message in problem.message
    assert remedy in f"{problem.message} {problem.remedy}"
    assert main(["recipes", "validate", str(recipe)]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W4A16_ASYM", "W2A16", "W4A8", "W4A4", "W8A8"])
def test_what_can_be_stored_is_sound(scheme: str) -> None:
    assert validate_recipe(text(PROJECTION, STOCK % scheme)) == []


@pytest.mark.parametrize(
    "modifiers",
    [
        ("OutlierSplitGPTQ: {ignore: [down_proj, self_attn.o_proj]}",),
        (
            'OutlierSplitGPTQ: {ignore: ["re:.*layers.([0-9]|1[0-9])[.].*"]}',
            'QuantizationModifier: {targets: ["re:.*layers.([0-9]|1[0-9])[.].*residual$"], config_groups: {group_0: '
            '{targets: ["re:.*layers.([0-9]|1[0-9])[.].*residual$"], weights: {num_bits: 4, strategy: channel}}}}',
        ),
        (STOCK % "FP8",),  # llm-compressor's checkpoint, not ours
    ],
    ids=["roles", "shared layers", "stock alone"],
)
def test_no_more_than_must_be_is_refused(modifiers: tuple[str, ...]) -> None:
    assert validate_recipe(text(*modifiers)) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", False),
        ("self_attn.q_proj", False),
        ("lm_head", False),
        ("re:.*outlier$", False),
        ("re:.*self_attn.*", False),
        (r"re:.*\.mlp\..*", False),
        ("re:model.layers.*mlp.*", False),
        ("re:.*layers.1[0-9].*", True),
        ("model.layers.3.mlp.down_proj", True),
        ("re:.*layers...mlp.*", True),
        (r"re:.*layers\.\d\..*", True),
        ("re:.*s.?.mlp.*", True),
        ("re:.*(2|3).mlp.*", True),
        ("re:.*layers.+mlp.*", True),  # it does not, but looking at all layers is never wrong
    ],
)
def test_patterns_that_tell_layers_apart(pattern: str, expected: bool) -> None:
    """Recipes without one are checked by a single layer: that must give what all layers give."""
    modifier = OutlierSplitGPTQ(ignore=[pattern])
    assert coverage.tells_layers_apart(modifier) is expected
    if not expected:
        reached = coverage.covered(modifier, "weights", tuple(place.name for place in sample_places()))
        by_path: dict[tuple[object, ...], set[bool]] = {}
        for place in sample_places():
            by_path.setdefault((place.family, place.within), set()).add(place.name in reached)
        assert all(len(found) == 1 for found in by_path.values())


def test_targets_that_tell_layers_apart() -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    assert not coverage.tells_layers_apart(GPTQModifier(targets="Linear", scheme="W4A16"))
    assert coverage.tells_layers_apart(GPTQModifier(targets="re:.*layers.3.*", scheme="W4A16"))
