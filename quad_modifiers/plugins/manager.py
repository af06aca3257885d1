"""The pluggy manager: the project's own plugin first, then every distribution's entry points, one by one.

A plugin that cannot be imported is left out with a `PluginWarning`; anything wrong with a plugin that was
imported is a `PluginError`. Both name the distribution that is at fault.
"""

import importlib
import importlib.metadata
import inspect
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pluggy

from quad_modifiers.plugins import hookspecs
from quad_modifiers.plugins.hookspecs import HOOK_PREFIX, PROJECT_NAME

BLOCK_VARIABLE = "QUAD_MODIFIERS_BLOCKED_PLUGINS"
"""Environment variable: comma-separated names of distributions whose plugins are left out."""

BUILTIN_MODULE = "quad_modifiers.builtin"
OWN_DISTRIBUTION = "quad-modifiers"


class PluginError(ValueError):
    """A plugin broke a rule; the message names the distribution, the rule and the remedy."""


class PluginWarning(UserWarning):
    """A plugin was left out or contributes nothing; the rest continues without it."""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution that contributes a plugin."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class FailedPlugin:
    """A plugin, or one modifier of it, that could not be imported."""

    distribution: Distribution
    entry_point: str
    cause: str

    def __str__(self) -> str:
        return f"plugin {self.entry_point!r} of {self.distribution} failed to import: {self.cause}"


class QuadPluginManager(pluggy.PluginManager):
    """A pluggy manager that knows which distribution each plugin came from and which plugins failed."""

    def __init__(self) -> None:
        super().__init__(PROJECT_NAME)
        self.add_hookspecs(hookspecs)
        self.failed: list[FailedPlugin] = []
        self._distributions: dict[str, Distribution] = {}

    def add(self, plugin: object, distribution: Distribution, entry_point: str) -> None:
        """Registers `plugin` (a module or any object with hook implementations) as part of `distribution`.

        Raises:
            PluginError: if a hook is unknown, has wrong arguments or is not marked, or the plugin is there already.
        """
        plugin_name = f"{distribution.name}:{entry_point}"
        self._distributions[plugin_name] = distribution
        try:
            self.register(plugin, name=plugin_name)
            self.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise PluginError(
                f"{distribution}: entry point {entry_point!r} is not a valid plugin: {reason}. Hooks must be "
                f"{', '.join(self.hook_names())} and take no arguments; correct the plugin, or leave it out with "
                f"{BLOCK_VARIABLE}={distribution.name}"
            ) from error
        if not self.get_hookcallers(plugin):
            warnings.warn(
                f"{distribution}: entry point {entry_point!r} contributes nothing: no function is marked with "
                "@hookimpl, or its module was still being imported; let the entry point name a module of its own that "
                "the package's __init__ does not import",
                PluginWarning,
                stacklevel=2,
            )

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Returns pluggy's options of a marked function; refuses one named like a hook that is not marked."""
        options = super().parse_hookimpl_opts(plugin, name)
        if options is None and name.startswith(HOOK_PREFIX) and inspect.isroutine(getattr(plugin, name)):
            raise ValueError(f"function {name!r} is named like a hook but not marked with @hookimpl")
        return options

    def load_entry_point(self, entry_point: importlib.metadata.EntryPoint) -> None:
        """Imports and registers one plugin; leaves it out with a `PluginWarning` if it cannot be imported.

        Raises:
            PluginError: if the imported plugin is not valid.
        """
        distribution = Distribution(entry_point.value, "(unknown version)")
        if entry_point.dist is not None:
            distribution = Distribution(entry_point.dist.name, entry_point.dist.version)
        blocked = os.environ.get(BLOCK_VARIABLE, "").split(",")
        if _normalized(distribution.name) in map(_normalized, blocked):
            return
        try:
            plugin = entry_point.load()
        except Exception as error:  # someone else's module may raise anything, and the others must go on
            self.report_failure(distribution, entry_point.name, error)
            return
        self.add(plugin, distribution, entry_point.name)

    def report_failure(self, distribution: Distribution, entry_point: str, error: BaseException) -> None:
        """Remembers that `entry_point` of `distribution` could not be imported, and warns about it once."""
        failure = FailedPlugin(distribution, entry_point, f"{type(error).__name__}: {error}")
        if failure in self.failed:
            return
        self.failed.append(failure)
        warnings.warn(
            f"{failure}. It is left out; repair or uninstall {distribution.name}, or silence this with "
            f"{BLOCK_VARIABLE}={distribution.name}",
            PluginWarning,
            stacklevel=3,
        )

    def distribution_of(self, plugin_name: str) -> Distribution:
        """Returns the distribution of a plugin; the plugin's own name if it was registered by hand."""
        return self._distributions.get(plugin_name, Distribution(plugin_name, "(registered by hand)"))

    def distributions(self) -> list[Distribution]:
        """Returns the distributions of all registered plugins, each once, in the order of registration."""
        return list(dict.fromkeys(self.distribution_of(name) for name, plugin in self.list_name_plugin() if plugin))

    def hook_names(self) -> list[str]:
        """Returns the names of the specified hooks."""
        return [name for name in vars(hookspecs) if name.startswith(HOOK_PREFIX)]

    def results(self, hook_name: str) -> Iterator[tuple[Distribution, object]]:
        """Yields what each plugin returns for a hook, with the distribution it came from.

        Raises:
            PluginError: if an implementation raises, or is a wrapper.
        """
        for implementation in getattr(self.hook, hook_name).get_hookimpls():
            distribution = self.distribution_of(implementation.plugin_name)
            if implementation.wrapper or implementation.hookwrapper:
                raise PluginError(f"{distribution}: {hook_name} must be a plain function, not a hook wrapper")
            try:
                result = implementation.function()
            except Exception as error:  # named after its plugin; the cause stays chained
                raise PluginError(f"{distribution}: {hook_name} raised {type(error).__name__}: {error}") from error
            yield distribution, result


class SharedManager:
    """The manager of a process, built on first use.

    Attributes:
        building: True while it is being built.
    """

    def __init__(self) -> None:
        self.building = False
        self._lock = threading.RLock()
        self._manager: QuadPluginManager | None = None

    def get(self) -> QuadPluginManager:
        """See `get_plugin_manager`."""
        with self._lock:
            if self.building:
                raise PluginError(
                    "a plugin asked for the plugin manager while plugins were being imported; do that inside a function"
                )
            if self._manager is None:
                self.building = True
                try:
                    self._manager = _installed_plugins()
                finally:
                    self.building = False
            return self._manager


shared = SharedManager()


def get_plugin_manager() -> QuadPluginManager:
    """Returns the manager with the built-in plugin and every installed one, built on the first call.

    Raises:
        PluginError: if an installed plugin is not valid, or a plugin asks for the manager while it is imported.
    """
    # Its import hook registers what the plugins bring, which loads them; were it a plugin that imports transformers
    # first, the hook would find the manager half-built.
    import transformers  # noqa: F401

    return shared.get()


def plugins_are_loading() -> bool:
    """Returns whether the manager is being built."""
    return shared.building


def failed_plugins(manager: QuadPluginManager | None = None) -> list[FailedPlugin]:
    """Returns the plugins, and single modifiers of plugins, that could not be imported so far."""
    return list((manager or get_plugin_manager()).failed)


def _installed_plugins() -> QuadPluginManager:
    try:
        version = importlib.metadata.version(OWN_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "(source checkout)"
    manager = QuadPluginManager()
    manager.add(importlib.import_module(BUILTIN_MODULE), Distribution(OWN_DISTRIBUTION, version), "builtin")
    for entry_point in importlib.metadata.entry_points(group=PROJECT_NAME):
        manager.load_entry_point(entry_point)
    return manager


def _normalized(name: str) -> str:
    """Returns a distribution name in the normal form of PEP 503."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
