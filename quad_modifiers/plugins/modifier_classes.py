"""Imports contributed modifiers and registers them with llm-compressor's factory."""

import difflib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from quad_modifiers.plugins.contributions import Contribution, modifier_paths
from quad_modifiers.plugins.manager import (
    BLOCK_VARIABLE,
    OWN_DISTRIBUTION,
    PluginError,
    QuadPluginManager,
    get_plugin_manager,
)

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


class PluginImportError(PluginError):
    """The class that a modifier's import path names could not be imported."""


def load_modifier(name: str, manager: QuadPluginManager | None = None) -> "type[Modifier]":
    """Returns the class of a contributed modifier; imports it, and llm-compressor.

    Raises:
        PluginImportError: if the module or the class cannot be imported.
        PluginError: if no plugin contributes `name`, the name is one of llm-compressor's own, or the class
            is not a modifier or has another name.
    """
    manager = manager or get_plugin_manager()
    table = modifier_paths(manager)
    if name not in table:
        raise PluginError(unknown_modifier_message(name, list(table), manager))
    return _import_modifier(table[name])


def register_modifiers(manager: QuadPluginManager | None = None) -> "dict[str, type[Modifier]]":
    """Registers every contributed modifier with llm-compressor's factory and returns them by name.

    A modifier that cannot be imported is left out with a `PluginWarning`, unless it is this project's own.
    May be called again at any time.

    Raises:
        PluginError: if a modifier is not valid, or its name is llm-compressor's own or registered already
            with another class.
    """
    from llmcompressor.modifiers import ModifierFactory

    manager = manager or get_plugin_manager()
    registered: dict[str, type[Modifier]] = {}
    for name, contributed in modifier_paths(manager).items():
        try:
            registered[name] = _import_modifier(contributed)
        except PluginImportError as error:
            if contributed.distribution.name == OWN_DISTRIBUTION:
                raise
            manager.report_failure(contributed.distribution, contributed.path, error.__cause__ or error)
    for name, modifier_class in registered.items():
        existing = directly_registered_modifiers().get(name)
        if existing is not None and existing is not modifier_class:
            raise PluginError(
                f"modifier {name!r} of module {modifier_class.__module__} is registered with llm-compressor already, "
                f"by module {existing.__module__}; a name must be unique: rename one of the two"
            )
        ModifierFactory.register(name, modifier_class)
    return registered


def stock_modifiers() -> "dict[str, type[Modifier]]":
    """Returns llm-compressor's own concrete modifiers by recipe name."""
    from llmcompressor.modifiers import ModifierFactory

    if not ModifierFactory._loaded:
        with warnings.catch_warnings():
            # refresh() drops every module whose import raises, and a warning turned into an error raises
            warnings.simplefilter("ignore")
            refresh: Callable[[], None] = ModifierFactory.refresh
            refresh()
    stock = {**ModifierFactory._main_registry, **ModifierFactory._experimental_registry}
    return {name: modifier_class for name, modifier_class in stock.items() if not inspect.isabstract(modifier_class)}


def directly_registered_modifiers() -> "dict[str, type[Modifier]]":
    """Returns the modifiers that anyone registered with llm-compressor's factory, plugin or not."""
    from llmcompressor.modifiers import ModifierFactory

    return dict(ModifierFactory._registered_registry)


def unknown_modifier_message(name: str, known: list[str], manager: QuadPluginManager) -> str:
    """Returns what to say about an unknown modifier name, with near names and failed plugins."""
    message = f"no modifier is named {name!r}; {near_names(name, known)}"
    if manager.failed:
        message += "; " + "; ".join(str(failure) for failure in manager.failed)
    return message


def near_names(name: str, known: list[str]) -> str:
    """Returns "did you mean ...?" with the close matches of `name`, or the list of all known names."""
    by_lower_case = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=2, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(by_lower_case[each] for each in close)}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"


def _import_modifier(contributed: Contribution) -> "type[Modifier]":
    from llmcompressor.modifiers import Modifier

    if contributed.name in stock_modifiers():
        raise PluginError(
            f"{contributed.distribution}: modifier {contributed.name!r} has the name of one of llm-compressor's own, "
            "which it would silently replace; rename it, or leave the plugin out with "
            f"{BLOCK_VARIABLE}={contributed.distribution.name}"
        )
    try:
        modifier_class = pkgutil.resolve_name(contributed.path)
    except Exception as error:  # someone else's module may raise anything; named here, the cause stays chained
        raise PluginImportError(
            f"{contributed.distribution}: modifier {contributed.name!r} cannot be imported from {contributed.path!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(modifier_class, type) or not issubclass(modifier_class, Modifier):
        raise PluginError(
            f"{contributed.distribution}: {contributed.path!r} is not a subclass of llmcompressor.modifiers.Modifier"
        )
    if modifier_class.__name__ != contributed.name:
        raise PluginError(
            f"{contributed.distribution}: modifier {contributed.name!r} is a class named {modifier_class.__name__!r}; "
            "the two must be equal, because recipes are saved under the class name"
        )
    return modifier_class
