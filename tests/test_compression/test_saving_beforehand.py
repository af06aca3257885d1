"""What saving could refuse is refused, or settled, before the work; and no more than that."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

pytest.importorskip("llmcompressor")
from llmcompressor import oneshot as stock_oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from quad_modifiers import oneshot
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.embedding_head_quant import EmbeddingHeadQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.recipe import RecipeError
from quad_modifiers.recipe.stored_size import stored_size

IDS = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))
IGNORE = ["lm_head", "re:.*outlier$"]
RECIPE = """quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {method: rtn}
"""


def compress(model: Any, recipe: Any = RECIPE, **arguments: Any) -> Any:
    settings = {"dataset": IDS, "num_calibration_samples": 8, "max_seq_length": 32, **arguments}
    return oneshot(model, recipe, **settings)


def directly(model: Any, *modifiers: Any) -> Any:
    """Compresses by llm-compressor's own `oneshot`, which wants a config on disk."""
    batches = DataLoader([{"input_ids": row.unsqueeze(0)} for row in IDS], batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        return stock_oneshot(model=model, recipe=list(modifiers), dataset=batches, tokenizer=object(), log_dir=None)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        pytest.fail("the long work was started")

    for name in ("svd_outlier_projection.collect_statistics", "svd_outlier_projection.apply_projection"):
        monkeypatch.setattr(f"quad_modifiers.modifiers.{name}", started)
    monkeypatch.setattr("quad_modifiers.modifiers.outlier_split_gptq.quantize_blocks", started)


def generated(model: Any, **settings: Any) -> Any:
    """A model whose generation config has been read from a file, where nothing is refused."""
    model.generation_config = GenerationConfig.from_dict({"bos_token_id": 0, "eos_token_id": 1, **settings})
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": False, "top_k": 20, "min_p": 0.1},
        {"length_penalty": 0.8, "early_stopping": True},
        {"output_scores": True},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_settings_without_effect_are_unset_with_a_warning(
    settings: dict[str, Any], make_toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = generated(make_toy(num_hidden_layers=1), **settings)
    with caplog.at_level(logging.WARNING, logger="quad_modifiers"):
        compress(model, output_dir=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == 1
    for name in settings.keys() - {"do_sample"}:
        assert name not in written
        assert f"{name}={settings[name]}" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not loaded.generation_config.do_sample  # it decodes as the original did
    loaded.save_pretrained(tmp_path / "again")


def test_settings_with_effect_stay(make_toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = generated(make_toy(num_hidden_layers=1), do_sample=True, temperature=0.6, top_p=0.9)
    compress(model, output_dir=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.6, 0.9)
    assert "generation config" not in caplog.text


def test_a_generation_config_that_cannot_be_settled_is_refused(make_toy: Any, no_work: None, tmp_path: Path) -> None:
    for run in (lambda model: compress(model, output_dir=tmp_path / "out"), lambda model: directly(model, *rtn())):
        model = make_toy(num_hidden_layers=1)
        model.generation_config.num_return_sequences = 3
        model.generation_config.temperature = 0.5
        with pytest.raises(ValueError, match=r"generation config cannot be saved: .*num_return_sequences.*Correct"):
            run(model)
        assert model.generation_config.temperature == 0.5
    assert list(tmp_path.iterdir()) == []


def rtn() -> list[Any]:
    return [DynamicActQuant(), OutlierSplitGPTQ(method="rtn")]


def test_a_tokenizer_that_cannot_be_saved_is_refused(
    make_toy: Any, toy_tokenizer: Any, no_work: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr(type(toy_tokenizer), "save_pretrained", fail)
    with pytest.raises(ValueError, match=r"the tokenizer of the model cannot be saved.*no vocabulary file.*`token"):
        compress(make_toy(), tokenizer=toy_tokenizer, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("FP8", "type float"),
        ("FP8_DYNAMIC", "type float"),
        ("NVFP4", "type float"),
        ("MXFP4", "type float"),
        ("W8A8", None),
        ("W4AFP8", "inputs of 8 bits, type float"),
        ("W3A16", "weights of 3 bits"),
        ("W6A8", "weights of 6 bits"),
    ],
)
def test_schemes_without_a_place_in_the_format(scheme: str, words: str | None, make_toy: Any, no_work: None) -> None:
    stock = QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=IGNORE)
    if words is None:  # dynamic integers
        stock.resolved_config.config_groups["group_0"].input_activations.dynamic = False
        words = "dynamic=False"
    for run in (lambda *modifiers: compress(make_toy(), list(modifiers)), lambda *m: directly(make_toy(), *m)):
        with pytest.raises(RecipeError, match=f"{words}.*cannot be stored"):
            run(SVDOutlierProjection(rank=8), stock)


def test_a_quantized_cache_and_head_are_refused(make_toy: Any, no_work: None) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    stock = QuantizationModifier(targets=["Linear"], scheme="W8A16", ignore=IGNORE, kv_cache_scheme=cache)
    with pytest.raises(RecipeError, match="cache of keys and values cannot be stored"):
        directly(make_toy(), SVDOutlierProjection(rank=8), stock)
    stock = QuantizationModifier(targets=["Linear"], scheme="W8A16", ignore=["re:.*outlier$"])
    with pytest.raises(RecipeError, match=r"lm_head is quantized.*to its ignore list"):
        directly(make_toy(), SVDOutlierProjection(rank=8), stock)


@pytest.mark.parametrize(
    "modifiers",
    [
        lambda: [OutlierSplitGPTQ(ignore=["lm_head", "re:.*layers[.]1[.].*v_proj$"])],
        lambda: [DynamicActQuant(), GPTQModifier(scheme="W4A16", targets=["re:.*layers[.]0[.].*"])],
        lambda: [
            OutlierSplitGPTQ(ignore=["re:.*layers[.]1[.].*"]),
            QuantizationModifier(scheme="W8A16", targets=["re:.*layers[.]1[.].*"], ignore=["re:.*layers[.]0[.].*"]),
        ],
    ],
    ids=["ours", "stock", "two widths"],
)
def test_layers_that_differ_are_refused_before_the_work(modifiers: Any, make_toy: Any, no_work: None) -> None:
    for run in (compress, lambda model, recipe: directly(model, *recipe)):
        with pytest.raises(RecipeError, match=r"layer 1 .* is quantized differently from layer 0"):
            run(make_toy(), modifiers())


def test_what_is_alike_in_every_layer_is_not_refused(make_toy: Any, tmp_path: Path) -> None:
    """Two quantizers that share the layers may make the same of them."""
    scheme = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}
    halves = [
        OutlierSplitGPTQ(method="rtn", ignore=["re:.*layers[.](?!0[.]).*"]),
        QuantizationModifier(
            config_groups={"group_0": {"targets": ["re:.*layers[.](?!0[.]).*residual$"], **scheme}}, ignore=["lm_head"]
        ),
    ]
    named = [OutlierSplitGPTQ(method="rtn", ignore=["lm_head", "down_proj"])]
    for recipe, count in ((halves, 14), (named, 12)):
        folder = tmp_path / str(count)
        made = compress(make_toy(), recipe, output_dir=folder)
        ids = torch.tensor([[3, 4, 5]])
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, made(ids).logits)
        with safe_open(folder / "model.safetensors", "pt") as stored:
            assert sum("weight_packed" in name for name in stored.keys()) == count  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize(
    "modifiers",
    [
        lambda: [SVDOutlierProjection(rank=8, basis="square"), DynamicActQuant(strategy="group", group_size=16)],
        lambda: [SVDOutlierProjection(rank=8, basis="square"), OutlierSplitGPTQ(group_size=16)],
        lambda: [
            SVDOutlierProjection(rank=8, basis="square"),
            GPTQModifier(scheme="W4A16", ignore=IGNORE, bypass_divisibility_checks=True),
        ],
    ],
)
def test_groups_that_will_not_divide_are_refused_before_the_projection(
    modifiers: Any, make_toy: Any, no_work: None
) -> None:
    with pytest.raises(ValueError, match=r"group_size \(\d+\) must divide the (input|residual) width \(56\)"):
        directly(make_toy(), *modifiers())


def test_a_shared_table_is_refused_before_the_work(make_toy: Any, no_work: None) -> None:
    with pytest.raises(ValueError, match="share one tensor"):
        directly(make_toy(tie_word_embeddings=True), *rtn(), EmbeddingHeadQuant(targets=["lm_head"]))


RECIPES = {
    "extended": RECIPE,
    "square": RECIPE.replace("rank: 8", "rank: 8, basis: square"),
    "8-bit outliers": RECIPE.replace("rank: 8", "rank: 1/4, basis: square").replace(
        "method: rtn", "method: rtn, outlier_bits: 8"
    ),
    "packed ends": RECIPE + "    EmbeddingHeadQuant: {}\n",
    "8 bits": RECIPE.replace("method: rtn", "method: rtn, bits: 8, group_size: 32"),
    "stock": RECIPE.replace(
        "OutlierSplitGPTQ: {method: rtn}",
        'QuantizationModifier: {scheme: W8A16, ignore: [lm_head, "re:.*outlier$"]}',
    ),
    "branch": RECIPE.replace("    DynamicActQuant", "    LowRankBranch: {rank: 24, rounds: 1}\n    DynamicActQuant"),
    "no weights": RECIPE.replace("    OutlierSplitGPTQ: {method: rtn}\n", ""),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_size_that_is_told_beforehand(name: str, tied: bool, make_toy: Any, tmp_path: Path) -> None:
    from llmcompressor.recipe import Recipe

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    modifiers = Recipe.create_instance(RECIPES[name]).modifiers
    told = stored_size(make_toy(**sizes), modifiers)
    compress(make_toy(**sizes), RECIPES[name], output_dir=tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    print(f"told {told}, is {size}")
    assert 0.85 * size < told < 1.01 * size


@pytest.mark.parametrize(("share", "fits"), [(1.15, True), (0.7, False)])
def test_space_for_the_checkpoint_is_enough(
    share: float, fits: bool, make_toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 6400}
    compress(make_toy(**toy), output_dir=tmp_path / "first")
    size = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    usage = type("Usage", (), {"free": int(share * size) + 2**20, "total": 10**12})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    if fits:
        compress(make_toy(**toy), output_dir=tmp_path / "second")
        return
    monkeypatch.setattr("quad_modifiers.modifiers.outlier_split_gptq.quantize_blocks", lambda *_: pytest.fail("work"))
    with pytest.raises(OSError, match="GB free, the checkpoint needs up to"):
        compress(make_toy(**toy), output_dir=tmp_path / "second")


def test_odd_places(toy_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder, brackets, and the current folder, for what is read and for what is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1] b").mkdir()
    (tmp_path / "a[1] b" / "model").symlink_to(toy_checkpoint("llama", num_hidden_layers=1))
    (tmp_path / "a[1] b" / "text.csv").write_text("text\n" + "seven wizards mixed one jug of black liquid " * 60 + "\n")
    text = {"dataset": "~/a[1] b/text.csv", "tokenizer": "~/a[1] b/model"}
    compress("~/a[1] b/model", output_dir="~/a[1] b/out", **text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compress("../a[1] b/model", output_dir=".", **text)
    for folder in (tmp_path / "a[1] b" / "out", tmp_path / "here"):
        AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.glob("[a-z~]*")) == ["a[1] b", "here"]


def test_all_files_have_the_mode_of_the_umask(toy_checkpoint: Any, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        model = compress(str(toy_checkpoint("llama", num_hidden_layers=1)), output_dir=tmp_path / "out")
        model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    finally:
        os.umask(old)
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}
