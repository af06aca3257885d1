"""`suggest_recipe`: what it measures, chooses and writes, and that the checkpoint takes what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")

from quad_modifiers import oneshot
from quad_modifiers.recipe import RecipeError, validate_recipe
from quad_modifiers.tools.inspection.measure.loss import Reference
from quad_modifiers.tools.suggestion import suggest_recipe
from quad_modifiers.tools.suggestion.sensitivities import read_sensitivities

SHORT: dict[str, Any] = {"samples": 4, "eval_windows": 2, "seq_length": 48}
RECIPE = """# A recipe of a test.

quad_stage:
  quad_modifiers:
    SVDOutlierProjection:
      rank: 8  # few
      o_proj_rank_per_head: 2
    DynamicActQuant:
      d_type_bits: 8
    OutlierSplitGPTQ:
      method: rtn  # no data
      ignore: [lm_head, o_proj]
"""


@pytest.fixture(scope="module")
def folder(toy_checkpoint, toy_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of three blocks, of which the second MLP adds the most to the stream."""
    model = AutoModelForCausalLM.from_pretrained(toy_checkpoint("llama", num_hidden_layers=3))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 20
    folder = tmp_path_factory.mktemp("sensitive")
    model.save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("base") / "base.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("words") / "text.txt"
    file.write_text("".join(f"{i}. Seven wizards mixed a jug of black liquid and measured it.\n" for i in range(300)))
    return str(file)


@pytest.fixture(scope="module")
def kept(folder: Path, base: Path, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("kept") / "kept.json"
    suggest_recipe(folder, 12.0, input_bits=6.0, recipe=base, keep=file, dataset=words, **SHORT)
    return file


def test_the_part_that_loses_most_gets_8_bits(folder, base, kept) -> None:
    found = read_sensitivities(kept)
    worst = max(found.of("weights"), key=lambda part: part.gain)
    assert (worst.group, worst.first, worst.last) == ("down", 1, 1)
    assert {part.group for part in found.parts if part.kind == "inputs"} == {"qkv", "gate_up"}  # the others have 8 bits
    assert all(part.narrow > part.wide >= 0 for part in found.parts)
    just = found.average("weights", [worst])
    suggestion = suggest_recipe(folder, just + 0.001, recipe=base, kept=kept)
    (part,) = suggestion.wide
    assert part == worst
    (budget,) = suggestion.budgets
    assert budget.average == just
    assert budget.divergence_after == pytest.approx(budget.divergence_before - worst.gain)


def test_the_recipe_keeps_the_comments_and_the_checkpoint_takes_the_bits_said(folder, base, kept, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    bits = read_sensitivities(kept).average("weights") + 1.5
    suggestion = suggest_recipe(folder, bits, input_bits=5.5, recipe=base, kept=kept, output=file)
    text = file.read_text()
    assert text == suggestion.text
    assert validate_recipe(file) == []
    for comment in ("# base.yaml", "rank: 8  # few", "method: rtn  # no data"):
        assert comment in text.replace(str(base), base.name)
    modifiers = yaml.safe_load(text)["quad_stage"]["quad_modifiers"]
    assert {name for each in modifiers["OutlierSplitGPTQ"]["overrides"] for name in each["linears"]}
    assert all(each["clip_ratio"] == 1.0 for each in modifiers["DynamicActQuant"]["overrides"])

    weights, inputs = suggestion.budgets
    assert weights.base < weights.average <= bits
    assert inputs.base == 4.0 < inputs.average <= 5.5
    ids = torch.randint(3, 320, (24, 48), generator=torch.Generator().manual_seed(0))
    oneshot(str(folder), str(file), dataset=ids, max_seq_length=48, output_dir=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    inside = {name: tensor for name, tensor in tensors.items() if "_proj." in name}
    stored = 8 * sum(tensor.numel() * tensor.element_size() for tensor in inside.values())
    assert stored == pytest.approx(weights.average * suggestion.sensitivities.weights, abs=1)


def test_a_recipe_in_braces(folder, words, tmp_path) -> None:
    file = tmp_path / "braces.yaml"
    file.write_text("quad_stage: {quad_modifiers: {OutlierSplitGPTQ: {method: rtn}}}\n")
    found = suggest_recipe(folder, 6.0, recipe=file, dataset=words, output=tmp_path / "mine.yaml", **SHORT)
    assert found.wide
    assert all(part.roles == ("q_proj", "k_proj", "v_proj") for part in found.wide if part.group == "qkv")
    assert validate_recipe(tmp_path / "mine.yaml") == []
    again = suggest_recipe(folder, 6.0, recipe=file, dataset=words, **SHORT)
    assert again == found


def test_budgets_that_cannot_be_met(folder, base, kept) -> None:
    found = read_sensitivities(kept)
    least, most = found.average("weights"), found.average("weights", found.of("weights"))
    for bits in (least - 0.01, most + 0.01, 0.0, float("nan")):
        with pytest.raises(ValueError, match=rf"takes {least:.3f} on .* outlier columns.* and {most:.3f} with 8"):
            suggest_recipe(folder, bits, recipe=base, kept=kept)
    assert len(suggest_recipe(folder, most, recipe=base, kept=kept).wide) == len(found.of("weights"))
    assert suggest_recipe(folder, least, recipe=base, kept=kept).wide == ()
    with pytest.raises(
        ValueError, match=r"3 bits of an input, over all multiplications cannot be had: .* takes 4\.000"
    ):
        suggest_recipe(folder, most, input_bits=3, recipe=base, kept=kept)


def test_nothing_is_left_of_a_run_that_ends_early(folder, base, words, tmp_path, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Reference, "divergence", interrupt)
    arguments = {"recipe": base, "dataset": words, "output": tmp_path / "a.yaml", "keep": tmp_path / "b.json", **SHORT}
    with pytest.raises(KeyboardInterrupt):
        suggest_recipe(folder, 12.0, **arguments)
    # the range is known before anything is tried
    with pytest.raises(ValueError, match="2 bits per weight cannot be had"):
        suggest_recipe(folder, 2.0, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("QuantizationModifier: {scheme: W4A16, targets: Linear, ignore: [lm_head]}", "quantizes no weights with"),
        ("OutlierSplitGPTQ: {bits: 8}", "gives the weights 8 bits already"),
        ("OutlierSplitGPTQ: {overrides: [{layers: 0, bits: 8}]}", "has overrides already"),
        ("OutlierSplitGPTQ: {group_size: 8, sub_scale_bits: 4}", "has integers of two levels"),
        ("OutlierSplitGPTQ: {bit: 4}", "has no field 'bit'"),
    ],
)
def test_recipes_whose_bits_cannot_be_raised(recipe: str, message: str, tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"quad_stage:\n  quad_modifiers:\n    {recipe}\n")
    with pytest.raises(RecipeError if "field" in message else ValueError, match=message):
        suggest_recipe(tmp_path / "no model", 5.0, recipe=file)


def test_what_was_kept_of_something_else(folder, base, kept, toy_checkpoint, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a llama of 3 blocks, and .* is a qwen3 of 2; measure it anew"):
        suggest_recipe(toy_checkpoint("qwen3"), 12.0, recipe=base, kept=kept)
    with pytest.raises(
        ValueError, match=r"was measured with .*base\.yaml, which was another text than that of quad_w4a4"
    ):
        suggest_recipe(folder, 12.0, kept=kept)
    with pytest.raises(FileNotFoundError, match="--save writes one"):
        suggest_recipe(folder, 12.0, recipe=base, kept=tmp_path / "none.json")
    with pytest.raises(FileExistsError, match="remove it or choose another file"):
        suggest_recipe(folder, 12.0, recipe=base, kept=kept, output=base)
    damaged = tmp_path / "kept.json"
    damaged.write_text(kept.read_text().replace('"layers": 3', '"layers": "x"'))
    with pytest.raises(ValueError, match=r"kept\.json: layers: "):
        suggest_recipe(folder, 12.0, recipe=base, kept=damaged)
