"""LowRankBranch: a part of each weight beside what is quantized, wherever a model goes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from quad_kernels import InputSplit, choose_backend
from safetensors.torch import load_file, save_file

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.nn.quad_linear import QuadLinear
from tests.continuation import TOKENS, at_once, by_tokens
from tests.test_checkpoint.test_native_block import Recorder

pytest.importorskip("llmcompressor")
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quad_modifiers.modifiers.base import prepared_decoder
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.embedding_head_quant import EmbeddingHeadQuant
from quad_modifiers.modifiers.flattened_rotation import FlattenedRotation
from quad_modifiers.modifiers.kv_cache_quant import KVCacheQuant
from quad_modifiers.modifiers.low_rank_branch import LowRankBranch
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.tools.cli.main import app

UP = "model.layers.1.mlp.down_proj.low_rank_branch.up"


def branch(**fields) -> LowRankBranch:
    return LowRankBranch(**{"rank": 8, "rounds": 3, **fields})


def projection(**fields) -> SVDOutlierProjection:
    return SVDOutlierProjection(**{"rank": 8, "o_proj_rank_per_head": 2, "down_proj_rank": 4, **fields})


def run_by_hand(model, *modifiers) -> None:
    """Runs modifiers of which no complete recipe is made."""
    decoder = prepared_decoder(model)
    for linear in decoder.linears():
        linear.module.take_bias()
    ids = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
    for modifier in modifiers:
        modifier.check(decoder)
        with torch.no_grad():
            modifier.run(decoder, lambda: [{"input_ids": row} for row in ids.split(1)])


def terms(model) -> list[BranchTerm]:
    return [module for module in model.modules() if isinstance(module, BranchTerm)]


def linears(model) -> list[QuadLinear]:
    return [module for module in model.modules() if isinstance(module, QuadLinear)]


@pytest.fixture(scope="module")
def branched(make_toy, compress, tmp_path_factory) -> Path:
    """A checkpoint with every feature; never write to its folder."""
    folder = tmp_path_factory.mktemp("branched") / "out"
    compress(
        make_toy("llama", "even"), projection(), branch(), DynamicActQuant(), OutlierSplitGPTQ(), output_dir=folder
    )
    return folder


@pytest.mark.parametrize("split", ["whole", "rank", "everything"])
@pytest.mark.parametrize(("model_type", "size"), [("llama", "even"), ("qwen2", "odd"), ("phi3", "even")])
def test_the_function_stays(model_type, size, split, make_toy, logits_of, assert_same_function) -> None:
    """On its own, and behind outliers and online transforms."""
    model = make_toy(model_type, size)
    wanted = logits_of(model)
    before = [] if split == "whole" else [projection(**({} if split == "everything" else {"online_rotation": []}))]
    run_by_hand(model, *before, branch())
    assert len(terms(model)) == len(linears(model)) > 0
    assert all(term.down.shape[0] == 8 for term in terms(model))
    assert_same_function(logits_of(model), wanted)
    for linear in linears(model):
        (term,) = linear.terms()
        assert not term.down[:, linear.split.outlier_index()].any(), "outlier columns are in full precision anyway"
        assert term.dense().norm() > 0.05 * linear.residual.weight.norm()


def test_bfloat16(make_toy, logits_of, assert_same_function) -> None:
    model = make_toy("llama", "even", dtype=torch.bfloat16)
    wanted = logits_of(model)
    run_by_hand(model, projection(), branch())
    assert {term.up.dtype for term in terms(model)} == {torch.bfloat16}
    assert_same_function(logits_of(model), wanted, bound=6e-2)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_lowers_the_error(method, make_toy, compress, logits_of) -> None:
    errors = []
    for extra in ([], [branch(rank=16)]):
        model = make_toy("llama", "even")
        wanted = logits_of(model)
        compress(model, projection(), *extra, DynamicActQuant(), OutlierSplitGPTQ(method=method))
        errors.append(relative_error(logits_of(model), wanted))
    print(f"relative error of the logits: {errors[0]:.3f} without, {errors[1]:.3f} with the branch")
    assert errors[1] < 0.9 * errors[0]


def test_weights_and_inputs_of_zeros(make_toy, compress, logits_of) -> None:
    """As in a block that was put in: its branch is zero too."""
    model = make_toy("llama", "even")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()  # so that down_proj reads zeros
    compress(model, projection(), branch(), DynamicActQuant(), OutlierSplitGPTQ())
    mlp = model.model.layers[1].mlp
    assert not mlp.up_proj.terms()[0].dense().any()
    assert torch.isfinite(logits_of(model)).all()
    assert torch.isfinite(mlp.down_proj.terms()[0].dense()).all()


def test_some_linears_get_none(make_toy, compress) -> None:
    model = compress(
        make_toy("llama", "even"),
        projection(),
        branch(ignore=["lm_head", "down_proj", "re:.*q_proj$"]),
        DynamicActQuant(),
        OutlierSplitGPTQ(method="rtn"),
    )
    assert {linear.role for linear in linears(model) if linear.terms()} == {
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_it_gives_the_same_logits_and_saves_to_the_same_bytes(
    dtype, make_toy, compress, logits_of, tmp_path
) -> None:
    folder = tmp_path / "out"
    modifiers = [projection(), FlattenedRotation(rounds=2, tokens=200), branch(), DynamicActQuant(), OutlierSplitGPTQ()]
    model = compress(make_toy("llama", "even", dtype=dtype), *modifiers, output_dir=folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert len(terms(loaded)) == 14
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    files = [(each / "model.safetensors").read_bytes() for each in (folder, tmp_path / "again")]
    assert files[0] == files[1]
    quad = json.loads((folder / "config.json").read_text())["quantization_config"]["quad"]
    assert quad["format_version"] == 3
    assert {str(linear["terms"]) for linear in quad["linears"].values()} == {"{'low_rank_branch': {'rank': 8}}"}


def test_keys_and_values_in_4_bits_as_well(make_toy, compress, logits_of, tmp_path) -> None:
    modifiers = [projection(), FlattenedRotation(rounds=2, tokens=200), branch(), DynamicActQuant(), OutlierSplitGPTQ()]
    model = compress(make_toy("llama", "even"), *modifiers, KVCacheQuant(), output_dir=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(model))
    found, wanted = by_tokens(loaded), at_once(loaded)
    assert relative_error(found, wanted) < 2e-2
    with torch.no_grad():
        assert loaded(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values.layers[0].keys.dtype == torch.uint8


def test_a_plain_model_has_it_in_its_weights(make_toy, compress, logits_of, tmp_path) -> None:
    activations = DynamicActQuant(u_type_bits=8, d_type_bits=None)
    model = compress(
        make_toy("llama", "even"),
        projection(),
        branch(),
        activations,
        OutlierSplitGPTQ(method="rtn"),
        output_dir=tmp_path / "out",
    )
    for linear in linears(model):
        linear.quantize_input = False
    wanted = logits_of(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    assert not linears(plain)
    torch.testing.assert_close(logits_of(plain), wanted, rtol=1e-4, atol=1e-4)


def test_a_token_at_a_time(branched) -> None:
    model = AutoModelForCausalLM.from_pretrained(branched)
    found, wanted = by_tokens(model), at_once(model)
    assert relative_error(found, wanted) < 2e-2
    for term in terms(model):
        term.up.zero_()
    assert relative_error(by_tokens(model), wanted) > 0.1, "the branch counts token by token as well"


def native_operators(model, run) -> list[str]:
    with Recorder() as recorder:
        run(model)
    return recorder.names


@pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")
def test_native_blocks_take_it_and_hear_of_changes(branched) -> None:
    model = AutoModelForCausalLM.from_pretrained(branched)
    wanted = by_tokens(model)
    assert native_operators(model, by_tokens).count("decode") == TOKENS.shape[1]
    (term,) = model.model.layers[1].mlp.down_proj.terms()
    before, term.up.data = term.up.data, 3 * term.up.data
    assert relative_error(by_tokens(model), wanted) > 1e-3
    term.up.data = before
    assert torch.equal(by_tokens(model), wanted)
    heard = []
    hook = term.register_forward_hook(lambda module, args, output: heard.append(output))
    names = native_operators(model, by_tokens)
    assert len(heard) == 1 + TOKENS.shape[1], "once for the prompt and for each token"
    assert "decode" not in names
    assert "block_out" in names, "the other block is as native as before"
    assert relative_error(by_tokens(model), wanted) < 2e-2
    hook.remove()
    assert torch.equal(by_tokens(model), wanted)


def test_compiled_it_gives_the_same_logits(branched, token_ids) -> None:
    model = AutoModelForCausalLM.from_pretrained(branched)
    ids = token_ids(2, 9)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_adapters_leave_it_as_it_is(branched, logits_of) -> None:
    pytest.importorskip("peft")
    from quad_peft import get_outlier_model

    model = AutoModelForCausalLM.from_pretrained(branched)
    wanted = logits_of(model)
    adapted = get_outlier_model(model)
    assert torch.equal(logits_of(adapted), wanted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned = logits_of(adapted)
    assert not torch.equal(tuned, wanted)
    merged = adapted.merge_and_unload()
    assert len(terms(merged)) == 14
    torch.testing.assert_close(logits_of(merged), tuned)


def test_export_refuses_it_by_name(branched, tmp_path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(branched), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    )
    assert result.exit_code != 0
    assert "the term 'low_rank_branch' has no place in the format" in str(result.exception) + result.output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(UP), f"{UP} is missing"),
        (lambda tensors: tensors.update({UP: tensors[UP][:, :-1].contiguous()}), rf"{UP} has shape \[72, 7\], needed"),
    ],
    ids=["missing", "shape"],
)
def test_a_damaged_tensor_is_named(damage, message, branched, tmp_path) -> None:
    shutil.copytree(branched, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "section", [{}, {"rank": "many"}, {"rank": 0}, {"rank": True}, {"rank": 64}, {"rank": 2, "x": 1}]
)
def test_a_damaged_section_is_refused(section) -> None:
    with pytest.raises(ValueError, match="a low_rank_branch term has the field rank, from 1 to below 64"):
        BranchTerm.unset(section, InputSplit(64), 128, torch.float32)


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        (
            (branch(rank=32), DynamicActQuant(), OutlierSplitGPTQ()),
            r"rank \(32\) must be smaller than both sides of .*k_p",
        ),
        ((DynamicActQuant(), OutlierSplitGPTQ(), branch()), "LowRankBranch comes after OutlierSplitGPTQ"),
        ((branch(), projection(), DynamicActQuant(), OutlierSplitGPTQ()), "Projection comes after LowRankBranch"),
        (
            (projection(), branch(), FlattenedRotation(), DynamicActQuant(), OutlierSplitGPTQ()),
            "FlattenedRotation comes after LowRankBranch",
        ),
        ((branch(), DynamicActQuant()), "the recipe quantizes none; add OutlierSplitGPTQ"),
        ((branch(), DynamicActQuant(), EmbeddingHeadQuant()), "the recipe quantizes none; add OutlierSplitGPTQ"),
        ((projection(), branch(), OutlierSplitGPTQ()), "a weight-only recipe leaves all inputs in full precision"),
        ((branch(), branch(), DynamicActQuant(), OutlierSplitGPTQ()), "another LowRankBranch; keep one of them"),
    ],
    ids=["rank", "quantized", "projection", "rotation", "nothing", "ends", "weight-only", "two"],
)
def test_refused_before_anything_is_touched(modifiers, message, refusal_of) -> None:
    assert re.search(message, refusal_of(modifiers))


@pytest.mark.parametrize("field", [{"rank": 0}, {"quantile": 0.2}, {"damping": 0.0}, {"rounds": -1}, {"bits": 4}])
def test_settings_out_of_range(field) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        LowRankBranch(**field)


def test_inspection_measures_it(branched, token_ids) -> None:
    from quad_modifiers.tools.inspection.measure.inputs import measure_inputs

    model = AutoModelForCausalLM.from_pretrained(branched)
    decoder = Decoder(model, Architecture("llama"))
    rows = measure_inputs(decoder, [token_ids(1, 48)], "after")
    with torch.no_grad():
        for term in terms(model):
            term.up.zero_()
    assert measure_inputs(decoder, [token_ids(1, 48)], "after") != rows
