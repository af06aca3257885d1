"""A term of the linear: it lowers the error, and goes wherever a model goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import BRANCH, PROJECT, QUANTIZE, TOKENS, Compress, Compressed, logits_of, toy
from quad_method_plugin.low_rank import LowRank
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quad_modifiers.checkpoint.loader import QuadQuantizationConfig
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.cli.main import app

UP = "model.layers.1.mlp.down_proj.low_rank.up"


def terms(model: torch.nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


def test_the_branch_lowers_the_error(branched: Compressed, compress: Compress) -> None:
    without = compress(PROJECT, *QUANTIZE)
    print(f"relative error of the logits: {without.error:.4f} without, {branched.error:.4f} with the branch")
    assert branched.error < 0.9 * without.error
    for term in terms(branched.model):
        term.up.zero_()
    broken = logits_of(branched.model)
    assert float((broken - branched.original).norm() / branched.original.norm()) > 2 * branched.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_it_gives_the_same_logits_and_saves_to_the_same_bytes(
    dtype: torch.dtype, compress: Compress, tmp_path: Path
) -> None:
    made = compress(PROJECT, BRANCH, *QUANTIZE, dtype=dtype)
    assert made.quad["format_version"] == 3
    assert {kind for linear in made.quad["linears"].values() for kind in linear["terms"]} == {"low_rank"}
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert len(terms(loaded)) == 14
    assert torch.equal(logits_of(loaded), made.logits)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (made.folder / "model.safetensors").read_bytes()
    again = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quad"]
    assert again == made.quad
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), made.logits)


def test_a_plain_model_has_the_term_in_its_weights(compress: Compress) -> None:
    made = compress(PROJECT, BRANCH, "OutlierSplitGPTQ: {method: rtn}")
    plain = AutoModelForCausalLM.from_pretrained(
        made.folder, quantization_config=QuadQuantizationConfig(dequantize=True)
    )
    assert not any(isinstance(module, QuadLinear) for module in plain.modules())
    torch.testing.assert_close(logits_of(plain), made.logits, rtol=1e-4, atol=1e-4)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def mis_shaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:, :-1].contiguous()


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].int()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, f"{UP} is missing"),
        (mis_shaped, rf"{UP} has shape \[72, 7\], needed is \[72, 8\]"),
        (whole_numbers, f"{UP} has dtype I32, needed is torch.float32"),
    ],
)
def test_a_damaged_tensor_is_named(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, branched: Compressed, tmp_path: Path
) -> None:
    shutil.copytree(branched.folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_section_is_named(branched: Compressed, tmp_path: Path) -> None:
    shutil.copytree(branched.folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quad"]["linears"]["o_proj"]["terms"]["low_rank"]["rank"] = "many"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a low_rank term has the field rank"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_projection_after_it_is_refused() -> None:
    from quad_modifiers import oneshot

    recipe = f"a_stage:\n  a_modifiers:\n    {BRANCH}\n    {PROJECT}\n"
    with pytest.raises(ValueError, match=r"q_proj has the term 'low_rank'.*put the projection before"):
        oneshot(toy("llama"), recipe, dataset=TOKENS, max_seq_length=32)


def test_error_correction_sees_it(branched: Compressed, compress: Compress) -> None:
    made = compress(PROJECT, BRANCH, "DynamicActQuant: {}", "OutlierSplitGPTQ: {error_correction: 0.5}")
    print(f"relative error of the logits: {branched.error:.3f} without error correction, {made.error:.3f} with it")
    assert made.error < branched.error
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def test_compiled(branched: Compressed) -> None:
    model = AutoModelForCausalLM.from_pretrained(branched.folder)
    wanted = logits_of(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits_of(model), wanted)


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded(buffers: bool, branched: Compressed, tmp_path: Path) -> None:
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(branched.folder))
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = AutoModelForCausalLM.from_pretrained(
        branched.folder,
        device_map=dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path,
        offload_buffers=buffers,
    )
    assert any(term.up.is_meta for term in terms(model)) == buffers
    for _ in range(2):
        assert torch.equal(logits_of(model), wanted)


def test_adapters_leave_it_as_it_is(branched: Compressed) -> None:
    from quad_peft import get_outlier_model

    model = AutoModelForCausalLM.from_pretrained(branched.folder)
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


def test_tuning_in_the_same_recipe(compress: Compress) -> None:
    made = compress(PROJECT, BRANCH, *QUANTIZE, "OutlierLoRA: {batch_size: 2, validation: 0.3}")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def test_export_refuses_it_by_name(branched: Compressed, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["export", str(branched.folder), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    )
    assert result.exit_code != 0
    assert "the term 'low_rank' has no place in the format" in str(result.exception) + result.output


def test_inspection_measures_it(branched: Compressed, tmp_path: Path) -> None:
    from quad_modifiers.model.architecture import find_architecture
    from quad_modifiers.model.decoder import Decoder
    from quad_modifiers.plugins import architectures
    from quad_modifiers.tools.inspection.measure.inputs import measure_inputs

    model = AutoModelForCausalLM.from_pretrained(branched.folder)
    known = find_architecture(type("Stock", (), {"model_type": "llama"}), architectures())
    rows = measure_inputs(Decoder(model, known), [TOKENS[:1]], "after")
    assert {row.group for row in rows} == {"qkv", "o", "gate_up", "down"}
    with torch.no_grad():
        for term in terms(model):
            term.up.zero_()
    assert measure_inputs(Decoder(model, known), [TOKENS[:1]], "after") != rows


def test_it_is_listed() -> None:
    text = CliRunner().invoke(app, ["plugins"]).output
    for line in (
        "quad-method-plugin",
        "modifier LowRankResidue",
        "architecture twin",
        "kernel backend row_pairs",
        "linear term low_rank",
        "checkpoint section method_note",
    ):
        assert line in text
