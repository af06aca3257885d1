"""A dense export is a stock checkpoint that computes what the dequantized model computes, and says what it lost."""

from __future__ import annotations

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.dense import export_dense
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.records.export_record import read_export

from .conftest import PROBE
from .strangers import logits_without_us

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: {rank}, basis: {basis}, o_proj_rank_per_head: 2, down_proj_rank: 4}}
    {inputs}
    {ends}
    OutlierSplitGPTQ: {{{weights}}}
"""
INPUTS, ENDS = "DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}", "EmbeddingHeadQuant: {}"
PLAIN = """
quad_stage:
  quad_modifiers:
    {inputs}
    OutlierSplitGPTQ: {{method: rtn, bits: 4}}
"""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("model_type", "basis", "weights", "ends", "arguments"),
    [
        pytest.param("llama", "extended", "bits: 4", ENDS, {"attention_bias": True}, id="biases, packed ends"),
        pytest.param("qwen2", "square", "symmetric: false", "", {"tie_word_embeddings": True}, id="tied original"),
        pytest.param("qwen3", "square", "bits: 8, ignore: [lm_head, down_proj]", "", {"size": "odd"}, id="partly"),
    ],
)
def test_stock_transformers_computes_the_dequantized_model(
    model_type, basis, weights, ends, arguments, compress_toy, logits_of, tmp_path
) -> None:
    made = compress_toy(
        RECIPE.format(rank=7, basis=basis, inputs=INPUTS, weights=weights, ends=ends), model_type, **arguments
    )
    hadamards = [module for module in made.model.modules() if isinstance(module, QuadLinear) and module.split.hadamard]
    assert hadamards, "nothing to fold in"
    export_dense(made.folder, tmp_path / "out", "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == (model_type, "float32")
    assert "quantization_config" not in config
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    name, found = logits_without_us(tmp_path / "out", PROBE, tmp_path)
    assert not name.startswith("Quad")
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(made.folder).dequantize())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dtypes(compress_toy, tmp_path) -> None:
    made = compress_toy(
        RECIPE.format(rank=8, basis="square", inputs=INPUTS, weights="bits: 4", ends=""), dtype=torch.bfloat16
    )
    for asked, written in ((None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        folder = export_dense(made.folder, tmp_path / str(asked), asked)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {written}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    rounded = load_file(tmp_path / "None" / "model.safetensors")
    for name, tensor in exact.items():
        torch.testing.assert_close(rounded[name], tensor.bfloat16())
    with pytest.raises(ValueError, match="written in bfloat16, float16, float32, not in 'int8'"):
        export_dense(made.folder, tmp_path / "int8", "int8")
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize(
    ("inputs", "lost"),
    [
        pytest.param("", None, id="weights only"),
        pytest.param(INPUTS, "q_proj 4, .*down_proj 8", id="inputs"),
    ],
)
def test_what_is_lost_is_said(inputs, lost, compress_toy, toy_tokenizer, tmp_path, caplog) -> None:
    made = compress_toy(RECIPE.format(rank=8, basis="square", inputs=inputs, weights="bits: 4", ends=""))
    source = shutil.copytree(made.folder, tmp_path / "source")
    toy_tokenizer.save_pretrained(source)
    with caplog.at_level(logging.WARNING, "quad_modifiers"):
        export_dense(source, tmp_path / "out")
    assert {"tokenizer.json", "calibration.json", "recipe.yaml"} <= {f.name for f in (tmp_path / "out").iterdir()}
    record = read_export(tmp_path / "out")
    assert (record.format, record.source) == ("dense", "QUAD, version 1")
    (note,) = record.notes
    assert ("inputs are not quantized any more" in note) == (lost is not None)
    assert note in caplog.text
    if lost is not None:
        assert re.search(lost, note)


@pytest.mark.parametrize("inputs", ["", "DynamicActQuant: {u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0}"])
def test_of_a_compressed_tensors_checkpoint(inputs, compress_toy, logits_of, tmp_path) -> None:
    made = compress_toy(PLAIN.format(inputs=inputs), "qwen2", tie_word_embeddings=True)
    assert json.loads((made.folder / "config.json").read_text())["quantization_config"]["quant_method"] != "quad"
    export_dense(made.folder, tmp_path / "out")
    name, found = logits_without_us(tmp_path / "out", PROBE, tmp_path)
    assert name == "Qwen2ForCausalLM"
    assert ("inputs are not quantized" in read_export(tmp_path / "out").notes[0]) == bool(inputs)
    difference = relative(found, made.logits)
    print(f"relative difference {difference:.1e}")
    if inputs:
        assert 1e-3 < difference < 1, "the inputs' quantization is gone"
    else:
        assert difference < 1e-5


def test_sources_without_a_plain_form_are_refused(compress_toy, toy_checkpoint, tmp_path) -> None:
    with pytest.raises(ValueError, match="is not quantized; only QUAD and compressed-tensors checkpoints"):
        export_dense(toy_checkpoint("llama"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*nothing"):
        export_dense(tmp_path / "nothing", tmp_path / "out")
    made = compress_toy(RECIPE.format(rank=8, basis="square", inputs="", weights="bits: 4", ends=""))
    source = shutil.copytree(made.folder, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN or infinite values; torch\.float16 cannot hold"):
        export_dense(source, tmp_path / "out", "float16")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN or infinite values; the checkpoint is damaged"):
        export_dense(source, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        export_dense(made.folder, tmp_path / "mine")
    assert not (tmp_path / "out").exists()
