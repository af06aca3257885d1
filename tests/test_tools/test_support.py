"""docs/reference/support.md and `quad support` say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES
from quad_modifiers.tools.cli.main import main
from quad_modifiers.tools.support_table import MODELS, page, recipe_names, supported
from quad_modifiers.vllm_plugin import MODEL_CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m quad_modifiers.tools.support_table > docs/reference/support.md"


def test_every_type_and_every_class_has_a_row() -> None:
    rows = supported()
    assert {row.model_type for row in rows} == MODELS.keys() == {each.model_type for each in BUILTIN_ARCHITECTURES}
    assert {row.vllm for row in rows if row.vllm} == set(MODEL_CLASSES)
    assert all(set(row.recipes) <= set(recipe_names()) and "quad_w4a4" in row.recipes for row in rows)


def test_the_command_lists_all_or_tells_of_one(toy_checkpoint, capsys) -> None:
    assert main(["support"]) == 0
    every = capsys.readouterr().out
    assert all(name in every for name in MODELS)
    assert main(["support", str(toy_checkpoint("granite"))]) == 0
    one = capsys.readouterr().out
    assert "granite" in one
    assert "smollm3" not in one


def test_the_command_says_why_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmo2"}')
    assert main(["support", str(tmp_path)]) == 2
    assert "it has a norm after attention or MLP" in capsys.readouterr().err
