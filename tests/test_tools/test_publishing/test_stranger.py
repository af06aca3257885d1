"""A fresh process sees what a stranger would see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quad_modifiers.tools.publishing import check_as_stranger
from quad_modifiers.tools.publishing.stranger import look

OUTLIER = "model.layers.1.self_attn.q_proj.outlier.weight"


def change(checkpoint: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_fresh_process_reports_what_is_wrong(checkpoint: Path) -> None:
    change(checkpoint, OUTLIER, None)
    with pytest.raises(ValueError, match=rf"{checkpoint} cannot be used as it is: ValueError: .*{OUTLIER} is missing"):
        check_as_stranger(checkpoint)


def test_a_process_that_dies_is_no_success(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ValueError, match="cannot be loaded in a fresh process: exit status 1"):
        check_as_stranger(checkpoint)


def test_without_a_tokenizer_the_model_is_tried_on_numbers(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert json.loads(look(checkpoint).generated)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (OUTLIER, None, f"{OUTLIER} is missing"),
        (OUTLIER, torch.zeros(3, 3), f"{OUTLIER} has shape"),
        ("model.extra.weight", torch.zeros(1), "model.extra.weight is not part of the model"),
    ],
    ids=["missing", "wrong shape", "surplus"],
)
def test_a_wrong_tensor_is_named(checkpoint: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    change(checkpoint, name, value)
    with pytest.raises(ValueError, match=message):
        look(checkpoint)


def test_nan(checkpoint: Path) -> None:
    weight = load_file(checkpoint / "model.safetensors")[OUTLIER]
    weight[0, 0] = torch.nan
    change(checkpoint, OUTLIER, weight)
    with pytest.raises(ValueError, match=f"{OUTLIER} holds NaN"):
        look(checkpoint)


def test_a_tokenizer_of_another_model(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {word: index + 5000 for word, index in tokenizer["model"]["vocab"].items()}
    tokenizer["added_tokens"] = []
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="belongs to another model"):
        look(checkpoint)
