"""Checkpoints with 8-bit embedding and head: format version 2."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.format import read_format
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead

RECIPE = """
quad_stage:
  quad_modifiers:
    {projection}
    EmbeddingHeadQuant: {ends}
    {linears}
"""
PROJECTION = "SVDOutlierProjection: {rank: 8, basis: square, keep_tied: false}"
KEEPING = "SVDOutlierProjection: {rank: 8}"
LINEARS = "OutlierSplitGPTQ: {bits: 4, method: rtn}"
ENDS = ("model.embed_tokens", "lm_head")


def quad_section(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quad"]


@pytest.fixture(scope="module")
def packed(compress_toy):
    return compress_toy(RECIPE.format(projection=PROJECTION, ends="{}", linears=LINEARS), tie_word_embeddings=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("projection", [PROJECTION, KEEPING, ""], ids=["projected", "one table", "alone"])
@pytest.mark.parametrize(("model_type", "size"), [("qwen2", "even"), ("qwen3", "odder")])
def test_reloads_exactly(model_type, size, projection, tied, dtype, compress_toy, logits_of, tmp_path) -> None:
    recipe = RECIPE.format(projection=projection, ends="{}", linears=LINEARS)
    made = compress_toy(recipe, model_type, size=size, dtype=dtype, tie_word_embeddings=tied, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert torch.equal(logits_of(model), made.logits)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (made.folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight_packed" in before) == (not tied or projection == PROJECTION)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), made.logits)
    if tied and not projection:
        assert [name for name in again.state_dict() if "lm_head" in name] == []
        plain = again.dequantize()
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        plain.tie_weights()


def test_tensors_and_config(packed) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = load_file(packed.folder / "model.safetensors")
    for path in ENDS:
        found = {name.removeprefix(f"{path}."): t for name, t in tensors.items() if name.startswith(f"{path}.")}
        assert {name: (list(t.shape), t.dtype) for name, t in found.items()} == {
            "weight_packed": ([320, 16], torch.int32),
            "weight_scale": ([320, 1], torch.float32),
            "weight_shape": ([2], torch.int64),
        }
        integers = unpack_from_int32(found["weight_packed"], 8, torch.Size(found["weight_shape"].tolist()))
        values = integers.float() * found["weight_scale"]
        torch.testing.assert_close(values, packed.model.get_submodule(path).weight)
    config = json.loads((packed.folder / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == []
    (group,) = (group for group in config["config_groups"].values() if ENDS[0] in group["targets"])
    assert group["targets"] == list(ENDS)
    assert (group["weights"]["num_bits"], group["weights"]["strategy"], group["weights"]["symmetric"]) == (
        8,
        "channel",
        True,
    )
    assert group["input_activations"] is None
    assert (config["quad"]["format_version"], config["quad"]["embedding"], config["quad"]["head"]) == (
        2,
        {"bits": 8},
        {"bits": 8},
    )


def test_one_of_the_two(compress_toy, logits_of) -> None:
    recipe = RECIPE.format(projection="", ends="{targets: [lm_head]}", linears=LINEARS)
    made = compress_toy(recipe)
    section = quad_section(made.folder)
    assert (section["embedding"], section["head"]) == (None, {"bits": 8})
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(made.folder)), made.logits)


def test_the_lowest_version_is_written(compressed) -> None:
    section = quad_section(compressed.folder)
    assert section["format_version"] == 1
    assert "embedding" not in section
    assert "head" not in section


def test_tables_stay_packed_in_memory(packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed.folder)
    assert (type(model.model.embed_tokens), type(model.lm_head)) == (PackedEmbedding, PackedHead)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    for path in ENDS:
        module = model.get_submodule(path)
        assert dict(module.named_parameters()) == {}
        assert sum(t.numel() * t.element_size() for t in module.buffers()) == 320 * (64 + 4) + 16
    assert model.get_input_embeddings().weight.shape == (320, 64)


def test_generation(packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed.folder)
    prompt = torch.tensor([[5, 6, 7], [2, 8, 9]])
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": (prompt != 2).long()}
    assert torch.equal(model.generate(prompt, **arguments), packed.model.generate(prompt, **arguments))


def test_an_id_outside_the_vocabulary_is_an_error(packed) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed.folder)
    for wrong in (320, -1):
        with pytest.raises(IndexError):
            model(torch.tensor([[wrong]]))


def poke(tensor):
    tensor = tensor.clone()
    tensor[3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.embed_tokens.weight_packed", None, r"embed_tokens\.weight_packed is missing"),
        ("lm_head.weight_packed", lambda t: t[:, :-1], r"lm_head\.weight_packed has shape \[320, 15\]"),
        ("lm_head.weight_scale", lambda t: t.T, r"lm_head\.weight_scale has shape \[1, 320\]"),
        ("model.embed_tokens.weight_scale", poke, r"embed_tokens\.weight_scale holds NaN"),
        ("lm_head.weight_shape", lambda t: t.flip(0), r"lm_head\.weight_shape says \[64, 320\]"),
    ],
)
def test_damaged_tables_are_refused(name, change, message, packed, tmp_path) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, r"version 1 has no field 'embedding'"),
        ({"embedding": {"bits": 4}}, r"embedding\.bits"),
        ({"embedding": {"bits": 8, "group_size": 32}}, r"embedding\.group_size"),
    ],
)
def test_edited_sections_are_refused(change, message, packed) -> None:
    with pytest.raises(ValueError, match=message):
        read_format({**quad_section(packed.folder), **change})


@pytest.mark.parametrize(
    ("tied", "section", "message"),
    [(True, {"rank": 1}, "'head_transform' has no fields, not rank"), (False, {}, "a head with a tensor of its own")],
)
def test_a_damaged_shared_table_is_refused(tied, section, message, compress_toy, tmp_path) -> None:
    made = compress_toy(f"quad_stage:\n  quad_modifiers:\n    {KEEPING}\n", tie_word_embeddings=True)
    folder = shutil.copytree(made.folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quad"]["sections"] == {"head_transform": {}}
    config["tie_word_embeddings"] = tied
    config["quantization_config"]["quad"]["sections"]["head_transform"] = section
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_half_tied_is_refused(packed, tmp_path) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    config["quantization_config"]["quad"]["head"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="only one of them is quantized"):
        AutoModelForCausalLM.from_pretrained(folder)
