"""Misspelt modifiers and fields, and bad values, are errors at the line of the field."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest

from quad_modifiers.plugins import Distribution, PluginWarning, QuadPluginManager
from quad_modifiers.recipe import validate_recipe


def recipe(modifiers: str) -> str:
    """Return recipe text whose modifiers start in line 3."""
    return "quad_stage:\n  quad_modifiers:\n" + textwrap.indent(textwrap.dedent(modifiers), "    ")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SVDOutlierProjektion", "did you mean SVDOutlierProjection"),
        ("svdoutlierprojection", "did you mean SVDOutlierProjection"),
        ("GPTQModifer", "did you mean GPTQModifier"),
        ("Zzz", "known: .*DynamicActQuant.*SmoothQuantModifier"),
    ],
)
def test_unknown_modifier(manager: QuadPluginManager, name: str, suggestion: str) -> None:
    (problem,) = validate_recipe(recipe(f"OutlierSplitGPTQ: {{}}\n{name}: {{}}"), manager)
    assert problem.line == 4
    assert problem.message.startswith(f"no modifier is named {name!r}")
    assert re.search(suggestion, problem.message)


def test_abstract_base_class_is_no_modifier(manager: QuadPluginManager) -> None:
    (problem,) = validate_recipe(recipe("Modifier: {}"), manager)
    assert "no modifier is named 'Modifier'" in problem.message


def test_unknown_modifier_tells_of_failed_plugins(manager: QuadPluginManager) -> None:
    with pytest.warns(PluginWarning):
        manager.report_failure(Distribution("lamp-dist", "3.1"), "lamps", ImportError("no bulbs"))
    (problem,) = validate_recipe(recipe("LampModifier: {}"), manager)
    assert "plugin 'lamps' of lamp-dist 3.1 failed to import: ImportError: no bulbs" in problem.message


@pytest.mark.parametrize(
    ("modifiers", "line", "message", "remedy"),
    [
        ("OutlierSplitGPTQ:\n  bits: 4\n  ingore: []", 5, "has no field 'ingore'", "Did you mean ignore?"),
        ("OutlierSplitGPTQ:\n  colour: red", 4, "has no field 'colour'", "Known: bits, ignore"),
        (
            "OutlierSplitGPTQ:\n  bits: four",
            4,
            "OutlierSplitGPTQ.bits: .*integer.*not 'four'",
            "Correct 'bits'",
        ),
        (
            "SVDOutlierProjection:\n  rank: -1\nOutlierSplitGPTQ: {}",
            4,
            "greater than or equal to 0, not -1",
            "outlier",
        ),
        (
            "SVDOutlierProjection:\n  basis: round\nOutlierSplitGPTQ: {}",
            4,
            "'extended' or 'square', not 'round'",
            "",
        ),
        (
            "SVDOutlierProjection:\n  online_rotation:\n  - o_proj\n  - q_proj\nOutlierSplitGPTQ: {}",
            6,
            "online_rotation.1: .*not 'q_proj'",
            "Correct 'online_rotation'",
        ),
        (
            "OutlierSplitGPTQ: {}\nDynamicActQuant:\n  strategy: group",
            4,
            "strategy group needs group_size",
            "",
        ),
        ("GPTQModifier:\n  dampening: 0.1", 4, "has no field 'dampening'", "Did you mean dampening_frac?"),
        ("QuantizationModifier:\n  scheme: W3A3", 4, "preset scheme", "Correct 'scheme'"),
    ],
)
def test_bad_field(manager: QuadPluginManager, modifiers: str, line: int, message: str, remedy: str) -> None:
    problems = validate_recipe(recipe(modifiers), manager)
    assert [problem.line for problem in problems] == [line], problems
    assert re.search(message, problems[0].message)
    assert remedy in problems[0].remedy


def test_numbers_in_scientific_notation(manager: QuadPluginManager) -> None:
    """YAML 1.1 reads 1e-2 as text; pydantic makes it a number, as llm-compressor would."""
    text = recipe("GPTQModifier:\n  scheme: W4A16\n  dampening_frac: 1e-2")
    assert validate_recipe(text, manager) == []


def test_class_that_cannot_be_imported(manager: QuadPluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stand_in_modifiers")
    (problem,) = validate_recipe(recipe("OutlierSplitGPTQ: {}"), manager)
    assert problem.line == 3
    assert "stand-ins 1.0: modifier 'OutlierSplitGPTQ' cannot be imported" in problem.message
