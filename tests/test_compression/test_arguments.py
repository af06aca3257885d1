"""Every argument of llm-compressor's `oneshot` has its effect, or is refused by name."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("llmcompressor")
import llmcompressor
from llmcompressor.args import DatasetArguments, ModelArguments, RecipeArguments

from quad_modifiers import oneshot
from quad_modifiers.oneshot_arguments import PASSED, SEQUENTIAL, check_arguments, check_for_recipe, dtype_name

RTN = "quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ: {method: rtn}\n"
PROJECTED = "quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 0, online_rotation: []}\n"
IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))
OWN = set(inspect.signature(oneshot).parameters)


def compress(model: Any, recipe: Any = RTN, **arguments: Any) -> Any:
    return oneshot(model, recipe, **{"dataset": IDS, "num_calibration_samples": 8, "max_seq_length": 32, **arguments})


def theirs() -> set[str]:
    """All that llm-compressor's `oneshot` takes, by its signature or by the classes that it parses into."""
    parsed = {field.name for kind in (ModelArguments, DatasetArguments, RecipeArguments) for field in fields(kind)}
    return (parsed | set(inspect.signature(llmcompressor.oneshot).parameters)) - {"kwargs"}


@pytest.mark.parametrize("name", sorted(theirs() - OWN - {*PASSED, *SEQUENTIAL}))
def test_what_would_have_no_effect_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.* has no effect here: .*; omit it$"):
        check_arguments({name: "something"}, sorted(OWN))


def test_values_that_ask_for_what_is_done_are_accepted() -> None:
    defaults = inspect.signature(llmcompressor.oneshot).parameters
    refused = {"concatenate_data"}  # False there; text is one stream here
    given = {name: each.default for name, each in defaults.items() if name not in OWN | refused | {"kwargs"}}
    check_arguments(given, sorted(OWN))


def test_a_value_is_not_taken_for_an_equal_one() -> None:
    with pytest.raises(ValueError, match="batch_size=True has no effect"):
        check_arguments({"batch_size": True}, sorted(OWN))


def test_unknown_arguments_have_near_names() -> None:
    with pytest.raises(TypeError, match=r"oneshot takes no argument 'num_calibration_sample'; did you mean num_cali"):
        compress("nothing", num_calibration_sample=3)


@pytest.mark.parametrize(
    ("precision", "name"),
    [("auto", "auto"), ("half", "float16"), ("full", "float32"), (torch.bfloat16, "bfloat16"), ("float16", "float16")],
)
def test_precision(precision: Any, name: str) -> None:
    assert dtype_name(precision) == name


def test_precision_that_is_none() -> None:
    with pytest.raises(ValueError, match="precision='fp8' is no dtype"):
        dtype_name("fp8")


def test_precision_is_that_of_the_weights(toy_checkpoint) -> None:
    assert compress(toy_checkpoint("llama", num_hidden_layers=1), precision="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_revision": "v2"}, "model_revision=v2 has no effect on a model that is loaded already"),
        ({"precision": "float16"}, "precision=float16 has no effect on a model that is loaded already"),
        ({"tie_word_embeddings": True}, "head and embedding of the model are two tensors"),
        ({"sequential_targets": ["LlamaDecoderLayer"]}, "sequential_targets concerns llm-compressor's own modifiers"),
        ({"tokenizer": "a", "processor": "b"}, "tokenizer and processor mean the same"),
        ({"splits": "train"}, "splits='train' has no effect on a Tensor"),
        ({"text_column": "body"}, "text_column='body' has no effect on a Tensor"),
        ({"dataset_config_name": "en"}, "dataset_config_name='en' has no effect on a Tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_go_with_the_model_or_the_data(arguments, message, make_toy) -> None:
    with pytest.raises(ValueError, match=message):
        compress(make_toy(num_hidden_layers=1), **arguments)


def test_a_folder_has_no_revision(toy_checkpoint) -> None:
    with pytest.raises(ValueError, match="has no revision 'v2'"):
        compress(toy_checkpoint("llama"), model_revision="v2")


def test_a_device_that_stock_modifiers_do_not_hear_of() -> None:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    check_for_recipe({}, "meta", [])
    with pytest.raises(ValueError, match="device='meta' has no effect on SmoothQuantModifier"):
        check_for_recipe({}, "meta", [SmoothQuantModifier()])


@pytest.mark.parametrize("tied", [None, True, False])
def test_tied_embeddings(tied: bool | None, make_toy, tmp_path: Path) -> None:
    compress(
        make_toy(num_hidden_layers=1, tie_word_embeddings=True), output_dir=tmp_path / "out", tie_word_embeddings=tied
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (tied is not False)


def test_a_projection_unties(make_toy) -> None:
    with pytest.raises(ValueError, match="SVDOutlierProjection gives the head a tensor of its own"):
        compress(make_toy(tie_word_embeddings=True), PROJECTED, tie_word_embeddings=True)


def test_the_processor_is_the_tokenizer(make_toy, toy_tokenizer, tmp_path: Path) -> None:
    compress(make_toy(num_hidden_layers=1), processor=toy_tokenizer, output_dir=tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == toy_tokenizer.vocab_size
    with pytest.raises(TypeError, match="must be a folder, a hub id or a tokenizer, not int"):
        compress(make_toy(), processor=3)


def test_a_tokenizer_with_code_of_its_own(toy_checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(toy_checkpoint("llama", num_hidden_layers=1), folder)
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(ValueError, match=r"brings code of its own along.*trust_remote_code_model"):
        compress(folder)
    compress(folder, trust_remote_code_model=True, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_revision_and_cache_folder(toy_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "cache" / "models--org--toy" / "snapshots" / "aaa"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(toy_checkpoint("llama", num_hidden_layers=1))
    compress("org/toy", model_revision="aaa", cache_dir=tmp_path / "cache", output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_folders_that_lack_weights(make_toy, toy_tokenizer, tmp_path: Path) -> None:
    make_toy(num_hidden_layers=1).model.save_pretrained(tmp_path / "base")
    toy_tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        compress(tmp_path / "base", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
