"""The pluggy manager: valid plugins, invalid ones, and ones that cannot be imported."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from quad_modifiers import plugins
from quad_modifiers.plugins import (
    Distribution,
    PluginError,
    PluginWarning,
    QuadPluginManager,
    failed_plugins,
    get_plugin_manager,
    hookimpl,
)
from quad_modifiers.plugins.manager import BLOCK_VARIABLE, SharedManager, plugins_are_loading

MakePlugin = Callable[..., types.ModuleType]


def installed_entry_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module_text: str, name: str = "crook"
) -> importlib.metadata.EntryPoint:
    """Lay out the installed distribution `<name>-dist` 0.9 in `folder`, and return its entry point."""
    (folder / f"{name}_module.py").write_text(module_text, encoding="utf-8")
    info = folder / f"{name}_dist-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 0.9\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[quad_modifiers]\n{name} = {name}_module\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)
    (found,) = importlib.metadata.entry_points(group="quad_modifiers", name=name)
    return found


def test_plugin_is_known_by_its_distribution(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution
) -> None:
    manager.add(make_plugin(modifiers={}), alpha, "entry")
    assert manager.distributions() == [alpha]
    assert list(manager.results("quad_modifiers_modifiers")) == [(alpha, {})]


def test_unknown_hook_names_the_distribution(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution
) -> None:
    with pytest.raises(PluginError, match=r"alpha-dist 1\.0.*quad_modifiers_modifers.*Hooks must be"):
        manager.add(make_plugin(modifers={}), alpha, "entry")


def test_hook_with_arguments_names_the_distribution(manager: QuadPluginManager, alpha: Distribution) -> None:
    module = types.ModuleType("module")

    @hookimpl
    def quad_modifiers_modifiers(model: object) -> dict[str, str]:
        return {}

    module.quad_modifiers_modifiers = quad_modifiers_modifiers  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"alpha-dist 1\.0.*model.*take no arguments"):
        manager.add(module, alpha, "entry")


def test_unmarked_hook_names_the_distribution(manager: QuadPluginManager, alpha: Distribution) -> None:
    module = types.ModuleType("module")
    module.quad_modifiers_modifiers = lambda: {}  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"alpha-dist 1\.0.*not marked with @hookimpl"):
        manager.add(module, alpha, "entry")


def test_plugin_without_hooks_warns(manager: QuadPluginManager, alpha: Distribution) -> None:
    with pytest.warns(PluginWarning, match=r"alpha-dist 1\.0.*contributes nothing"):
        manager.add(types.ModuleType("module"), alpha, "entry")


def test_hook_that_raises_names_the_distribution(manager: QuadPluginManager, alpha: Distribution) -> None:
    module = types.ModuleType("module")

    @hookimpl
    def quad_modifiers_modifiers() -> dict[str, str]:
        raise RuntimeError("out of paper")

    module.quad_modifiers_modifiers = quad_modifiers_modifiers  # type: ignore[attr-defined]
    manager.add(module, alpha, "entry")
    with pytest.raises(PluginError, match=r"alpha-dist 1\.0: quad_modifiers_modifiers raised RuntimeError: out of"):
        list(manager.results("quad_modifiers_modifiers"))


@pytest.mark.parametrize(
    ("module_text", "cause"),
    [
        ("import surely_not_installed", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ],
    ids=["missing-dependency", "syntax", "raises"],
)
def test_plugin_that_cannot_be_imported_is_left_out(
    manager: QuadPluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_text: str, cause: str
) -> None:
    entry_point = installed_entry_point(tmp_path, monkeypatch, module_text)
    with pytest.warns(PluginWarning, match=rf"'crook' of crook-dist 0\.9 failed to import: {cause}"):
        manager.load_entry_point(entry_point)
    (failure,) = failed_plugins(manager)
    assert (failure.distribution, failure.entry_point) == (Distribution("crook-dist", "0.9"), "crook")
    assert cause in failure.cause
    assert manager.distributions() == []


def test_blocked_distribution_is_not_imported(
    manager: QuadPluginManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_point = installed_entry_point(tmp_path, monkeypatch, "raise RuntimeError('imported')")
    monkeypatch.setenv(BLOCK_VARIABLE, "other, Crook_Dist")
    manager.load_entry_point(entry_point)
    assert failed_plugins(manager) == []


def test_plugin_that_asks_for_the_manager_while_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.manager, "shared", SharedManager())
    text = "from quad_modifiers.plugins import get_plugin_manager\nget_plugin_manager()"
    installed_entry_point(tmp_path, monkeypatch, text)
    with pytest.warns(PluginWarning, match="crook-dist.*asked for the plugin manager while"):
        built = get_plugin_manager()
    assert get_plugin_manager() is built
    assert not plugins_are_loading()


def test_two_distributions_may_use_one_entry_point_name(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, beta: Distribution
) -> None:
    manager.add(make_plugin(modifiers={}), alpha, "plugin")
    manager.add(make_plugin(modifiers={}), beta, "plugin")
    assert manager.distributions() == [alpha, beta]
