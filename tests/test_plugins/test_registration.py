"""Modifiers are imported late, checked, and registered with llm-compressor's factory."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from llmcompressor.modifiers import Modifier, ModifierFactory

from quad_modifiers.plugins import (
    Distribution,
    PluginError,
    PluginImportError,
    PluginWarning,
    QuadPluginManager,
    load_modifier,
    register_modifiers,
)

MakePlugin = Callable[..., types.ModuleType]


class Dimmer(Modifier):
    """A modifier that does nothing."""

    level: float = 0.5

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True


class GPTQModifier(Dimmer):
    """Has the name of one of llm-compressor's own."""


@pytest.fixture(autouse=True)
def scratch_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the classes above importable as `scratch_module:...`, whatever pytest calls this file."""
    module = types.ModuleType("scratch_module")
    vars(module).update(Dimmer=Dimmer, GPTQModifier=GPTQModifier, Alias=Dimmer, NoModifier=int, number=1)
    monkeypatch.setitem(sys.modules, "scratch_module", module)


@pytest.fixture(autouse=True)
def factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave llm-compressor's factory as it was."""
    monkeypatch.setattr(ModifierFactory, "_registered_registry", dict(ModifierFactory._registered_registry))


def create(name: str, **fields: Any) -> Modifier:
    """Build a modifier as llm-compressor's recipe parser does."""
    return ModifierFactory.create(name, allow_registered=True, allow_experimental=True, **fields)


def test_nothing_is_imported_before_it_is_needed(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution
) -> None:
    manager.add(make_plugin(modifiers={"Lazy": "json.tool_not_there:Lazy"}), alpha, "entry")
    with pytest.raises(PluginImportError, match=r"alpha-dist 1\.0: modifier 'Lazy' cannot be imported.*ModuleNotFound"):
        load_modifier("Lazy", manager)


def test_registered_modifier_survives_refresh(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModifierFactory, "_loaded", False)
    manager.add(make_plugin(modifiers={"Dimmer": "scratch_module:Dimmer"}), alpha, "entry")
    assert register_modifiers(manager) == {"Dimmer": Dimmer}
    ModifierFactory.refresh()
    dimmer = create("Dimmer", level=0.25)
    assert isinstance(dimmer, Dimmer)
    assert dimmer.level == 0.25
    assert create("QuantizationModifier").__class__.__module__.startswith("llmcompressor.")
    assert register_modifiers(manager) == {"Dimmer": Dimmer}, "registering twice is allowed"


def test_unknown_name_suggests_and_tells_of_failed_plugins(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, beta: Distribution
) -> None:
    manager.add(make_plugin(modifiers={"Dimmer": "scratch_module:Dimmer"}), alpha, "entry")
    with pytest.warns(PluginWarning):
        manager.report_failure(beta, "lamps", ImportError("no bulbs"))
    with pytest.raises(PluginError, match=r"did you mean Dimmer\?; plugin 'lamps' of beta-dist 2\.0 failed.*no bulbs"):
        load_modifier("dimer", manager)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("NoModifier", "scratch_module:NoModifier", "not a subclass of llmcompressor.modifiers.Modifier"),
        ("number", "scratch_module:number", "not a subclass of llmcompressor.modifiers.Modifier"),
        ("Alias", "scratch_module:Alias", "'Alias' is a class named 'Dimmer'"),
        (
            "GPTQModifier",
            "scratch_module:GPTQModifier",
            "the name of one of llm-compressor's own.*silently replace",
        ),
        ("Missing", "scratch_module:Missing", "cannot be imported.*AttributeError"),
    ],
)
def test_bad_class_names_the_distribution(
    manager: QuadPluginManager,
    make_plugin: MakePlugin,
    alpha: Distribution,
    name: str,
    path: str,
    reason: str,
) -> None:
    manager.add(make_plugin(modifiers={name: path}), alpha, "entry")
    with pytest.raises(PluginError, match=rf"alpha-dist 1\.0: .*{reason}"):
        load_modifier(name, manager)


def test_modifier_that_cannot_be_imported_is_left_out(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution
) -> None:
    paths = {"Dimmer": "scratch_module:Dimmer", "Missing": "surely_not_there:Missing"}
    manager.add(make_plugin(modifiers=paths), alpha, "entry")
    with pytest.warns(PluginWarning, match=r"'surely_not_there:Missing' of alpha-dist 1\.0 failed to import"):
        assert register_modifiers(manager) == {"Dimmer": Dimmer}


def test_own_modifier_that_cannot_be_imported_is_an_error(manager: QuadPluginManager, make_plugin: MakePlugin) -> None:
    manager.add(make_plugin(modifiers={"Lost": "not_there:Lost"}), Distribution("quad-modifiers", "1"), "builtin")
    with pytest.raises(PluginImportError, match="quad-modifiers 1"):
        register_modifiers(manager)


def test_name_registered_by_hand_with_another_class(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution
) -> None:
    ModifierFactory.register("Dimmer", GPTQModifier)
    manager.add(make_plugin(modifiers={"Dimmer": "scratch_module:Dimmer"}), alpha, "entry")
    with pytest.raises(PluginError, match=r"'Dimmer'.*registered with llm-compressor already"):
        register_modifiers(manager)
