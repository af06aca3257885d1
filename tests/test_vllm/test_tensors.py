"""The list of a checkpoint's tensors, and the check of a stream of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from quad_modifiers.checkpoint.format import read_format
from quad_modifiers.checkpoint.tensors import expected_tensors
from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES
from quad_modifiers.nn.packed_shapes import TensorSpec
from quad_modifiers.vllm_plugin.tensor_check import checked_tensors

KNOWN = {architecture.model_type: architecture for architecture in BUILTIN_ARCHITECTURES}
Tensors = dict[str, torch.Tensor]
PACKED = "model.layers.1.mlp.up_proj.residual.weight_packed"
SCALE = "model.layers.0.self_attn.k_proj.residual.weight_scale"
SHAPE = SCALE.replace("weight_scale", "weight_shape")
OUTLIER = "model.layers.0.self_attn.q_proj.outlier.weight"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_list_is_what_the_compressor_writes(model_type, tied, make_toy, tmp_path) -> None:
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    recipe = "quad_stage:\n  quad_modifiers:\n"
    recipe += "" if tied else "    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}\n"
    recipe += "    DynamicActQuant: {u_type_clip_ratio: 0.9}\n"
    recipe += "    OutlierSplitGPTQ: {bits: 4, group_size: 8, symmetric: false}\n"
    ids = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(1))
    toy = make_toy(model_type, tie_word_embeddings=tied)
    oneshot(toy, recipe, dataset=ids, num_calibration_samples=4, max_seq_length=32, output_dir=tmp_path / "out")

    config = AutoConfig.from_pretrained(tmp_path / "out")
    expected = expected_tensors(config, read_format(config.quantization_config["quad"]), KNOWN)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in found.items()} == {
        name: spec._replace(value=None) for name, spec in expected.items()
    }
    assert sorted(name for name, _ in checked_tensors(found.items(), expected, torch.float32)) == sorted(
        name for name in found if not name.endswith("weight_shape")
    )


@pytest.fixture(scope="module")
def toy(write_toy, toy_quad) -> tuple[dict[str, TensorSpec], Tensors]:
    quad = toy_quad("qwen2")
    folder = write_toy(quad)
    return expected_tensors(AutoConfig.from_pretrained(folder), quad, KNOWN), load_file(folder / "model.safetensors")


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(value))


DAMAGE = [
    pytest.param(drop(PACKED), f"{PACKED} is missing", id="missing packed"),
    pytest.param(drop(OUTLIER), f"{OUTLIER} is missing", id="missing outlier"),
    pytest.param(drop(SHAPE), f"{SHAPE} is missing", id="missing shape"),
    pytest.param(drop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias is missing", id="missing bias"),
    pytest.param(drop("model.norm.weight"), "model.norm.weight is missing", id="missing norm"),
    pytest.param(drop("lm_head.weight"), "lm_head.weight is missing", id="missing head"),
    pytest.param(
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(100)}),
        "up_proj.bias is not part of the model",
        id="surplus bias",
    ),
    pytest.param(change(PACKED, lambda t: t[:, :-1]), rf"{PACKED} has shape \[100, 7\]", id="packed too narrow"),
    pytest.param(change(OUTLIER, lambda t: t.T), rf"{OUTLIER} has shape \[8, 128\]", id="transposed outlier"),
    pytest.param(change(PACKED, torch.Tensor.float), f"{PACKED} has dtype torch.float32", id="floating packed"),
    pytest.param(change(PACKED, torch.Tensor.long), f"{PACKED} has dtype torch.int64", id="wide packed"),
    pytest.param(change(SCALE, torch.Tensor.int), f"{SCALE} has dtype torch.int32", id="integer scale"),
    pytest.param(change(SCALE, poke(float("nan"))), f"{SCALE} holds NaN", id="NaN scale"),
    pytest.param(change(SCALE, poke(float("inf"))), f"{SCALE} holds NaN, infinite", id="infinite scale"),
    pytest.param(change(SCALE, poke(-1.0)), f"{SCALE} holds NaN, infinite or negative", id="negative scale"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_named(damage, message, toy) -> None:
    expected, tensors = toy
    tensors = dict(tensors)
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        list(checked_tensors(tensors.items(), expected, torch.float32))


def test_wrong_weight_shape(toy) -> None:
    expected, tensors = toy
    tensors = {**tensors, SHAPE: torch.tensor([64, 72])}
    with pytest.raises(ValueError, match=rf"{SHAPE} says \[64, 72\], config.json says \[64, 64\]"):
        list(checked_tensors(tensors.items(), expected, torch.float32))


def test_undamaged_tensors_pass_in_the_model_s_dtype(toy) -> None:
    expected, tensors = toy
    passed = dict(checked_tensors(tensors.items(), expected, torch.bfloat16))
    assert passed.keys() == {name for name in tensors if not name.endswith("weight_shape")}
    assert torch.equal(passed[PACKED], tensors[PACKED])
    assert torch.equal(passed[OUTLIER], tensors[OUTLIER].bfloat16())


def test_many_problems_are_counted(toy) -> None:
    expected, tensors = toy
    tensors = {name: tensor for name, tensor in tensors.items() if "weight_scale" not in name}
    with pytest.raises(ValueError, match=r"weight_scale is missing.* and 9 more problems"):
        list(checked_tensors(tensors.items(), expected, torch.float32))


def test_a_file_that_ends_early(toy, tmp_path, write_toy, toy_quad) -> None:
    expected, _ = toy
    content = (write_toy(toy_quad("qwen2")) / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-8])

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(tmp_path / "cut.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield name, file.get_tensor(name)

    with pytest.raises(ValueError, match=r"cannot be read as safetensors .*download it again"):
        list(checked_tensors(stream(), expected, torch.float32))


def test_contradictions_in_the_config(write_toy, toy_quad) -> None:
    quad = toy_quad("llama")
    config = AutoConfig.from_pretrained(write_toy(quad))
    with pytest.raises(ValueError, match=r"base model type is 'qwen2', its model_type 'quad_llama"):
        expected_tensors(config, quad.model_copy(update={"base_model_type": "qwen2"}), KNOWN)
    with pytest.raises(ValueError, match="base must be one of qwen3"):
        expected_tensors(config, quad, {"qwen3": KNOWN["qwen3"]})
    linears = dict(quad.linears)
    del linears["o_proj"]
    with pytest.raises(ValueError, match="does not describe o_proj"):
        expected_tensors(config, quad.model_copy(update={"linears": linears}), KNOWN)
    config.intermediate_size = 96
    with pytest.raises(ValueError, match=r"gate_proj has 72 inputs and 100 outputs by its .*, 72 and 96 by the rest"):
        expected_tensors(config, quad, KNOWN)
