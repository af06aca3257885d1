"""What opening a model tells before anything is loaded, and what it refuses."""

import json
from pathlib import Path

import pytest

from quad_modifiers.checkpoint.opened import Opened, find_tokenizer, open_checkpoint


def test_a_checkpoint(compressed) -> None:
    opened = open_checkpoint(compressed.folder)
    assert opened.folder == compressed.folder
    assert opened.quantized == "quad"
    assert opened.need_quad().base_model_type == opened.architecture.model_type == "llama"
    assert opened.inventory().format == "QUAD, version 1"
    assert type(opened.load()).__name__ == "QuadLlamaForCausalLM"


def test_an_unquantized_model(toy_checkpoint) -> None:
    opened = open_checkpoint(str(toy_checkpoint("mistral")), known_only=True)
    assert (opened.quantized, opened.quad, opened.architecture.model_type) == (None, None, "mistral")
    assert opened.tokenizer()("one")["input_ids"]
    with pytest.raises(ValueError, match="is no QUAD checkpoint"):
        opened.need_quad()


def test_any_model_is_opened_unless_only_known_ones_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    opened = open_checkpoint(tmp_path)
    assert opened.config.model_type == "gpt2"
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no weights"):
        opened.load()
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
        open_checkpoint(tmp_path, known_only=True)


def test_a_base_that_no_plugin_brings(compressed, tmp_path: Path) -> None:
    config = json.loads((compressed.folder / "config.json").read_text())
    config["quantization_config"]["quad"]["base_model_type"] = "gpt2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{tmp_path}: the checkpoint's base model type 'gpt2' is not supported here"):
        open_checkpoint(tmp_path, known_only=True)


def test_a_tokenizer_that_is_not_there(compressed) -> None:
    assert find_tokenizer(compressed.folder) is None
    with pytest.raises(ValueError, match="has no tokenizer, so no text can be read"):
        open_checkpoint(compressed.folder).tokenizer()


def test_a_hub_id_has_no_inventory() -> None:
    with pytest.raises(ValueError, match="owner/name is not a folder"):
        Opened("owner/name", None, None, None, None).inventory()


def test_the_share_of_embedding_and_head(toy_checkpoint) -> None:
    inventory = open_checkpoint(toy_checkpoint("llama")).inventory()
    assert inventory.embeddings == 2 * 320 * 64 * 4
    assert inventory.total > inventory.embeddings
