"""A checkpoint that does not fit its config is refused, and the message names the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quad_modifiers  # noqa: F401  (teaches transformers the format)

PACKED = "model.layers.1.mlp.up_proj.residual.weight_packed"
SCALE = "model.layers.0.self_attn.k_proj.residual.weight_scale"
OUTLIER = "model.layers.0.self_attn.q_proj.outlier.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(compressed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed.folder, tmp_path / "copy"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[3, 0] = value
        return tensor

    return function


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(drop(PACKED), f"{PACKED} is missing", id="missing packed"),
        pytest.param(drop(OUTLIER), f"{OUTLIER} is missing", id="missing outlier"),
        pytest.param(drop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias is missing", id="missing bias"),
        pytest.param(drop("lm_head.weight"), "lm_head.weight is missing", id="missing head"),
        pytest.param(
            lambda t: t.update({"model.layers.0.extra": torch.zeros(2)}),
            "model.layers.0.extra is not part of the model",
            id="surplus",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}),
            "q_proj.weight is not part of the model",
            id="full weight beside the packed one",
        ),
        pytest.param(change(PACKED, lambda t: t[:, :-1]), rf"{PACKED} has shape \[128, 7\]", id="packed too narrow"),
        pytest.param(change(OUTLIER, lambda t: t.T), rf"{OUTLIER} has shape \[8, 64\]", id="transposed outlier"),
        pytest.param(change(PACKED, torch.Tensor.float), f"{PACKED} has dtype F32", id="floating packed"),
        pytest.param(change(PACKED, torch.Tensor.long), f"{PACKED} has dtype I64", id="wide packed"),
        pytest.param(change(SCALE, torch.Tensor.int), f"{SCALE} has dtype I32", id="integer scale"),
        pytest.param(change(SCALE, poke(float("nan"))), f"{SCALE} holds NaN", id="NaN scale"),
        pytest.param(change(SCALE, poke(float("inf"))), f"{SCALE} holds NaN, infinite", id="infinite scale"),
        pytest.param(change(SCALE, poke(-1.0)), f"{SCALE} holds NaN, infinite or negative", id="negative scale"),
        pytest.param(
            change(SCALE.replace("weight_scale", "weight_shape"), lambda t: t.flip(0)),
            "weight_shape says",
            id="wrong weight_shape",
        ),
    ],
)
def test_tensors(damage: Callable[[Tensors], Any], message: str, copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("kept", [100, 0.5, -8], ids=["header cut", "half", "last bytes cut"])
def test_truncated_file(kept: float, copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    file.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors .*download it again"):
        load(copy)


def quad(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["quad"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda c: quad(c).update(format_version=9),
            "version 9, .* versions 1, 2, 3, 4, 5, 6, 7, 8; upgrade",
            id="version",
        ),
        pytest.param(lambda c: quad(c).pop("format_version"), "format version None", id="no version"),
        pytest.param(lambda c: quad(c).update(sparsity=0.5), "sparsity", id="unknown field"),
        pytest.param(
            lambda c: quad(c)["linears"]["q_proj"].update(scale="x"),
            r"linears\.q_proj\.scale",
            id="unknown inner field",
        ),
        pytest.param(
            lambda c: quad(c)["linears"]["q_proj"]["weight"].update(sub_scale_bits=None),
            "version 1 has no field 'sub_scale_bits'",
            id="field of version 4",
        ),
        pytest.param(
            lambda c: quad(c)["linears"]["q_proj"]["input"].update(symmetric=False),
            "version 1 has no field 'input.symmetric'",
            id="field of version 7",
        ),
        pytest.param(lambda c: quad(c).update(low_rank={"rank": 4}), "low_rank", id="reserved field"),
        pytest.param(lambda c: quad(c)["outlier"].update(bits=8), r"outlier\.bits", id="reserved bits"),
        pytest.param(lambda c: quad(c)["linears"].pop("down_proj"), "does not describe down_proj", id="missing role"),
        pytest.param(lambda c: c["quantization_config"].pop("quad"), "no 'quad' section", id="no section"),
        pytest.param(lambda c: quad(c).update(base_model_type="gpt2"), "'gpt2' is not supported", id="unknown base"),
        pytest.param(lambda c: quad(c).update(base_model_type="qwen2"), "'qwen2'.*QuadLlama", id="other base"),
        pytest.param(lambda c: quad(c)["linears"]["q_proj"].update(outliers_per_block=9), "has shape", id="other rank"),
        pytest.param(lambda c: c.update(num_hidden_layers=1), "layers.1.*not part of the model", id="fewer layers"),
        pytest.param(lambda c: c.update(num_hidden_layers=3), "layers.2.*is missing", id="more layers"),
    ],
)
def test_config(damage: Callable[[dict[str, Any]], Any], message: str, copy: Path) -> None:
    edit_config(copy, damage)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_the_undamaged_copy_loads(copy: Path, compressed, logits_of) -> None:
    assert torch.equal(logits_of(load(copy)), compressed.logits)


def test_many_problems_are_counted(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "weight_scale" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weight_scale is missing.* and 9 more problems"):
        load(copy)
