"""The published settings, on a toy and local text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

pytest.importorskip("peft")
pytest.importorskip("llmcompressor")
pytest.importorskip("lm_eval")

from quad_modifiers.checkpoint.format import read_format
from quad_modifiers.recipe import check_recipe
from quad_modifiers.records.evaluation_record import read_evaluation
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.tools.bench import published
from quad_modifiers.tools.bench.published import SETTINGS, Setting, main


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_are_valid(name: str) -> None:
    assert check_recipe(SETTINGS[name].recipe(0.05)) == []


def test_clip_ratio_is_the_papers_on_the_other_grid() -> None:
    recipe = yaml.safe_load(SETTINGS["quad_w4a4a8"].recipe(0.01))["quad_stage"]["quad_modifiers"]
    inputs = recipe["DynamicActQuant"]
    # The paper's scale is 0.9 max / 7 with 4 bits and 0.9 max / 127 with 8; compressed-tensors' are ratio max / 7.5 and
    # ratio max / 127.5.
    assert inputs["u_type_clip_ratio"] / 7.5 == pytest.approx(0.9 / 7, rel=1e-5)
    assert inputs["d_type_clip_ratio"] / 127.5 == pytest.approx(0.9 / 127, rel=1e-5)


def test_whole_run_and_once_more(
    toy_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(published, "SETTINGS", {"plain": Setting(4, 8)})
    monkeypatch.setattr(published, "TUNED", {"tuned": "plain"})
    few = replace(published.TUNING, accumulation=1, learning_rate=1e-2)  # a few steps, large enough to be seen
    monkeypatch.setattr(published, "TUNING", few)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Sentence {number} of a text about number {number * 7}." for number in range(300)))
    instructions = tmp_path / "instructions.jsonl"
    instructions.write_text(
        "\n".join(f'{{"text": "Add {number} and one. That is {number + 1}."}}' for number in range(9))
    )
    arguments = [str(toy_checkpoint()), "-o", str(tmp_path / "out"), "--settings", "plain", "tuned", "--limit", "2"]
    arguments += ["--calibration", str(text), "--instructions", str(instructions), "--perplexity", str(text)]
    arguments += ["--tasks", "--samples", "24", "--length", "48"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    first = (tmp_path / "out" / "plain" / "model.safetensors").read_bytes()
    evaluations = [read_evaluation(tmp_path / "out" / name) for name in ("plain", "tuned")]
    for name, evaluation in zip(("plain", "tuned"), evaluations, strict=True):
        assert evaluation is not None
        (measured,) = evaluation.perplexity
        assert f"| {name} | {measured.value:.3f} | {measured.baseline:.3f} |" in table
    assert first != (tmp_path / "out" / "tuned" / "model.safetensors").read_bytes()
    quad = read_inventory(tmp_path / "out" / "plain").quad
    assert quad is not None
    assert {role: linear.input.bits for role, linear in read_format(quad).linears.items() if linear.input} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 4),
        "o_proj": 8,
        "down_proj": 8,
    }
    assert main(arguments) == 0  # finds everything there
    assert capsys.readouterr().out == table
    assert (tmp_path / "out" / "plain" / "model.safetensors").read_bytes() == first
    with pytest.raises(ValueError, match="were made with another damping; give the same"):
        main([*arguments, "--damping", "0.1"])
