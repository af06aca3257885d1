"""Folders that nobody should publish are refused before anything slow is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.tools.publishing.contents import check_contents


def test_inventory_adds_up(checkpoint: Path) -> None:
    inventory = read_inventory(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert inventory.tensors == len(tensors)
    assert inventory.total == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    by_name = {
        "outlier": [name for name in tensors if name.endswith(".outlier.weight")],
        "scale": [name for name in tensors if name.endswith("weight_scale")],
        "embedding": ["model.embed_tokens.weight"],
        "head": ["lm_head.weight"],
    }
    for kind, names in by_name.items():
        expected = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        assert inventory.bytes_of[kind] == expected, kind
    assert inventory.format == "QUAD, version 1"
    assert inventory.dtype == "F32"


def test_inventory_of_an_unquantized_model(toy_checkpoint) -> None:
    inventory = read_inventory(toy_checkpoint("llama"))
    assert inventory.format == "unquantized"
    assert set(inventory.bytes_of) == {"residual", "embedding", "head", "other"}


def test_shards(checkpoint: Path, shard: Callable[[Path], list[str]]) -> None:
    whole = read_inventory(checkpoint)
    shard(checkpoint)
    assert read_inventory(checkpoint).bytes_of == whole.bytes_of
    check_contents(checkpoint)


def damage(checkpoint: Path, how: str, shard: Callable[[Path], list[str]]) -> None:
    weights = checkpoint / "model.safetensors"
    if how == "no config":
        (checkpoint / "config.json").unlink()
    elif how == "config is no JSON":
        (checkpoint / "config.json").write_text("{")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "header cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "empty file":
        weights.write_bytes(b"")
    elif how == "a shard is missing":
        (checkpoint / shard(checkpoint)[1]).unlink()
    elif how == "a shard too many":
        files = shard(checkpoint)
        shutil.copy(checkpoint / files[0], checkpoint / "model-00003-of-00003.safetensors")
    elif how == "no index":
        shard(checkpoint)
        (checkpoint / "model.safetensors.index.json").unlink()
    elif how == "no tokenizer":
        (checkpoint / "tokenizer.json").unlink()
    elif how == "code":
        (checkpoint / "modeling_quad.py").write_text("print('hello')\n")
    elif how == "pickle":
        (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    elif how == "unfinished":
        (checkpoint / "notes.tmp").write_bytes(b"x")
    elif how == "unquantized":
        config = json.loads((checkpoint / "config.json").read_text())
        del config["quantization_config"]
        (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no config", FileNotFoundError, "has no config.json"),
        ("config is no JSON", ValueError, "config.json is not JSON"),
        ("no weights", FileNotFoundError, "has no weights"),
        ("truncated", ValueError, "truncated or damaged"),
        ("header cut off", ValueError, "not a readable safetensors file"),
        ("empty file", ValueError, "not a readable safetensors file"),
        ("a shard is missing", FileNotFoundError, "model-00002-of-00002.safetensors is missing"),
        ("a shard too many", ValueError, "model-00003-of-00003.safetensors, which .* does not list"),
        ("no index", FileNotFoundError, "no model.safetensors.index.json"),
        ("no tokenizer", FileNotFoundError, "has no tokenizer"),
        ("code", ValueError, "modeling_quad.py is code"),
        ("pickle", ValueError, "pytorch_model.bin is code, or a format that can hold code"),
        ("unfinished", ValueError, "notes.tmp looks unfinished"),
        ("unquantized", ValueError, "compress it first"),
    ],
)
def test_refused(
    checkpoint: Path, how: str, error: type[Exception], message: str, shard: Callable[[Path], list[str]]
) -> None:
    damage(checkpoint, how, shard)
    with pytest.raises(error, match=message):
        check_contents(checkpoint)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_contents(tmp_path / "nothing")


def test_a_tokenizer_can_be_waived(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    check_contents(checkpoint, needs_tokenizer=False)
