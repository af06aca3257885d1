"""Writing a checkpoint: complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")
from quad_modifiers import oneshot
from quad_modifiers.checkpoint import save as saving
from quad_modifiers.checkpoint.loader import QuadQuantizationConfig
from quad_modifiers.nn.quad_linear import QuadLinear

RECIPE = "quad_stage:\n  quad_modifiers:\n    OutlierSplitGPTQ: {method: rtn}\n"


def run(model, folder: Path, recipe: str = RECIPE, **arguments):
    ids = torch.randint(3, 320, (8, 32), generator=torch.Generator().manual_seed(0))
    return oneshot(
        model, recipe, dataset=ids, num_calibration_samples=8, max_seq_length=32, output_dir=folder, **arguments
    )


def test_files_and_tensors(compressed) -> None:
    files = {file.name for file in compressed.folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "recipe.yaml"} <= files
    assert not [name for name in files if name.startswith(".")]
    assert list(compressed.folder.parent.iterdir()) == [compressed.folder]
    tensors = load_file(compressed.folder / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj"
    found = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    assert shapes == {
        "residual.weight_packed": ([64, 8], torch.int32),
        "residual.weight_scale": ([64, 1], torch.float32),
        "residual.weight_shape": ([2], torch.int64),
        "outlier.weight": ([64, 8], torch.float32),
        "bias": ([64], torch.float32),
    }
    config = json.loads((compressed.folder / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("quad", "pack-quantized")
    assert quantization["quad"]["format_version"] == 1
    assert config["hidden_size"] == 72
    assert config["head_dim"] == 16


def test_packed_tensors_are_what_compressed_tensors_reads(compressed) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = load_file(compressed.folder / "model.safetensors")
    module = compressed.model.model.layers[0].mlp.gate_proj
    prefix = "model.layers.0.mlp.gate_proj.residual"
    integers = unpack_from_int32(
        tensors[f"{prefix}.weight_packed"], 4, torch.Size(tensors[f"{prefix}.weight_shape"].tolist())
    )
    values = integers.float() * tensors[f"{prefix}.weight_scale"]
    torch.testing.assert_close(values, module.residual.dequantized(torch.float32), rtol=1e-6, atol=1e-8)


def test_config_groups_match_the_stored_tensors(compressed) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((compressed.folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "quad"})
    schemes = {target: scheme for scheme in parsed.config_groups.values() for target in scheme.targets}
    assert len(schemes) == 7
    down = next(scheme for target, scheme in schemes.items() if "down_proj" in target)
    query = next(scheme for target, scheme in schemes.items() if "q_proj" in target)
    assert (query.weights.num_bits, query.input_activations.num_bits) == (4, 4)
    assert (down.weights.num_bits, down.input_activations.num_bits) == (4, 8)


def test_recipe_is_kept(compressed) -> None:
    text = (compressed.folder / "recipe.yaml").read_text()
    assert "SVDOutlierProjection" in str(yaml.safe_load(text))


def test_tokenizer_goes_along(toy_checkpoint, tmp_path) -> None:
    run(str(toy_checkpoint("llama")), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_not_empty_target_is_refused_before_any_work(make_toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("quad_modifiers.compression.calibration_data", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        run(make_toy(), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(make_toy(), tmp_path / "out" / "notes.txt")


def test_empty_target_and_new_parents_are_fine(make_toy, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    run(make_toy(num_hidden_layers=1), tmp_path / "empty")
    run(make_toy(num_hidden_layers=1), tmp_path / "a" / "b" / "c")
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert AutoModelForCausalLM.from_pretrained(folder).config.quantization_config is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")], ids=["Ctrl-C", "disk"])
@pytest.mark.parametrize("when", ["at once", "after the first file"])
def test_interrupted_save_leaves_nothing(error, when, make_toy, tmp_path, monkeypatch) -> None:
    write, calls = saving.save_file, []

    def failing(tensors, path, **arguments):
        calls.append(path)
        if when == "after the first file" and len(calls) == 1:
            return write(tensors, path, **arguments)
        Path(path).write_bytes(b"half")
        raise error

    model = run(make_toy(num_hidden_layers=1), tmp_path / "first")
    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert calls
    assert sorted(item.name for item in tmp_path.iterdir()) == ["first"]
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "out")  # nothing is lost: the model can still be saved
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_interrupted_oneshot_leaves_nothing_but_its_journal(make_toy, tmp_path, monkeypatch) -> None:
    """No half-written checkpoint: what is finished of the work, for a run that goes on."""

    def failing(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        run(make_toy(num_hidden_layers=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list(tmp_path.rglob("config.json"))
    monkeypatch.undo()
    run(make_toy(num_hidden_layers=1), tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_full_disk_is_noticed_before_writing(compressed, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(saving, "save_file", lambda *_, **__: pytest.fail("writing was started"))
    with pytest.raises(OSError, match=r"GB free, the checkpoint needs up to"):
        compressed.model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sharded(compressed, tmp_path, logits_of) -> None:
    compressed.model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert set(index["weight_map"]) == set(load_file(compressed.folder / "model.safetensors"))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), compressed.logits)
    shards[-1].unlink()
    with pytest.raises((OSError, ValueError), match=shards[-1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_arguments_without_meaning_are_refused(compressed, tmp_path) -> None:
    with pytest.raises(ValueError, match="only be saved compressed"):
        compressed.model.save_pretrained(tmp_path / "out", save_compressed=False)
    with pytest.raises(ValueError, match="does not take variant"):
        compressed.model.save_pretrained(tmp_path / "out", variant="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save_compressed": False}, ValueError, "does not take save_compressed=False: a QUAD model can only be saved"),
        ({"safe_serialization": False}, ValueError, "does not take safe_serialization=False: weights are always"),
        ({"push_to_hub": True}, ValueError, r"does not take push_to_hub=True: call model\.push_to_hub\(repo_id\)"),
        ({"token": True}, ValueError, "does not take token=True: it is an argument of push_to_hub"),
        ({"max_shard_sise": "1GB"}, TypeError, "no argument 'max_shard_sise'; did you mean max_shard_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_argument_of_saving_is_silently_dropped(loaded, arguments, error, message, compressed, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder) if loaded else compressed.model
    with pytest.raises(error, match=message):
        model.save_pretrained(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_saving_that_have_their_effect(compressed, tmp_path, caplog) -> None:
    compressed.model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    loaded = AutoModelForCausalLM.from_pretrained(compressed.folder)
    loaded.save_pretrained(tmp_path / "out", safe_serialization=True, variant="mine", save_function=print)
    assert (tmp_path / "out" / "model.mine.safetensors").is_file()
    assert "save_function has no effect" in caplog.text


def test_a_misspelt_argument_of_loading(compressed) -> None:
    with pytest.raises(TypeError, match="takes `dequantize`, not dequantise"):
        QuadQuantizationConfig(dequantise=True)


def test_layers_that_differ_are_refused_with_their_name(make_toy, tmp_path) -> None:
    recipe = (
        "quad_stage:\n  quad_modifiers:\n"
        '    OutlierSplitGPTQ: {method: rtn, ignore: [lm_head, "re:.*layers.1.*q_proj$"]}\n'
    )
    with pytest.raises(ValueError, match=r"layer 1 self_attn\.q_proj is quantized differently"):
        run(make_toy(), tmp_path / "out", recipe)
    assert list(tmp_path.iterdir()) == []


def test_saving_does_not_change_the_model(compressed, tmp_path, logits_of) -> None:
    before = {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}
    compressed.model.save_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in compressed.model.state_dict().items())
    assert torch.equal(logits_of(compressed.model), compressed.logits)
    assert any(isinstance(module, QuadLinear) for module in compressed.model.modules())
    assert isinstance(compressed.model.config.initializer_range, float)
