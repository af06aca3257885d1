"""Bad input: a clear error before the long work starts, and nothing left behind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

pytest.importorskip("llmcompressor")
from quad_modifiers import oneshot
from quad_modifiers.recipe import RecipeError

RECIPE = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection:
      rank: 8
    DynamicActQuant:
      u_type_bits: 4
    OutlierSplitGPTQ:
      bits: 4
"""
RTN = "quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ: {method: rtn}\n"
IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))


def compress(model: Any, recipe: Any = RECIPE, **arguments: Any) -> Any:
    settings = {"dataset": IDS, "num_calibration_samples": 8, "max_seq_length": 32, **arguments}
    return oneshot(model, recipe, **settings)


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that gets as far as the text, which comes before the weights, or as the weights of a folder."""
    for name in ("compression.calibration_data", "checkpoint.opened.Opened.load"):
        monkeypatch.setattr(f"quad_modifiers.{name}", lambda *_, **__: pytest.fail("loading was started"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the statistics nor the quantization of a block may start."""

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("the long work was started")

    monkeypatch.setattr("quad_modifiers.modifiers.svd_outlier_projection.collect_statistics", started)
    monkeypatch.setattr("quad_modifiers.modifiers.outlier_split_gptq.quantize_blocks", started)
    monkeypatch.setattr("quad_modifiers.modifiers.svd_outlier_projection.apply_projection", started)


@pytest.fixture
def no_loading(no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may not even be read, nor text tokenized."""
    forbid_loading(monkeypatch)


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(
        torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items()
    )


@pytest.mark.parametrize(
    ("line", "recipe", "words"),
    [
        (3, RECIPE.replace("SVDOutlierProjection", "SVDOutlierProjektion"), ["SVDOutlierProjektion"]),
        (4, RECIPE.replace("rank: 8", "rnak: 8"), ["rnak", "rank"]),
        (4, RECIPE.replace("rank: 8", "rank: -1"), ["rank"]),
        (6, RECIPE.replace("u_type_bits: 4", "u_type_bits: 12"), ["u_type_bits"]),
        (2, RECIPE.replace("quad_modifiers:", "quad_modifier:"), ["quad_modifier"]),
    ],
    ids=["modifier", "field", "value", "range", "group"],
)
def test_recipe_errors_have_the_line(line, recipe, words, no_loading, make_toy, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    with pytest.raises(RecipeError, match=rf"mine\.yaml:{line}: ") as caught:
        compress(make_toy(), str(file), output_dir=tmp_path / "out")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


def test_all_recipe_errors_at_once(no_loading, make_toy) -> None:
    with pytest.raises(RecipeError) as caught:
        compress(make_toy(), RECIPE.replace("rank: 8", "rnak: 8").replace("u_type_bits", "u_typ_bits"))
    assert {problem.line for problem in caught.value.problems} >= {4, 6}


def test_recipe_in_the_wrong_order(no_loading, make_toy) -> None:
    recipe = """quad_stage:
  quad_modifiers:
    OutlierSplitGPTQ: {bits: 4}
    SVDOutlierProjection: {rank: 8}
"""
    with pytest.raises(RecipeError, match=r":4: SVDOutlierProjection comes after OutlierSplitGPTQ"):
        compress(make_toy(), recipe)


@pytest.mark.parametrize("name", ["quad_w4a5", "recipes/missing.yaml", Path("missing.yaml")])
def test_recipe_that_is_not_there(name, no_loading, make_toy) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=r"quad_w4a5|missing\.yaml"):
        compress(make_toy(), name)


def test_recipe_by_name(make_toy, tmp_path: Path) -> None:
    model = compress(make_toy(num_hidden_layers=1), "rtn_w4a4", output_dir=tmp_path / "out")
    assert model.model.layers[0].self_attn.q_proj.packed().grid.bits == 4
    assert (tmp_path / "out" / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("rank: 64", r"rank \(64\) must be smaller than hidden_size \(64\)"),
        ("rank: 1000", r"rank \(1000\) must be smaller than hidden_size \(64\)"),
        ("rank: 8, o_proj_rank_per_head: 16", r"o_proj_rank_per_head \(16\) must be smaller than head_dim \(16\)"),
        ("rank: 8, down_proj_rank: 128", r"down_proj_rank \(128\) must be smaller than intermediate_size \(128\)"),
    ],
)
def test_rank_too_large(fields, message, no_work, make_toy) -> None:
    model = make_toy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        compress(model, f"quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {{{fields}}}\n")
    assert unchanged(model, before)


@pytest.mark.parametrize("from_disk", [False, True])
def test_unsupported_architecture(from_disk, no_loading, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320, bos_token_id=0, eos_token_id=1)
    model: Any = GPT2LMHeadModel(config)
    if from_disk:
        model.save_pretrained(tmp_path / "gpt2")
        model = str(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"'gpt2' is not supported.*qwen2, qwen3.*architectures\.md"):
        compress(model)


def test_already_quantized_model(make_toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(make_toy(num_hidden_layers=1), RTN, output_dir=tmp_path / "plain")
    compress(make_toy(num_hidden_layers=1), RECIPE, output_dir=tmp_path / "quad")
    forbid_loading(monkeypatch)
    for name in ("plain", "quad"):
        with pytest.raises(ValueError, match="already quantized; start from the original"):
            compress(str(tmp_path / name))
        with pytest.raises(ValueError, match="already quantized; start from the original"):
            compress(AutoModelForCausalLM.from_pretrained(tmp_path / name))


@pytest.mark.parametrize("first", [RTN, RECIPE], ids=["plain", "quad"])
def test_model_compressed_in_memory_before(first, make_toy) -> None:
    model = compress(make_toy(num_hidden_layers=1), first)
    with pytest.raises(ValueError, match="already"):
        compress(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_bad_weights_name_the_tensor(name, bad, no_work, make_toy) -> None:
    model = make_toy()
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = bad
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name} has 1 NaN or infinite values"):
        compress(model)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(RECIPE, id="projection"),
        pytest.param(RECIPE.replace("rank: 8", "rank: 0"), id="gptq"),
    ],
)
def test_bad_activations_name_the_layer(recipe, make_toy, tmp_path: Path) -> None:
    """Weights are finite, but their products are not."""
    model = make_toy(num_hidden_layers=3)
    with torch.no_grad():
        for part in ("up_proj", "gate_proj"):
            model.get_parameter(f"model.layers.1.mlp.{part}.weight").mul_(1e25)
    with pytest.raises(ValueError, match=r"layers?[ .]1.*(NaN|infinite)"):
        compress(model, recipe, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "empty"),
        (["too short"], "not enough|too|at least"),
        (torch.zeros(0, dtype=torch.int64), "enough|empty"),
        ("/nowhere/texts.jsonl", "texts.jsonl"),
        (12, "cannot be of type int"),
        ([b"bytes"], "must be a str"),
    ],
    ids=["empty", "short", "no ids", "missing file", "number", "bytes"],
)
def test_bad_data(dataset, message, no_work, make_toy, toy_tokenizer) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        compress(make_toy(), dataset=dataset, tokenizer=toy_tokenizer)


def test_text_without_a_tokenizer(no_work, make_toy) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        compress(make_toy(), dataset=["some text " * 100])


@pytest.mark.parametrize("folder", ["/nowhere/model", Path("nowhere"), "./nowhere", "nowhere"])
def test_missing_model_folder(folder, no_loading) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*nowhere"):
        compress(folder)


def test_folder_that_is_no_model(no_work, tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json|model"):
        compress(tmp_path)


def test_model_of_another_kind(no_loading) -> None:
    with pytest.raises(TypeError, match="model must be a folder, a hub id or a transformers model, not Linear"):
        compress(torch.nn.Linear(2, 2))


def test_a_failed_run_can_be_repeated(make_toy, tmp_path: Path) -> None:
    """A bad rank is found before the model is changed: the same object works with a better one."""
    model = make_toy(num_hidden_layers=1)
    with pytest.raises(ValueError, match="hidden_size"):
        compress(model, RECIPE.replace("rank: 8", "rank: 64"))
    compress(model, output_dir=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quad"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_full_disk_is_noticed_before_the_work(no_work, make_toy, tmp_path: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0\.00 GB free, the checkpoint needs up to"):
        compress(make_toy(), output_dir=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def offloaded(make_toy, folder: Path) -> Any:
    """A model of which accelerate keeps a block on the disk."""
    make_toy().save_pretrained(folder / "model")
    places: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places["model.layers.1"] = "disk"
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "off")


def test_offloaded_weights(no_work, make_toy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\..*q_proj.weight and 8 other weights are offloaded .*device_map"):
        compress(offloaded(make_toy, tmp_path))


def test_offloaded_weights_given_to_llm_compressor(make_toy, toy_tokenizer, tmp_path: Path) -> None:
    from llmcompressor import oneshot as llmcompressor_oneshot

    from quad_modifiers.data import as_dataloader

    model, data = offloaded(make_toy, tmp_path), as_dataloader(list(IDS.split(1)))
    with pytest.raises(ValueError, match="weights are offloaded"):
        llmcompressor_oneshot(model=model, recipe=RECIPE, dataset=data, tokenizer=toy_tokenizer, pipeline="independent")


@pytest.mark.parametrize("shift", [-10, 10])
@pytest.mark.parametrize("from_disk", [False, True])
def test_token_ids_that_are_not_embedded(shift, from_disk, no_loading_of_weights, make_toy, toy_checkpoint) -> None:
    model = str(toy_checkpoint("llama")) if from_disk else make_toy()
    with pytest.raises(ValueError, match=r"the calibration data has the token id .*model embeds the ids 0 to 319"):
        compress(model, dataset=IDS + shift)


def test_tokens_that_the_model_does_not_have(no_loading_of_weights, toy_checkpoint, toy_tokenizer) -> None:
    tokenizer = copy.deepcopy(toy_tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"the token id 320 .*without added tokens"):
        compress(str(toy_checkpoint("llama")), dataset=["wizards <new> liquid " * 100] * 8, tokenizer=tokenizer)


@pytest.fixture
def no_loading_of_weights(no_work: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quad_modifiers.checkpoint.opened.Opened.load", lambda *_: pytest.fail("loading was started"))


@pytest.mark.parametrize("own", [False, True], ids=["peft", "transformers"])
def test_model_with_adapters(own, no_loading, make_toy, tmp_path: Path, request) -> None:
    peft = pytest.importorskip("peft")
    model, config = make_toy(num_hidden_layers=1), peft.LoraConfig(r=2, target_modules=["q_proj"])
    if own:
        request.getfixturevalue("peft_for_transformers")
        model.add_adapter(config)
    else:
        model = peft.get_peft_model(model, config)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(FileNotFoundError, match="holds an adapter, not a model; merge it"):
            compress(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the model has adapters \(default\); merge them first"):
        compress(model)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_model_without_its_head(kind, no_loading, make_toy) -> None:
    model = kind.from_config(make_toy(num_hidden_layers=1).config)
    with pytest.raises(ValueError, match=r"no part named .*loaded by AutoModelForCausalLM"):
        compress(model)


def test_model_in_training_mode_comes_back_ready_to_run(make_toy) -> None:
    wanted, model = compress(make_toy(num_hidden_layers=1)), make_toy(num_hidden_layers=1, attention_dropout=0.5)
    model.train()
    found = compress(model)
    assert not found.training
    assert unchanged(found, wanted.state_dict())
