"""4-bit floating-point numbers in recipes: what they gain, what refuses them, who can load them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from quad_kernels import FloatGrid, InputQuantization
from transformers import AutoModelForCausalLM

from quad_modifiers import oneshot
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.recipe import validate_recipe

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 16, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {INPUTS}
    OutlierSplitGPTQ: {WEIGHTS}
"""
FORMATS = ["nvfp4", "mxfp4"]


def recipe(inputs: str, weights: str) -> str:
    return RECIPE.replace("{INPUTS}", f"{{{inputs}}}").replace("{WEIGHTS}", f"{{{weights}}}")


@pytest.mark.parametrize("number_format", FORMATS)
def test_linears_have_the_format_that_was_asked_for(number_format: Any, make_toy, compress) -> None:
    model = compress(
        make_toy(size="even"),
        SVDOutlierProjection(rank=16),
        DynamicActQuant(number_format=number_format, u_type_clip_ratio=1.0, d_type_clip_ratio="auto"),
        OutlierSplitGPTQ(number_format=number_format),
    )
    size = FloatGrid(number_format).group_size
    for module in model.modules():
        if isinstance(module, QuadLinear):
            assert module.residual.grid == FloatGrid(number_format)
            clip = module.input_quantization.clip_ratio
            assert module.input_quantization == InputQuantization(4, clip, size, number_format=number_format)
            assert (clip == 1.0) == (module.role not in ("o_proj", "down_proj"))


def test_finer_formats_lose_less(make_quad_toy, make_toy, token_ids) -> None:
    clip, errors = "u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0", {}
    with torch.no_grad():
        wanted = make_toy(size="even")(token_ids()).logits
        for number_format in ("int", *FORMATS):
            chosen = f"number_format: {number_format}"
            logits = make_quad_toy(recipe(f"{clip}, {chosen}", chosen), size="even")[0](token_ids()).logits
            errors[number_format] = float((logits - wanted).square().mean())
    print(f"squared errors {errors}")
    assert errors["nvfp4"] < 0.95 * errors["int"]
    assert errors["nvfp4"] < 0.9 * errors["mxfp4"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("number_format: nvfp4, group_size: 32", "groups of nvfp4 are of 16, not 32"),
        ("number_format: nvfp4, bits: 8", "numbers of nvfp4 have 4 bits, not 8"),
        ("number_format: mxfp4, overrides: [{layers: 0, bits: 8}]", "numbers of mxfp4 have 4 bits, not 8"),
        ("number_format: mxfp4, symmetric: false", "neither sub_scale_bits nor zero points"),
        ("number_format: mxfp4, scale_candidates: [1.0, 0.9]", "scale_candidates .* are for integers"),
        ("number_format: fp8", "number_format"),
    ],
)
def test_weights_that_do_not_go_with_them_are_refused(weights: str, message: str) -> None:
    (problem,) = validate_recipe(recipe("", weights))
    assert problem.line == 6
    assert re.search(message, f"{problem.message}. {problem.remedy}")


def test_widths_that_are_no_whole_groups_are_refused(make_toy) -> None:
    ids = torch.arange(4 * 512).reshape(4, 512) % 300 + 3
    with pytest.raises(ValueError, match=r"group_size \(16\) must divide"):
        oneshot(make_toy(size="odd"), recipe("", "number_format: nvfp4"), dataset=ids)
    with pytest.raises(ValueError, match=r"group_size \(32\) must divide the residual width"):
        oneshot(make_toy(size="odd"), recipe("number_format: mxfp4", ""), dataset=ids)


MXFP4_INPUTS = "DynamicActQuant: {number_format: mxfp4, u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0}, "


@pytest.mark.parametrize(("number_format", "inputs"), [("mxfp4", MXFP4_INPUTS), ("mxfp4", ""), ("nvfp4", "")])
def test_without_outliers_it_is_a_plain_checkpoint(number_format: str, inputs: str, make_quad_toy, token_ids) -> None:
    """transformers' own loader, by compressed-tensors alone, computes what this package computes."""
    weights = f"OutlierSplitGPTQ: {{number_format: {number_format}}}"
    text = f"quad_stage: {{quad_modifiers: {{{inputs}{weights}}}}}"
    model, folder = make_quad_toy(text, size="even", dtype=torch.bfloat16)  # the dtype that compressed-tensors has
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", f"{number_format}-pack-quantized")
    model.set_attn_implementation("sdpa")  # as transformers' own loader chooses
    with torch.no_grad():
        wanted = model(token_ids()).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert not any(isinstance(module, QuadLinear) for module in loaded.modules())
        measured = float((loaded(token_ids()).logits - wanted).norm() / wanted.norm())
    print(f"relative difference {measured:.1e}")
    assert measured < 1e-3
