"""Import paths of the last release still work, and say where a module went."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from quad_modifiers._moved import MOVED, STAY


@pytest.mark.parametrize("old", sorted(set(MOVED) - set(STAY)))
def test_an_old_path_gives_what_is_at_the_new_one_and_a_warning(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        found = importlib.import_module(old)
    if hasattr(new, "__path__"):
        for name in ("__file__", *getattr(new, "__all__", ())):
            assert getattr(found, name) is getattr(new, name)
    else:
        assert found is new
    assert new.__spec__ is not None
    assert new.__spec__.name == MOVED[old]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("quad_modifiers.text", "quad_modifiers.data", "stdlib_code"),
        ("quad_modifiers.text", "quad_modifiers.data", "calibration_texts"),
        ("quad_modifiers.cli", "quad_modifiers.tools.cli", "main"),
        ("quad_modifiers.publishing", "quad_modifiers.tools.publishing", "publish"),
    ],
)
def test_importing_an_old_module_does_not_hide_the_function_of_its_name(old: str, new: str, name: str) -> None:
    sys.modules.pop(f"{old}.{name}", None)
    module = importlib.import_module(f"{old}.{name}")
    function = getattr(module, name)
    assert callable(function)
    assert getattr(importlib.import_module(old), name) is function
    assert getattr(importlib.import_module(new), name) is function


def test_a_module_below_an_old_path_is_the_same_module() -> None:
    new = importlib.import_module("quad_modifiers.tools.evaluation.cache")
    with pytest.warns(DeprecationWarning, match="has moved"):
        assert importlib.import_module("quad_modifiers.evaluation.cache") is new


@pytest.mark.parametrize("command", ["bench", "bench.published", "demo"])
def test_commands_of_the_last_release_still_run(command: str) -> None:
    run = [sys.executable, "-W", "ignore", "-m", f"quad_modifiers.{command}", "--help"]
    assert "usage:" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
