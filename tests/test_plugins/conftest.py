"""Plugin managers with hand-made plugins: nothing is installed and no entry point is read."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from quad_modifiers.plugins import Distribution, QuadPluginManager, hookimpl

collect_ignore = ["method_plugin"]  # its checks run where it is installed: test_method_plugin.py

MakePlugin = Callable[..., types.ModuleType]


@pytest.fixture
def manager() -> QuadPluginManager:
    """A manager without any plugin."""
    return QuadPluginManager()


@pytest.fixture
def make_plugin() -> MakePlugin:
    """Return a function that makes a plugin module whose hooks return the given values.

    ``make_plugin(modifiers={...})`` implements ``quad_modifiers_modifiers``.
    """

    def make(**returned: Any) -> types.ModuleType:
        module = types.ModuleType("hand_made_plugin")
        for hook, value in returned.items():
            setattr(
                module,
                f"quad_modifiers_{hook}",
                hookimpl(_function_returning(f"quad_modifiers_{hook}", value)),
            )
        return module

    return make


@pytest.fixture
def alpha() -> Distribution:
    return Distribution("alpha-dist", "1.0")


@pytest.fixture
def beta() -> Distribution:
    return Distribution("beta-dist", "2.0")


def _function_returning(name: str, value: Any) -> Callable[[], Any]:
    def function() -> Any:
        return value

    function.__name__ = name
    return function
