"""Outlier columns in 8 bits: every architecture saves and reloads them, and every way to run a checkpoint has them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quad_kernels import InputQuantization, choose_backend
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.tools.publishing.base_license import License
from quad_modifiers.tools.publishing.sections import write_sections
from quad_modifiers.tools.support_table import supported
from tests.continuation import at_once, by_tokens
from tests.test_checkpoint.test_native_block import Recorder

PROJECTION = "SVDOutlierProjection: {rank: 10, basis: square, o_proj_rank_per_head: 3}"
RECIPE = f"""
quad_stage:
  quad_modifiers:
    {PROJECTION}
    DynamicActQuant: {{outlier_bits: 8, d_type_bits: 5}}
    OutlierSplitGPTQ: {{outlier_bits: 8}}
"""
WEIGHTS_ONLY = f"""
quad_stage:
  quad_modifiers:
    {PROJECTION}
    DynamicActQuant: {{d_type_bits: null}}
    OutlierSplitGPTQ: {{outlier_bits: 8}}
"""
EXPORTABLE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 16, basis: square, online_rotation: []}
    DynamicActQuant:
      {u_type_bits: 8, d_type_bits: 8, strategy: group, group_size: 16, u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0,
      outlier_bits: 8}
    OutlierSplitGPTQ: {bits: 8, group_size: 16, outlier_bits: 8}
"""
NAME = "model.layers.1.self_attn.q_proj"
native = pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")


@pytest.fixture(scope="module")
def folder(compress_toy: Callable[..., Any]) -> Path:
    """A llama toy; never write to it."""
    return compress_toy(RECIPE).folder


def containers(model: Any) -> dict[str, QuadLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuadLinear)}


def as_weights_only(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in containers(model).values():
        module.quantize_input = False
        module.input_quantization = None
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [row.model_type for row in supported()])
def test_every_architecture_reloads_exactly(model_type: str, dtype: torch.dtype, compress_toy, logits_of) -> None:
    made = compress_toy(RECIPE, model_type, dtype=dtype)
    reloaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert reloaded.dtype == dtype
    assert torch.equal(logits_of(reloaded), made.logits)
    for name, module in containers(reloaded).items():
        assert (module.packed_outlier is not None) == bool(module.split.rank), name
    assert any(module.packed_outlier is not None for module in containers(reloaded).values())
    found, wanted = by_tokens(reloaded), at_once(reloaded)
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("recipe", [RECIPE, WEIGHTS_ONLY], ids=["weights and inputs", "weights"])
def test_what_is_stored_is_what_computes(recipe: str, compress_toy, logits_of, tmp_path: Path) -> None:
    made = compress_toy(recipe)
    quad = json.loads((made.folder / "config.json").read_text())["quantization_config"]["quad"]
    bits = 8 if recipe == RECIPE else None
    assert quad["format_version"] == 5
    assert quad["linears"]["q_proj"]["outlier"] == {"weight_bits": 8, "input_bits": bits}
    # Inputs of o_proj are not quantized in the second recipe: neither are its outliers.
    assert quad["linears"]["o_proj"]["outlier"] == {"weight_bits": 8, "input_bits": bits}
    assert quad["linears"]["down_proj"]["outlier"] is None
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    layer = model.get_submodule(NAME)
    assert isinstance(layer.outlier, PackedLinear)
    assert layer.outlier_quantization == (None if bits is None else InputQuantization(8))
    assert torch.equal(
        layer.outlier.quantized_weight().integers, made.model.get_submodule(NAME).outlier.quantized_weight().integers
    )
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (made.folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), made.logits)


def test_outliers_stay_close_to_full_precision(make_toy, compress_toy, logits_of) -> None:
    """8 bits for weights and inputs of the outliers cost little beside 4 bits for the rest."""
    wanted = logits_of(make_toy())
    errors = {}
    for name, recipe in {"8 bits": RECIPE, "16 bits": RECIPE.replace("outlier_bits: 8", "outlier_bits: null")}.items():
        errors[name] = float((compress_toy(recipe).logits - wanted).norm() / wanted.norm())
    print(errors)
    assert errors["8 bits"] < 1.1 * errors["16 bits"]
    assert errors["8 bits"] != errors["16 bits"]


def test_an_ignored_linear_keeps_its_outliers_as_they_are(compress_toy, logits_of) -> None:
    made = compress_toy(RECIPE.replace("{outlier_bits: 8}", "{outlier_bits: 8, ignore: [lm_head, k_proj]}"))
    linears = json.loads((made.folder / "config.json").read_text())["quantization_config"]["quad"]["linears"]
    assert linears["k_proj"]["outlier"] is None
    assert linears["k_proj"]["input"]["bits"] == 4
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    layer = model.get_submodule(NAME.replace("q_proj", "k_proj"))
    assert layer.outlier_weight is not None
    assert layer.outlier_quantization is None
    assert torch.equal(logits_of(model), made.logits)


def test_without_calibration(compress_toy, logits_of) -> None:
    made = compress_toy(RECIPE.replace("{outlier_bits: 8}", "{outlier_bits: 8, method: rtn}"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)
    assert made.model.get_submodule(NAME).packed_outlier is not None


@native
def test_native_blocks_and_steps_leave_it_to_the_stock_forward(folder: Path, compressed) -> None:
    """They would multiply outliers in floating point; a checkpoint without 8-bit outliers does run there."""
    prompt = torch.tensor([[5, 17, 40, 8, 21, 30]])
    for path, runs in ((folder, False), (compressed.folder, True)):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad(), Recorder() as recorder:
            past = model(prompt, use_cache=True).past_key_values
            model(prompt[:, :1], past_key_values=past, use_cache=True)
        assert ("block_in" in recorder.names, "decode" in recorder.names) == (runs, runs)
        tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        assert tokens.shape == (1, 10)


def test_backends_agree(folder: Path, logits_of, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for backend in ("reference", "onednn", choose_backend("cpu").name):
        monkeypatch.setenv("QUAD_KERNELS", backend)
        found.append(logits_of(AutoModelForCausalLM.from_pretrained(folder)))
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-3


def test_copies_pickles_and_states(folder: Path, logits_of) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other), wanted)
    states = model.state_dict()
    assert f"{NAME}.outlier.weight_packed" in states
    model.get_submodule(NAME).outlier.weight_scale.zero_()
    assert not torch.equal(logits_of(model), wanted)
    model.load_state_dict(
        states
        | {f"{NAME}.outlier.weight_scale": load_file(folder / "model.safetensors")[f"{NAME}.outlier.weight_scale"]}
    )
    assert torch.equal(logits_of(model), wanted)


def test_offloaded(folder: Path, logits_of) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits_of(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(logits_of(model), wanted)


def test_a_compiled_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 17, 40, 8, 21, 30]])
    with torch.no_grad():
        wanted = model(ids).logits
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        got = model(ids).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-3


def test_dequantized(folder: Path, logits_of) -> None:
    wanted = logits_of(as_weights_only(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert type(model).__module__.startswith("transformers.")
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)


def test_exported(compress_toy, logits_of, tmp_path: Path) -> None:
    made = compress_toy(EXPORTABLE)
    export_compressed_tensors(made.folder, tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    assert not [target for target in targets if "outlier" in target]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float((logits_of(model) - made.logits).norm() / made.logits.norm()) < 0.1


def test_the_inventory_and_the_card_name_them(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    inventory = read_inventory(folder)
    outliers = [tensor for name, tensor in tensors.items() if ".outlier." in name]
    assert inventory.bytes_of["outlier"] == sum(each.numel() * each.element_size() for each in outliers)
    assert inventory.format == "QUAD, version 5"
    quad = json.loads((folder / "config.json").read_text())["quantization_config"]
    targets = [(group["targets"], group["weights"]["num_bits"]) for group in quad["config_groups"].values()]
    assert [bits for names, bits in targets if r"re:.*\.q_proj\.outlier$" in names] == [8]
    assert [bits for names, bits in targets if r"re:.*\.q_proj\.residual$" in names] == [4]
    card = "\n".join(write_sections(folder, inventory, "me/toy", None, License("mit"), None).values())
    assert "| q_proj | 4 | output channel | 4 | token | 0.92 | 10 of 64, weights 8 bits, inputs 8 bits | no |" in card
    assert "| 0 of 128 | yes |" in card
    assert "| outlier inputs |" in card
    assert "Outliers in 8 bits have scales of their own" in card


def test_inspected_and_compared(folder: Path, compressed, toy_tokenizer, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from quad_modifiers.tools.inspection import compare_checkpoints, inspect_model

    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "checksums.json").unlink()
    toy_tokenizer.save_pretrained(tmp_path / "copy")
    found = inspect_model(
        tmp_path / "copy", tmp_path / "report", dataset=str(text), samples=4, eval_windows=2, seq_length=32
    )
    assert found.subject.rank == 10
    assert max(row.divergence for row in found.losses) > 0, "rounding inputs, outliers included, changes something"
    first, second = compare_checkpoints([tmp_path / "copy", compressed.folder]).entries
    assert (first.format, second.format) == ("QUAD, version 5", "QUAD, version 1")
    assert first.widths == "w4a4a5"


def test_adapters_on_them_are_refused(folder: Path, logits_of) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    from quad_peft import OutlierLoraConfig, get_outlier_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits_of(model)
    with pytest.raises(ValueError, match=r"cannot adapt .*q_proj: the outlier weights of this checkpoint are 8-bit"):
        get_outlier_model(model, OutlierLoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits_of(model), wanted), "the model is unchanged"
    plain = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    assert torch.equal(logits_of(plain), wanted)
    plain(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    gradients = [each.grad for name, each in plain.named_parameters() if "lora_B" in name]
    assert len(gradients) == 6
    assert all(bool(gradient.any()) for gradient in gradients)
    with pytest.raises(ValueError, match="nothing can be merged into q_proj: the outlier weights"):
        plain.merge_adapter()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("weight_packed", "q_proj.outlier.weight_packed is missing"),
        ("weight_scale", "q_proj.outlier.weight_scale is missing"),
    ],
)
def test_missing_parts(tensor: str, message: str, tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{NAME}.outlier.{tensor}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outlier": {"weight_bits": 4, "input_bits": 8}}, r"linears\.q_proj\.outlier\.weight_bits"),
        ({"outlier": {"weight_bits": 8, "input_bits": 4}}, r"linears\.q_proj\.outlier\.input_bits"),
        ({"outliers_per_block": 0}, "only where there are some"),
        ({"weight": None}, "beside a quantized weight"),
        ({"input": None}, "outlier inputs are quantized only where the others are"),
        ({"outlier": None}, "is not part of the model"),
    ],
    ids=["4-bit weights", "4-bit inputs", "no outliers", "no weight", "no input", "full precision"],
)
def test_damaged_sections(change: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quad"]["linears"]["q_proj"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
