"""A model is loaded whole or not at all: nothing is made up, nothing is dropped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from quad_modifiers.checkpoint.opened import OwnCodeError, open_checkpoint
from quad_modifiers.checkpoint.whole_model import LoadingOptions, load_whole_model

UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def changed(toy_checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """Returns `changed(change, **make_toy_arguments)`: a toy's folder with other tensors."""

    def copy(change: Change, **arguments: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(toy_checkpoint("llama", **arguments), folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"changed is no whole LlamaForCausalLM: lm_head\.weight is missing; give"),
        (lambda t: t.pop(UP), rf"{UP} is missing"),
        (lambda t: t.update({UP: t[UP][:5].clone()}), rf"{UP} has shape \[5, 64\], needed is \[128, 64\]"),
        (lambda t: t.update({"score.weight": torch.ones(1, 64)}), r"score\.weight is not part of the model"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}), r"layers\.2\.mlp.* is not part"),
    ],
    ids=["head", "linear", "shape", "surplus", "surplus block"],
)
def test_what_does_not_fit_is_named(change: Change, message: str, changed) -> None:
    opened = open_checkpoint(changed(change))
    with pytest.raises(ValueError, match=message):
        opened.load()


def test_base_and_reward_models_are_no_language_models(make_toy, tmp_path: Path) -> None:
    toy = make_toy()
    toy.model.save_pretrained(tmp_path / "base")
    LlamaForSequenceClassification(toy.config).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        load_whole_model(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing; score\.weight is not part of the model"):
        load_whole_model(tmp_path / "reward")


def test_reward_model_with_tied_head(make_toy, tmp_path: Path) -> None:
    """Nothing is missing there: only the surplus tells."""
    LlamaForSequenceClassification(make_toy(tie_word_embeddings=True).config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no whole LlamaForCausalLM: score\.weight is not part of the model"):
        load_whole_model(tmp_path)


def test_the_list_is_short(changed) -> None:
    folder = changed(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    with pytest.raises(ValueError, match=r"and 4 more problems; give the complete"):
        load_whole_model(folder)


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({"tie_word_embeddings": True}, lambda t: None),
        ({"tie_word_embeddings": True}, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
        ({}, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    ],
    ids=["tied head", "tied head in the file", "old rotary buffer"],
)
def test_what_is_harmless_is_accepted(arguments: dict[str, Any], change: Change, changed) -> None:
    folder = changed(change, **arguments)
    assert not load_whole_model(folder).training


def test_checkpoints_of_ours(make_quad_toy) -> None:
    """A stock quantizer's format is checked by the same report."""
    rtn = "quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ: {method: rtn}\n"
    folder = make_quad_toy(rtn, num_hidden_layers=1)[1]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] != "quad"
    open_checkpoint(folder).load()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight"):
        open_checkpoint(folder).load()


def test_a_quad_checkpoint_without_a_tensor(quad_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(quad_checkpoint, tmp_path / "quad")
    tensors = load_file(tmp_path / "quad" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "quad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quad")


class TestOptions:
    def test_dtype(self, toy_checkpoint) -> None:
        model = open_checkpoint(toy_checkpoint("llama"), options=LoadingOptions(dtype="bfloat16")).load()
        assert model.dtype == torch.bfloat16

    def test_device(self, toy_checkpoint) -> None:
        assert load_whole_model(toy_checkpoint("llama"), LoadingOptions(device="meta")).device.type == "meta"

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"dtype": "int8"}, "no dtype 'int8' here; choose auto"), ({"device": "cuda:99"}, "'cuda:99' cannot be used")],
    )
    def test_what_there_is_not(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LoadingOptions(**options)

    def test_a_folder_has_no_revision(self, toy_checkpoint) -> None:
        with pytest.raises(ValueError, match="is a folder, which has no revision 'v2'; give the Hub id"):
            open_checkpoint(toy_checkpoint("llama"), options=LoadingOptions(revision="v2"))

    def test_revision_and_cache_folder_of_a_hub_id(self, toy_checkpoint, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for commit, model_type in (("aaa", "llama"), ("bbb", "qwen2")):
            snapshot = tmp_path / "models--org--toy" / "snapshots" / commit
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            snapshot.symlink_to(toy_checkpoint(model_type))
        for commit, model_type in (("aaa", "llama"), ("bbb", "qwen2")):
            options = LoadingOptions(revision=commit, cache_dir=tmp_path)
            opened = open_checkpoint("org/toy", options=options)
            assert opened.config.model_type == opened.load().config.model_type == model_type
            assert opened.tokenizer().vocab_size == 320
        with pytest.raises(OSError, match="org/toy"):
            open_checkpoint("org/toy", options=LoadingOptions(revision="ccc", cache_dir=tmp_path))

    def test_own_code_runs_only_if_allowed(self, toy_checkpoint, tmp_path: Path) -> None:
        folder = tmp_path / "own"
        shutil.copytree(toy_checkpoint("llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.Mine"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n"
        )
        with pytest.raises(OwnCodeError, match=r"brings code of its own along.*--trust-remote-code"):
            open_checkpoint(folder)
        assert open_checkpoint(folder, options=LoadingOptions(trust_remote_code=True)).config.model_type == "mine"


def test_a_folder_without_config_json_is_no_hindrance(toy_checkpoint, tmp_path: Path) -> None:
    """A GGUF file has none beside it: transformers makes the config from the file."""
    whole = AutoModelForCausalLM.from_pretrained(toy_checkpoint("llama")).eval()
    folder = tmp_path / "bare"
    shutil.copytree(toy_checkpoint("llama"), folder)
    (folder / "config.json").unlink()
    loaded = load_whole_model(folder, config=whole.config)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)
