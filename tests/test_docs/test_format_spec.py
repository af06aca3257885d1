"""docs/reference/checkpoint-format.md is enough to write a runtime: the one in `numpy_runtime` was written from it.

It must reproduce the outputs of a loaded model's linears; what the page says of versions is in `test_format_versions`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quad_modifiers import oneshot

from .numpy_runtime import entry_of, expected_shapes, factors, linear, read_tensors, transform, unpack

# Checkpoints that between them use every branch of the page
CASES = {
    # Hadamards of order 84 (Paley I) and 100 (Paley II over GF(49)), biases, both D-type splits
    "w4a4a8-extended": (
        "qwen2",
        "odd",
        """
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {d_type_bits: 8, u_type_clip_ratio: 1.0}
    OutlierSplitGPTQ: {}""",
    ),
    "asymmetric-square": (
        "qwen3",
        "even",
        """
    SVDOutlierProjection: {rank: 16, basis: square}
    DynamicActQuant: {u_type_bits: 5}
    OutlierSplitGPTQ: {symmetric: false}""",
    ),
    "groups": (
        "mistral",
        "even",
        """
    SVDOutlierProjection: {rank: 16, basis: square, down_proj_rank: 8}
    DynamicActQuant: {strategy: group, group_size: 16}
    OutlierSplitGPTQ: {symmetric: false, group_size: 8}""",
    ),
    "two levels": (
        "mistral",
        "even",
        """
    SVDOutlierProjection: {rank: 16, o_proj_rank_per_head: 2}
    DynamicActQuant: {strategy: group, group_size: 16, sub_scale_bits: 4}
    OutlierSplitGPTQ: {group_size: 8, sub_scale_bits: 4}""",
    ),
    "NVFP4": (
        "qwen2",
        "even",
        """
    SVDOutlierProjection: {rank: 16, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {number_format: nvfp4, u_type_clip_ratio: 0.9, four_over_six: true}
    OutlierSplitGPTQ: {number_format: nvfp4}""",
    ),
    "MXFP4": (
        "llama",
        "even",
        """
    SVDOutlierProjection: {rank: 16, down_proj_rank: 4}
    DynamicActQuant: {number_format: mxfp4, d_type_bits: null, u_type_clip_ratio: 1.0}
    OutlierSplitGPTQ: {number_format: mxfp4}""",
    ),
    "inputs with zero points": (
        "llama",
        "even",
        """
    SVDOutlierProjection: {rank: 16, basis: square, o_proj_rank_per_head: 2, online_rotation: [down_proj]}
    DynamicActQuant: {d_type_bits: 5, symmetric: false, o_proj_scale: head, d_type_clip_ratio: 1.0}
    OutlierSplitGPTQ: {}""",
    ),
    # widths 78 and 90: block Hadamards; some weights in full precision
    "blocks-and-ignored": (
        "llama",
        "odder",
        """
    SVDOutlierProjection: {rank: 9}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {bits: 8, ignore: [lm_head, down_proj, q_proj]}""",
    ),
    # ranks that do not fill whole words, a role that is ignored and keeps its outliers in full precision
    "8-bit outliers": (
        "qwen2",
        "odd",
        """
    SVDOutlierProjection: {rank: 9, basis: square, o_proj_rank_per_head: 1}
    DynamicActQuant: {outlier_bits: 8}
    OutlierSplitGPTQ: {outlier_bits: 8, ignore: [lm_head, k_proj]}""",
    ),
    "8-bit outlier weights": (
        "qwen3",
        "even",
        """
    SVDOutlierProjection: {rank: 8, down_proj_rank: 4}
    OutlierSplitGPTQ: {outlier_bits: 8}""",
    ),
    # in the second block, which is as many as the first: the role's own bits are those of the first
    "other bits in some blocks": (
        "qwen3",
        "even",
        """
    SVDOutlierProjection: {rank: 8, down_proj_rank: 4}
    DynamicActQuant: {overrides: [{layers: 1, linears: [o_proj, down_proj], bits: 8, clip_ratio: 1.0}]}
    OutlierSplitGPTQ: {overrides: [{layers: 1, bits: 8}, {layers: 1, linears: down_proj, bits: 2}]}""",
    ),
    "weight-only": (
        "llama",
        "even",
        """
    SVDOutlierProjection: {rank: 8}
    OutlierSplitGPTQ: {bits: 2, group_size: 16}""",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_independent_runtime_reproduces_every_linear(case: str, make_toy, tmp_path: Path) -> None:
    model_type, size, modifiers = CASES[case]
    ids = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    recipe = f"quad_stage:\n  quad_modifiers:{modifiers}\n"
    oneshot(
        model=make_toy(model_type, size), recipe=recipe, dataset=ids, max_seq_length=64, output_dir=tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    section = config["quantization_config"]["quad"]
    assert config["quantization_config"]["quant_method"] == "quad"
    versions = {
        "two levels": 4,
        "8-bit outliers": 5,
        "8-bit outlier weights": 5,
        "other bits in some blocks": 6,
        "NVFP4": 8,
        "MXFP4": 8,
    }
    versions["inputs with zero points"] = 7
    assert section["format_version"] == versions.get(case, 1)
    assert section["base_model_type"] == model_type

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    containers = {name: module for name, module in model.named_modules() if hasattr(module, "split")}
    for name, module in containers.items():
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0].detach()[0], out.detach()[0])})
        )
    model(ids[:1, :24])

    shapes: dict[str, tuple[int, ...]] = {}
    for name, (x, expected) in seen.items():
        entry = entry_of(section, name)
        shapes |= expected_shapes(name, entry)
        torch.testing.assert_close(
            torch.from_numpy(linear(x.numpy(), name, tensors, entry)),
            expected,
            rtol=1e-4,
            atol=1e-5 * float(expected.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert len(seen) == 14
    in_layers = {name: t.shape for name, t in tensors.items() if ".layers." in name and "norm" not in name}
    assert in_layers == shapes


@pytest.mark.parametrize("ends", ["{}", "{targets: [embed_tokens]}", "{targets: [lm_head]}"], ids=["both", "in", "out"])
def test_version_2_describes_embedding_and_head(ends: str, make_toy, tmp_path: Path) -> None:
    modifiers = f"    SVDOutlierProjection: {{rank: 9}}\n    EmbeddingHeadQuant: {ends}\n"
    ids = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    oneshot(
        model=make_toy("llama", "odder"),
        recipe=f"quad_stage:\n  quad_modifiers:\n{modifiers}",
        dataset=ids,
        max_seq_length=64,
        output_dir=tmp_path / "out",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    section, shape = config["quantization_config"]["quad"], (config["vocab_size"], config["hidden_size"])
    assert section["format_version"] == 2
    tables, paths = {}, {"embedding": "model.embed_tokens", "head": "lm_head"}
    for field, path in paths.items():
        if section[field] is None:
            tables[field] = tensors[f"{path}.weight"]
            continue
        assert section[field] == {"bits": 8}
        packed = tensors[f"{path}.weight_packed"]
        assert tensors[f"{path}.weight_shape"].tolist() == list(shape)
        assert packed.shape == (shape[0], math.ceil(shape[1] / 4))
        integers = unpack(packed, 8, shape[1])
        as_bytes = packed.view(np.uint8).reshape(shape[0], -1)[:, : shape[1]] ^ np.uint8(0x80)
        np.testing.assert_array_equal(as_bytes.view(np.int8), integers)  # little-endian machines
        tables[field] = integers.astype(np.float32) * tensors[f"{path}.weight_scale"]
    assert (section["embedding"] is None, section["head"] is None) == ("lm_head" in ends, "embed_tokens" in ends)

    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    embedded = model.get_input_embeddings()(ids[0])
    torch.testing.assert_close(embedded, torch.from_numpy(tables["embedding"])[ids[0]], rtol=0, atol=0)
    torch.testing.assert_close(model.lm_head(x), x @ torch.from_numpy(tables["head"]).T, rtol=1e-4, atol=1e-5)


def test_a_shared_table(make_toy, tmp_path: Path) -> None:
    ids = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    oneshot(
        model=make_toy("llama", "odder", tie_word_embeddings=True),
        recipe="quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 9}\n",
        dataset=ids,
        max_seq_length=64,
        output_dir=tmp_path / "out",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    section, width = config["quantization_config"]["quad"], config["hidden_size"]
    assert (section["format_version"], section["sections"]) == (3, {"head_transform": {}})
    assert config["tie_word_embeddings"]
    assert not [name for name in tensors if name.startswith("lm_head")]
    matrix = tensors["model.norm.head_transform"]
    assert matrix.shape == (width, width)
    model, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), []
    model.model.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output.numpy()))
    with torch.no_grad():
        wanted = model(ids[:1, :9]).logits.numpy()
    x = seen[0] / np.sqrt(np.square(seen[0]).mean(-1, keepdims=True) + config["rms_norm_eps"])
    table = tensors["model.embed_tokens.weight"]
    np.testing.assert_allclose(x @ matrix.T @ table.T, wanted, rtol=1e-3, atol=1e-3)


def test_transform_is_orthonormal_and_has_the_factors_of_the_examples() -> None:
    examples = {1536: (12, 128), 8192: (128, 64), 11008: (344, 32), 18944: (148, 128), 2: (2,)}
    assert {m: factors(m) for m in examples} == examples
    for k in (28, 52, 78, 84, 100, 256):
        np.testing.assert_allclose(transform(k) @ transform(k).T, np.eye(k), atol=1e-12)
