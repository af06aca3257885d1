"""Online Hadamards as transform_config: compressed-tensors' own classes apply what this package computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_tensors.transform import TransformConfig
from quad_kernels.hadamard import hadamard_matrix
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.dense import export_dense
from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.checkpoint.opened import open_checkpoint
from quad_modifiers.records.export_record import read_export

from .conftest import PROBE
from .strangers import logits_without_us

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: {rank}, basis: square, down_proj_rank: 0, o_proj_rank_per_head: {per_head}, {more}}}
    DynamicActQuant: {{u_type_bits: {bits}, d_type_bits: {bits}, {groups}}}
    OutlierSplitGPTQ: {{bits: 4, group_size: 8}}
"""


# 80 = 4 * 20 and 96 = 8 * 12: Paley's matrices, which runtimes do not know.
PALEY = {"hidden_size": 80, "num_attention_heads": 4, "head_dim": 20, "intermediate_size": 96}


GROUPS = "u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0, strategy: group, group_size: 8"


def recipe(rank: int = 0, per_head: int = 0, more: str = "seed: 0", bits: str = "8") -> str:
    """The largest magnitude of a group lies on a tie of the grid: the last bit of it decides, which costs less at 8."""
    return RECIPE.format(rank=rank, per_head=per_head, more=more, bits=bits, groups=GROUPS)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("model_type", "arguments", "types"),
    [
        pytest.param("llama", {}, {"o_proj": ("hadamard", None), "down_proj": ("hadamard", None)}, id="powers of two"),
        pytest.param(
            "qwen3",
            PALEY,
            {"o_proj": ("random-hadamard", None), "down_proj": ("random-hadamard", None)},
            id="80 and 96",
        ),
        pytest.param(
            "mistral",
            {"intermediate_size": 184},
            {"o_proj": ("hadamard", None), "down_proj": ("hadamard", 8)},
            id="blocks",
        ),
    ],
)
def test_compressed_tensors_applies_what_we_compute(model_type, arguments, types, compress_toy, tmp_path) -> None:
    made = compress_toy(recipe(), model_type, **arguments)
    folder = export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model_type
    content = config["quantization_config"]["transform_config"]
    groups = TransformConfig.model_validate(content).config_groups
    found = {scheme.apply[0].targets[0]: (scheme.type, scheme.head_dim) for scheme in groups.values()}
    assert found == {rf"re:.*\.{role}$": kind for role, kind in types.items()}

    tensors = load_file(folder / "model.safetensors")
    matrices = {name: tensor for name, tensor in tensors.items() if "hadamard" in name}
    assert len(matrices) == sum(kind == "random-hadamard" for kind, _ in types.values()), "one for all layers"
    for matrix in matrices.values():
        size = len(matrix)
        torch.testing.assert_close(matrix.double() / size**0.5, hadamard_matrix(size))

    logits = open_checkpoint(folder).load()(PROBE).logits
    difference = relative(logits, made.logits)
    print(f"relative difference {difference:.1e}, bound 3e-2: roundings of inputs fall the other way")
    assert difference < 3e-2
    _, without = logits_without_us(folder, PROBE, tmp_path)
    assert relative(without, made.logits) > 0.3, "transformers has learnt transforms: say so in the documentation"


def test_inputs_that_are_not_quantized_agree_closely(compress_toy, tmp_path) -> None:
    made = compress_toy(recipe(bits="null"), "qwen2", **PALEY, num_hidden_layers=1)
    folder = export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)
    assert relative(open_checkpoint(folder).load()(PROBE).logits, made.logits) < 1e-5


def test_what_computes_it_is_said(compress_toy, toy_tokenizer, tmp_path) -> None:
    made = compress_toy(recipe(), num_hidden_layers=1)
    folder = export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)
    (note,) = (note for note in read_export(folder).notes if "transform_config" in note)
    for word in ("vLLM applies on CUDA", "transformers ignores it", "fails on it on the CPU"):
        assert word in note
    with pytest.raises(ValueError, match="has a transform_config, which stays behind in a plain checkpoint"):
        export_dense(folder, tmp_path / "dense")


@pytest.mark.parametrize(
    ("text", "arguments", "reason"),
    [
        pytest.param(recipe(per_head=4), {}, r"outliers beside an online Hadamard.*\(o_proj\)", id="outliers"),
        pytest.param(recipe(), {"attention_bias": True}, r"vLLM adds no bias .*\(o_proj\)", id="bias"),
        pytest.param(recipe(more="online_rotation: []"), {}, "not needed", id="none"),
    ],
)
def test_refused(text, arguments, reason, compress_toy, tmp_path) -> None:
    made = compress_toy(text, num_hidden_layers=1, **arguments)
    if reason == "not needed":
        reason = "is a compressed-tensors checkpoint already"
    with pytest.raises(ValueError, match=reason):
        export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)
    assert not (tmp_path / "out").exists()


def test_an_option_without_effect_is_refused(compress_toy, tmp_path) -> None:
    made = compress_toy(recipe(rank=8, more="online_rotation: []"), num_hidden_layers=1)
    with pytest.raises(ValueError, match="has no online Hadamards to write"):
        export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)


def test_a_stranger_to_the_hub_sees_the_right_logits(compress_toy, toy_tokenizer, tmp_path) -> None:
    from quad_modifiers.tools.publishing.stranger import look

    made = compress_toy(recipe(bits="null"), "qwen3", **PALEY, num_hidden_layers=1)
    folder = export_compressed_tensors(made.folder, tmp_path / "out", online_hadamard=True)
    toy_tokenizer.save_pretrained(folder)
    source = shutil.copytree(made.folder, tmp_path / "source")
    toy_tokenizer.save_pretrained(source)
    assert look(folder).generated == look(source).generated
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "Qwen3ForCausalLM"
