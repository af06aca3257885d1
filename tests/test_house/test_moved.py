"""Import paths of the last release still work, and say where a module went."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from quad_modifiers._moved import MOVED, STAY


@pytest.mark.parametrize("old", sorted(set(MOVED) - set(STAY)))
def test_an_old_path_gives_the_module_of_the_new_one_and_a_warning(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        assert importlib.import_module(old) is new
    assert new.__spec__ is not None
    assert new.__spec__.name == MOVED[old]


def test_no_old_path_hides_a_function_of_its_package() -> None:
    """An imported module becomes an attribute of its parent, which is the same package under both paths."""
    for old in MOVED:
        parent, _, name = old.rpartition(".")
        package = importlib.import_module(MOVED.get(parent, parent))
        assert name not in getattr(package, "__all__", ()), old


def test_a_module_below_an_old_path_is_the_same_module() -> None:
    new = importlib.import_module("quad_modifiers.tools.evaluation.cache")
    with pytest.warns(DeprecationWarning, match="has moved"):
        assert importlib.import_module("quad_modifiers.evaluation.cache") is new


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_commands_of_the_last_release_still_run(command: str) -> None:
    run = [sys.executable, "-W", "ignore", "-m", f"quad_modifiers.{command}", "--help"]
    assert "usage:" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
