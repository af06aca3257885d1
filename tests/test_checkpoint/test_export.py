"""A portable export: stock transformers computes what it should, and what cannot be expressed is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from quad_kernels import fake_quantize
from quad_kernels.weight import expand_scales
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint import save as saving
from quad_modifiers.checkpoint.export import PORTABLE_RECIPE, export_compressed_tensors
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.recipe import builtin_recipe_folder

from .strangers import logits_without_us

PROJECTION = "rank: 16, basis: square, online_rotation: [], o_proj_rank_per_head: 8, down_proj_rank: 16"
GROUPS = "strategy: group, group_size: 8, u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0"
RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{{projection}}}
    DynamicActQuant: {{{inputs}}}
    {ends}
    OutlierSplitGPTQ: {{{weights}}}
"""


def recipe(projection=PROJECTION, inputs=GROUPS, weights="group_size: 8", ends="") -> str:
    return RECIPE.format(projection=projection, inputs=inputs, weights=weights, ends=ends)


def unpacked(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """The weight that compressed-tensors reads."""
    integers = unpack_from_int32(
        tensors[f"{name}.weight_packed"], bits, torch.Size(tensors[f"{name}.weight_shape"].tolist())
    ).float()
    columns = integers.shape[1]
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight_zero_point" in tensors:
        zero = unpack_from_int32(
            tensors[f"{name}.weight_zero_point"], bits, torch.Size((integers.shape[0], scale.shape[1])), packed_dim=0
        )
        integers = integers - expand_scales(zero.float(), columns)
    return integers * expand_scales(scale, columns)


@pytest.mark.parametrize(
    ("model_type", "made_by", "bits", "size"),
    [
        pytest.param("llama", recipe(), 4, 8, id="groups"),
        pytest.param("qwen2", recipe(weights="group_size: 8, symmetric: false"), 4, 8, id="zero points"),
        pytest.param("qwen3", recipe(inputs=GROUPS + ", d_type_bits: 8", weights="bits: 8"), 8, 8, id="8 bits"),
        pytest.param(
            "mistral",
            recipe(inputs="u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0", weights="bits: 4"),
            4,
            8,
            id="per token and channel",
        ),
        pytest.param("llama", recipe(inputs=GROUPS + ", symmetric: false"), 4, 8, id="zero points of inputs"),
        pytest.param("llama", recipe(inputs="u_type_bits: null, d_type_bits: null"), 4, 8, id="weights only"),
        pytest.param(
            "qwen3",
            recipe(
                inputs=GROUPS + ", overrides: [{layers: 1, linears: down_proj, bits: 8}]",
                weights="group_size: 8, overrides: [{layers: 1, bits: 8}]",
            ),
            (4, 8),
            8,
            id="other bits in a block",
        ),
    ],
)
def test_stock_transformers_computes_the_group_wise_model(
    model_type, made_by, bits, size, compress_toy, logits_of, tmp_path, request
) -> None:
    from .conftest import PROBE

    if "group_size: 8, symmetric: false}" in made_by.partition("OutlierSplitGPTQ")[2]:
        request.getfixturevalue("stock_zero_points")

    shared = model_type == "llama"  # one table in the source, which the export makes two
    made = compress_toy(made_by, model_type, attention_bias=True, tie_word_embeddings=shared)
    export_compressed_tensors(made.folder, tmp_path / "out", None if "group_size" in made_by else size)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["model_type"] == model_type
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in tensors if "residual" in name or "outlier" in name]

    source = AutoModelForCausalLM.from_pretrained(made.folder)
    reference = AutoModelForCausalLM.from_pretrained(made.folder).dequantize()
    for name, container in source.named_modules():
        if not isinstance(container, QuadLinear):
            continue
        stored = bits if isinstance(bits, int) else bits[int(name.split(".")[2])]
        weight, linear = unpacked(tensors, name, stored), reference.get_submodule(name)
        outliers = container.split.outlier_index()
        assert len(outliers) >= 16
        kept = torch.ones(weight.shape[1], dtype=torch.bool)
        kept[outliers] = False
        # dequantized() rounds the same product of integer and scale
        torch.testing.assert_close(weight[:, kept], linear.weight[:, kept].detach(), rtol=1e-6, atol=1e-9)
        step = expand_scales(tensors[f"{name}.weight_scale"], weight.shape[1])[:, outliers]
        error = (weight[:, outliers] - linear.weight[:, outliers].detach()).abs()
        assert float((error < 0.51 * step).float().mean()) > 0.9, "the clip search may cut a few"
        linear.weight.data = weight
        if container.input_quantization is not None:
            grid = replace(container.input_quantization, clip_ratio=1.0, group_size=size)
            linear.register_forward_pre_hook(lambda _, args, grid=grid: (fake_quantize(args[0], grid),))
    wanted = logits_of(reference)
    name, found = logits_without_us(tmp_path / "out", PROBE, tmp_path)
    assert not name.startswith("Quad")
    difference = float((found - wanted).norm() / wanted.norm())
    print(f"relative difference {difference:.1e}, bound 1e-3")
    assert difference < 1e-3


def test_unquantized_roles_and_8_bit_ends(compress_toy, logits_of, tmp_path) -> None:
    from .conftest import PROBE

    made = compress_toy(
        recipe(
            inputs="u_type_bits: null, d_type_bits: null",
            weights='group_size: 8, method: rtn, ignore: [lm_head, "re:.*o_proj$"]',
            ends="EmbeddingHeadQuant: {}",
        )
    )
    export_compressed_tensors(made.folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.o_proj.weight" in tensors
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight_packed" in tensors
    _, found = logits_without_us(tmp_path / "out", PROBE, tmp_path)
    # Only the outlier columns are rounded further, to 4 bits.
    difference = float((found - made.logits).norm() / made.logits.norm())
    print(f"relative difference {difference:.1e}, bound 0.2")
    assert 1e-3 < difference < 0.2


def test_companion_files_go_along(compress_toy, toy_tokenizer, tmp_path) -> None:
    made = compress_toy(recipe())
    source = shutil.copytree(made.folder, tmp_path / "source")
    toy_tokenizer.save_pretrained(source)
    (source / "evaluation.json").write_text("{}")  # of the source, not of what is written
    export_compressed_tensors(source, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "recipe.yaml"} <= names
    assert "evaluation.json" not in names


@pytest.mark.parametrize(
    ("made_by", "size", "reasons"),
    [
        pytest.param(
            recipe(projection="rank: 16, basis: extended, online_rotation: []"), None, ["only basis: square"], id="ext"
        ),
        pytest.param(
            recipe(
                projection="rank: 12, basis: square, online_rotation: []",
                inputs="u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0",
                weights="bits: 4",
            ),
            8,
            [r"12 outliers of every 64 coordinates are no multiple of the group size 8 \(gate_proj, k_proj"],
            id="rank",
        ),
        pytest.param(
            recipe(projection="rank: 16, basis: square", inputs="u_type_clip_ratio: 0.9", weights="bits: 4"),
            16,
            [r"online Hadamards.*online_rotation: \[\]\) \(down_proj, o_proj\)", r"clip ratio 0\.9 of the inputs"],
            id="several",
        ),
        pytest.param(recipe(), 16, ["the weights have groups of 8, not of 16", "the inputs have"], id="size"),
        pytest.param(
            recipe(weights="bits: 4, group_size: 8, sub_scale_bits: 4"), 8, ["integers of two levels"], id="two levels"
        ),
        pytest.param(recipe(), 0, [r"group_size \(0\) must be positive"], id="zero"),
    ],
)
def test_what_cannot_be_expressed_is_refused(made_by, size, reasons, compress_toy, tmp_path) -> None:
    made = compress_toy(made_by, num_hidden_layers=1)
    for reason in reasons:
        with pytest.raises(ValueError, match=reason) as error:
            export_compressed_tensors(made.folder, tmp_path / "out", size)
        if size != 0:
            assert "recipe 'quad_w4a4_portable'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_checkpoints_are_refused(compress_toy, toy_checkpoint, tmp_path) -> None:
    plain = compress_toy("quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ: {method: rtn}\n")
    with pytest.raises(ValueError, match="is a compressed-tensors checkpoint already; it needs no export"):
        export_compressed_tensors(plain.folder, tmp_path / "out")
    with pytest.raises(ValueError, match="is no QUAD checkpoint"):
        export_compressed_tensors(toy_checkpoint("llama"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*nothing"):
        export_compressed_tensors(tmp_path / "nothing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.outlier.weight", "model.norm.weight", "lm_head.weight"])
def test_a_damaged_source_is_refused(name, compress_toy, tmp_path) -> None:
    made = compress_toy(recipe())
    source = shutil.copytree(made.folder, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        export_compressed_tensors(source, tmp_path / "out")
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        export_compressed_tensors(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(compress_toy, tmp_path, monkeypatch) -> None:
    made = compress_toy(recipe())

    def failing(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(made.folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        export_compressed_tensors(made.folder, tmp_path / "out")


def test_the_portable_recipe_needs_no_export(compress_toy, logits_of, tmp_path) -> None:
    from .conftest import PROBE

    text = (builtin_recipe_folder() / f"{PORTABLE_RECIPE}.yaml").read_text()
    made = compress_toy(text, "qwen2", size="even", dtype=torch.bfloat16, tie_word_embeddings=True)
    name, found = logits_without_us(made.folder, PROBE, tmp_path)
    assert name == "Qwen2ForCausalLM"
    difference = float((found.float() - made.logits.float()).norm() / made.logits.float().norm())
    print(f"relative difference {difference:.1e}, bound 0.1")  # other rounding of bfloat16 moves 4-bit inputs
    assert difference < 0.1
