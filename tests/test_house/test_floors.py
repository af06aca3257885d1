"""Imports run from the top of the house to its ground, also those inside functions, and never in a circle."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import import_map
from .import_map import Arrow, arrows, back_up, circles, modules, room_of

# The only imports against the order: those of the hooks, which teach other libraries about this project when they are
# imported themselves.
IMPORT_HOOKS = {
    Arrow("quad_modifiers.connect", "quad_modifiers.tools.evaluation.harness"),
    Arrow("quad_modifiers.connect", "quad_modifiers.tools.publishing"),
    Arrow("quad_modifiers.connect", "quad_peft.registration"),
}


def test_every_module_is_in_a_room() -> None:
    assert {room_of(name) for name in modules()} <= set(import_map.FLOORS)


def test_every_room_holds_something() -> None:
    held = {room_of(name) for name in modules()}
    assert [room for room in import_map.FLOORS if room not in held] == []


def test_no_import_runs_back_up() -> None:
    wrong = set(back_up(arrows(modules())))
    assert sorted(wrong - IMPORT_HOOKS) == [], "an import of a room that stands above: move the definition down"
    assert sorted(IMPORT_HOOKS - wrong) == [], "hooks that are not there any more"


def test_no_modules_import_each_other() -> None:
    assert circles(arrows(modules())) == []


def test_an_import_inside_a_function_counts(tmp_path: Path) -> None:
    upper, lower = tmp_path / "quad_modifiers/compression.py", tmp_path / "quad_modifiers/linalg/gram.py"
    lower.parent.mkdir(parents=True)
    upper.write_text("from quad_modifiers.linalg import gram\n")
    lower.write_text("def mean():\n    from quad_modifiers.compression import oneshot\n")
    found = arrows(modules(tmp_path))
    assert back_up(found) == [Arrow("quad_modifiers.linalg.gram", "quad_modifiers.compression")]
    assert circles(found) == [["quad_modifiers.compression", "quad_modifiers.linalg.gram"]]


@pytest.mark.parametrize("line", ["from . import gram", "from .gram import mean", "from ..linalg.gram import mean"])
def test_a_relative_import_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "quad_modifiers/linalg/basis.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"import torch\n{line}\n")
    with pytest.raises(ValueError, match="line 2: a relative import is not on the map; write the full name"):
        arrows(modules(tmp_path))


def test_a_module_outside_of_every_room_is_named() -> None:
    with pytest.raises(ValueError, match=r"quad_modifiers\.attic is in no room"):
        room_of("quad_modifiers.attic")
