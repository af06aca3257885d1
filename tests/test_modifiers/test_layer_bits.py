"""Overrides: other bits for some linears, from the recipe to what is loaded, written and told of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")

from quad_modifiers import oneshot
from quad_modifiers.checkpoint.dense import export_dense
from quad_modifiers.checkpoint.format import QuadFormat, read_format
from quad_modifiers.compression_plan import plan_compression
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.nn.native_block import NativeBlock, native_groups
from quad_modifiers.recipe import RecipeError, validate_recipe
from quad_modifiers.records.export_record import read_export
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.records.widths import width_tags
from quad_modifiers.tools.publishing import plan

FRAME = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {overrides: %s}
    OutlierSplitGPTQ: {ignore: [lm_head, o_proj], overrides: %s}
"""
INPUTS = "[{layers: 1-2, linears: [gate_proj, up_proj], bits: 8, clip_ratio: 1.0}]"
WEIGHTS = "[{linears: down_proj, bits: 2}, {layers: [0, 2-2], linears: 're:.*mlp.*', bits: 8}]"
MIXED = FRAME % (INPUTS, WEIGHTS)
IDS = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def mixed(make_quad_toy: Callable[..., Any]) -> Any:
    """The model in memory and its folder."""
    return make_quad_toy(MIXED, num_hidden_layers=3)


@pytest.fixture(scope="module")
def quad(mixed) -> QuadFormat:
    return read_format(json.loads((mixed[1] / "config.json").read_text())["quantization_config"]["quad"])


def bits(quad: QuadFormat, role: str) -> list[tuple[int | None, int]]:
    formats = [quad.of_layer(layer)[role] for layer in range(3)]
    return [(each.weight and each.weight.bits, each.input.bits) for each in formats]


def test_each_linear_has_the_bits_of_the_last_override_that_names_it(quad) -> None:
    assert quad.format_version == 6
    assert bits(quad, "q_proj") == [(4, 4)] * 3
    assert bits(quad, "o_proj") == [(None, 4)] * 3
    assert bits(quad, "up_proj") == [(8, 4), (4, 8), (8, 8)]
    assert bits(quad, "down_proj") == [(8, 4), (2, 4), (8, 4)]
    assert quad.of_layer(1)["gate_proj"].input.clip_ratio == 1.0
    assert quad.of_layer(0)["gate_proj"].input.clip_ratio == 0.92


@torch.no_grad()
def test_it_is_loaded_as_it_was_and_runs_in_native_blocks(mixed, make_quad_toy) -> None:
    model, folder = mixed
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    logits = loaded(IDS).logits
    assert torch.equal(logits, model(IDS).logits)
    plain = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    with_inputs = (plain(IDS).logits - logits).abs().mean()
    assert 0 < with_inputs < 0.3 * logits.std()
    # the weights of o_proj are not packed here; with all of them, a block is native whatever the bits of its linears
    packed = make_quad_toy(MIXED.replace(", o_proj]", "]"), num_hidden_layers=3)[0]
    hidden = packed.model.embed_tokens(IDS)
    blocks = [block for block in packed.model.layers if isinstance(block, NativeBlock)]
    assert all(native_groups(block, hidden) is not None for block in blocks)


def test_what_is_told_of_it(mixed, make_toy, toy_tokenizer, tmp_path) -> None:
    folder = shutil.copytree(mixed[1], tmp_path / "copy")
    toy_tokenizer.save_pretrained(folder)
    assert width_tags(read_inventory(folder)) == []
    card = plan(folder, "me/model", check=False).card
    assert "| up_proj, layer 1 | 4 | output channel | 8 | token | 1 |" in card
    assert "| down_proj | 8 |" in card
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())["quad_stage"]["quad_modifiers"]
    assert kept["DynamicActQuant"]["overrides"] == yaml.safe_load(INPUTS.replace("1-2,", "[1-2],"))
    export_dense(folder, tmp_path / "dense")
    (note,) = read_export(tmp_path / "dense").notes
    assert "q_proj 4, k_proj 4, v_proj 4, o_proj 4, gate_proj 4 and 8, up_proj 4 and 8, down_proj 4)" in note
    toy = make_toy(num_hidden_layers=3)
    planning = plan_compression(toy, MIXED)
    planned = {(each.role, each.count, each.weight, each.inputs) for each in planning.linears}
    assert ("down_proj", 1, "2 bits", "4 bits, per token") in planned
    assert ("up_proj", 1, "4 bits", "8 bits (clip ratio 1), per token") in planned
    smaller = plan_compression(toy, FRAME % (INPUTS, "[]"))
    # of the MLPs' linears, 64 x 128 each, six have 8 bits instead of 4, and one 2
    assert planning.checkpoint_bytes - smaller.checkpoint_bytes == 64 * 128 * (6 * 4 - 2) // 8


@pytest.mark.parametrize(
    ("inputs", "weights", "message"),
    [
        ("[]", "[{layers: 0-3, bits: 8}]", r"recipe:6: Out.*layers 0-3 of a model whose layers are 0 to 2"),
        ("[{layers: 3, bits: 8}]", "[]", r"recipe:5: Dyn.*: layer 3 of a model whose layers are 0 to 2"),
        ("[]", "[{linears: down, bits: 8}]", r"'down' matches no linear of the model\. Correct it; there are q_proj"),
        ("[]", "[{layers: 0, linears: 're:.*[.]1[.].*', bits: 8}]", r"no linear is in \[0\] and matches \['re:"),
        ("[]", "[{linears: o_proj, bits: 8}]", r"self_attn\.o_proj .* are not quantized by this modifier"),
        (
            "[]",
            "[{layers: 1, linears: [q_proj, k_proj], bits: 8}]",
            r"layer 1 .*v_proj 4 bits, which share their input",
        ),
        ("[{linears: up_proj, bits: 5}]", "[]", r"gate_proj 4 bits, up_proj 5 bits.*Name all of gate_proj, up_proj"),
        ("[{linears: up_proj, bits: 4, clip_ratio: 1.0}]", "[]", r"up_proj 4 bits \(clip ratio 1\), which share"),
    ],
)
def test_what_can_have_no_effect_is_refused_before_the_work(inputs, weights, message, make_toy) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_compression(make_toy(num_hidden_layers=3), FRAME % (inputs, weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("[{layers: 2-1, bits: 8}]", "the range ends before it begins; write 1-2, not '2-1'"),
        ("[{layers: first, bits: 8}]", "a layer is a number, or a range such as 0-3, not 'first'"),
        ("[{layers: 0, bits: 3}]", "should be 2, 4 or 8"),
        ("[{layers: 0}]", "needs the field 'overrides.0.bits'"),
        ("[{layers: [], bits: 8}]", "at least 1 item"),
        ("[{layer: 0, bits: 8}]", "overrides.0.layer: Extra inputs"),
        ("[{layers: 0, bits: 8}], sub_scale_bits: 4, group_size: 8", "integers of 8 bits times sub-scales"),
    ],
)
def test_a_recipe_is_checked_without_a_model(weights: str, message: str) -> None:
    (problem,) = validate_recipe(FRAME % ("[]", weights))
    assert problem.line == 6
    assert message in f"{problem.message}. {problem.remedy}"


def test_inputs_that_are_not_quantized_have_no_bits(make_toy) -> None:
    recipe = (
        "quad_stage: {quad_modifiers: {DynamicActQuant: {u_type_bits: null, overrides: [{linears: up_proj, bits: 8}]}}}"
    )
    with pytest.raises(RecipeError, match=r"up_proj and all others that it names are not quantized by this modifier"):
        oneshot(make_toy(), recipe, dataset=IDS)
    modifiers = [OutlierSplitGPTQ(overrides=[{"layers": 9, "bits": 8}])]
    with pytest.raises(RecipeError, match=r"recipe: OutlierSplitGPTQ\.overrides: layer 9"):
        oneshot(make_toy(), modifiers, dataset=IDS)


def test_more_bits_lose_less(make_quad_toy, make_toy) -> None:
    """Each of the two kinds of override brings the outputs closer to those of the original."""
    original = make_toy(num_hidden_layers=3)
    runs = [("[]", "[]"), ("[]", "[{layers: 0-2, bits: 8}]"), ("[{bits: 8, clip_ratio: 1.0}]", "[{bits: 8}]")]
    with torch.no_grad():
        wanted = original(IDS).logits
        made = [make_quad_toy(FRAME % each, num_hidden_layers=3)[0](IDS).logits for each in runs]
    errors = [float((logits - wanted).square().mean()) for logits in made]
    print(f"squared errors {errors}")
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "x_proj"}, "name the role 'x_proj'"),
        ({"layers": []}, "at least 1 item"),
        ({"layers": [2, 1]}, "rising order"),
        ({"layers": [-1]}, "greater than or equal to 0"),
        ({"input": None}, "bits may differ alone"),
        ({"layers": [1, 2]}, "name up_proj of layer 2 twice"),
        ({"weight": {"bits": 3}}, "Input should be 2, 4 or 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_section(change: dict[str, Any], message: str, quad) -> None:
    section = json.loads(json.dumps(quad.section()))
    assert read_format(section) == quad
    place = next(index for index, each in enumerate(section["overrides"]) if each["role"] == "up_proj")
    section["overrides"][place] |= change
    with pytest.raises(ValueError, match=message):
        read_format(section)


def test_a_layer_that_the_model_does_not_have(mixed, tmp_path) -> None:
    copy = shutil.copytree(mixed[1], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quad"]["overrides"][0]["layers"] = [7]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="name layer 7, and the model has 3 layers"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_patterns_of_the_config_groups_name_each_linear_once(mixed) -> None:
    model, folder = mixed
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found: dict[str, list[int]] = {}
    for group in config["config_groups"].values():
        for name, module in model.named_modules():
            if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
                assert module.grid.bits == group["weights"]["num_bits"]
                found.setdefault(name, []).append(group["weights"]["num_bits"])
    assert len(found) == 6 * 3
    assert all(len(widths) == 1 for widths in found.values())
