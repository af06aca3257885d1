"""Every cell of docs/reference/support.md that needs no vLLM: each model type with the recipes, and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quad_kernels import choose_backend
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.nn.native_block import NativeBlock, NativeNorm
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.support_table import FLOAT_INPUTS, PACKED_OUTLIERS, PLAIN_RECIPES, supported
from tests.continuation import PROMPT, at_once, by_tokens
from tests.test_checkpoint.test_export import recipe as exportable
from tests.test_checkpoint.test_native_block import Recorder
from tests.test_checkpoint.test_reload import RECIPES, recipe_text

ROWS = {row.model_type: row for row in supported()}
ALWAYS = ("quad_w4a4", "quad_w4a4_portable")
CELLS = [
    pytest.param(name, recipe, marks=() if recipe in ALWAYS else pytest.mark.slow, id=f"{name}-{recipe}")
    for name, row in ROWS.items()
    for recipe in row.recipes
]
PROJECTION = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: 8, basis: {basis}, o_proj_rank_per_head: 2, down_proj_rank: 8}}
"""
# No input lies on a tie of a grid of 8 bits that two runtimes round differently.
PORTABLE_8_BITS = recipe_text("quad_w4a4_portable").replace("_bits: 4 ", "_bits: 8 ")


@pytest.fixture(scope="module")
def made(compress_toy: Callable[..., Any]) -> Callable[[str, str], Any]:
    """Return `made(model_type, recipe)`: the toy compressed by a published recipe, once for all tests."""
    done: dict[tuple[str, str], Any] = {}

    def make(model_type: str, recipe: str) -> Any:
        if (model_type, recipe) not in done:
            done[model_type, recipe] = compress_toy(recipe_text(recipe), model_type)
        return done[model_type, recipe]

    return make


@pytest.mark.parametrize("basis", ["extended", "square"])
@pytest.mark.parametrize("model_type", ROWS)
def test_a_projection_alone_changes_nothing(model_type, basis, make_toy, compress_toy, logits_of) -> None:
    wanted = logits_of(make_toy(model_type, tie_word_embeddings=True))
    made = compress_toy(PROJECTION.format(basis=basis), model_type, tie_word_embeddings=True)
    assert float((made.logits - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def clip_less_than_all(containers: list[QuadLinear]) -> None:
    """Takes inputs off the grid of ResQ's clip ratio of 1, on which the largest of each token lies on a tie.

    -1 times absmax is -7.5 steps there: any two orders of summation round it to -8 and to -7.
    """
    for linear in containers:
        for name in ("input_quantization", "outlier_quantization"):
            quantization = getattr(linear, name)
            if quantization is not None and quantization.clip_ratio == 1.0:
                setattr(linear, name, replace(quantization, clip_ratio=0.97))


@pytest.mark.parametrize(("model_type", "recipe"), CELLS)
def test_a_recipe_runs_saves_and_reloads(model_type, recipe, made, logits_of) -> None:
    compressed = made(model_type, recipe)
    assert bool(torch.isfinite(compressed.logits).all())
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    difference = float((logits_of(model) - compressed.logits).norm() / compressed.logits.norm())
    if recipe in PLAIN_RECIPES:
        assert not type(model).__name__.startswith("Quad")
        assert difference < 0.25  # the largest input of each token lies on a tie of the grid
        return
    assert difference == 0
    containers = [module for module in model.modules() if isinstance(module, QuadLinear)]
    roles = len(ROWS[model_type].architecture.roles())
    assert len(containers) == 2 * roles
    clip_less_than_all(containers)
    found, wanted = by_tokens(model), at_once(model)
    # The same linears; attention adds up in another order, and a rounding may fall the other way.
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    generated = model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 16)


@pytest.mark.parametrize("model_type", ROWS)
def test_the_portable_recipe_computes_the_same_with_8_bits(model_type, compress_toy, logits_of) -> None:
    made = compress_toy(PORTABLE_8_BITS, model_type)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert float((logits_of(model) - made.logits).norm() / made.logits.norm()) < 2e-2


@pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")
@pytest.mark.parametrize("model_type", ROWS)
def test_native_kernels_run_the_blocks_that_they_know(model_type, made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made(model_type, "quad_w4a4").folder)
    with Recorder() as recorder, torch.no_grad():
        model(PROMPT)
    assert ("block_in" in recorder.names) == ROWS[model_type].native
    if not ROWS[model_type].native:
        assert not any(isinstance(module, NativeBlock | NativeNorm) for module in model.modules())
        assert "forward" not in model.model.__dict__


@pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=pytest.mark.slow if "tuned" in name else ())
        for name in ROWS["llama"].recipes
        if name not in PLAIN_RECIPES
    ],
)
def test_native_blocks_take_the_recipes_that_quantize_inputs(recipe, made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made("llama", recipe).folder)
    with Recorder() as recorder, torch.no_grad():
        model(PROMPT)
    assert ("block_in" in recorder.names) == (recipe not in (*FLOAT_INPUTS, *PACKED_OUTLIERS))


@pytest.mark.parametrize("model_type", ROWS)
def test_torch_compile_captures_one_graph(model_type, made, logits_of) -> None:
    compressed = made(model_type, "quad_w4a4")
    model = AutoModelForCausalLM.from_pretrained(compressed.folder)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    difference = float((logits_of(model) - compressed.logits).norm() / compressed.logits.norm())
    assert difference < 0.1


@pytest.mark.parametrize("model_type", ROWS)
def test_a_plain_export_loads_as_the_stock_model(model_type, compress_toy, logits_of, tmp_path: Path) -> None:
    made = compress_toy(exportable(), model_type)
    export_compressed_tensors(made.folder, tmp_path / "out", 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == model_type
    # The outliers, which the source keeps in full precision, have 4 bits now.
    assert float((logits_of(model) - made.logits).norm() / made.logits.norm()) < 0.5


@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if len(row.recipes) < len(RECIPES)])
def test_a_fused_linear_that_would_be_smoothed_is_refused_before_the_work(model_type, make_toy, tmp_path) -> None:
    from quad_modifiers import oneshot

    model = make_toy(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"SmoothQuantModifier smooths 're:\.\*up_proj\$', but the gate_up_proj of"):
        oneshot(model, "smoothquant_quad_w4a4", dataset=PROMPT, output_dir=tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()


def test_longrope_keeps_the_factors_of_the_original(make_toy, compress_toy, logits_of) -> None:
    """Stock Phi-3 counts them by hidden_size; the extended basis makes it larger by half here, and head_dim stays."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **factors}
    longrope = {"rope_parameters": rope, "original_max_position_embeddings": 8}
    recipe = "quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 32}\n"
    made = compress_toy(recipe, "phi3", **longrope)
    wanted = logits_of(make_toy("phi3", **longrope))
    assert float((made.logits - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def test_a_model_that_was_saved_can_be_dequantized(made, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made("llama", "quad_w4a4").folder)
    model.save_pretrained(tmp_path / "again")
    assert model.dequantize().dtype == torch.float32
