"""The plugin guide is true: its snippets are the example's own code, run, or validate."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.plugins import Distribution, QuadPluginManager, modifier_paths
from quad_modifiers.recipe import validate_recipe
from quad_modifiers.recipe.order import ROLES

EXAMPLE = Path(__file__).parent / "example_plugin"
METHOD = Path(__file__).parent / "method_plugin" / "quad_method_plugin"
GUIDE = Path(__file__).parents[2] / "docs" / "developer" / "plugins.md"


def snippets(language: str) -> list[str]:
    """Return the code blocks of the guide in one language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", GUIDE.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in blocks]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> QuadPluginManager:
    """A manager with the example plugin, imported from its source folder."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in [each for each in sys.modules if each.startswith("quad_example_plugin")]:
        monkeypatch.delitem(sys.modules, name)
    manager = QuadPluginManager()
    import quad_example_plugin.plugin

    manager.add(quad_example_plugin.plugin, Distribution("quad-example-plugin", "1.2.3"), "example")
    return manager


def test_entry_point_and_hooks_are_those_of_the_example() -> None:
    plugin = (EXAMPLE / "quad_example_plugin" / "plugin.py").read_text(encoding="utf-8")
    assert snippets("toml")[0] in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
    assert snippets("python")[0] == re.sub(r'^ *""".*"""\n+', "", plugin, flags=re.M)


def test_code_of_a_method_is_that_of_the_method_plugin() -> None:
    files = [file.read_text(encoding="utf-8").rstrip() + "\n" for file in METHOD.glob("*.py")]
    method = GUIDE.read_text(encoding="utf-8").partition("## A method of your own")[2]
    shown = re.findall(r"^```python\n(.*?)^```$", method, re.S | re.M)
    for name in ("LowRank", "LowRankResidue", "NoteMethod", "MethodNote", "RowPairsBackend", "TWIN"):
        assert any(re.search(rf"^(class )?{name}\b", each, re.M) for each in shown), name
    assert [each for each in shown if not any(each in file for file in files)] == []


def test_recipe_validates(example: QuadPluginManager) -> None:
    (recipe,) = snippets("yaml")
    assert validate_recipe(recipe, example) == []


def test_snippet_for_tests_runs(example: QuadPluginManager) -> None:
    (snippet,) = (each for each in snippets("python") if "QuadPluginManager()" in each)
    namespace: dict[str, Any] = {}
    exec(compile(snippet, str(GUIDE), "exec"), namespace)
    (contributed,) = modifier_paths(namespace["manager"]).values()
    assert str(contributed.distribution) == "quad-example-plugin 1.2.3"


def test_tables_name_every_hook_and_role(example: QuadPluginManager) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(quad_modifiers_\w+)`", text, re.M) == example.hook_names()
    assert re.findall(r'^\| `"(\w+)"`', text, re.M) == list(ROLES)
