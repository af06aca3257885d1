"""Collects what the plugins contribute, checks it, and refuses a name that two distributions claim."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quad_modifiers.plugins.manager import (
    BLOCK_VARIABLE,
    Distribution,
    PluginError,
    QuadPluginManager,
    get_plugin_manager,
)

if TYPE_CHECKING:
    from quad_modifiers.model.architecture import Architecture

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Contribution:
    """What a distribution contributes under a name.

    Attributes:
        name: name that recipes, checkpoints or models know it by; no two distributions may claim it.
        value: "module:object", not imported yet; the file of a recipe; an architecture.
        distribution: distribution that it came from.
    """

    name: str
    value: Any
    distribution: Distribution

    @property
    def path(self) -> Any:
        """The value, where that is a path."""
        return self.value


ContributedModifier = ContributedRecipe = ContributedBackend = Contribution  # names of version 0.1.0


@dataclass(frozen=True)
class PluginRow:
    """One line of the plugin table; `contributes` holds lines such as "modifier WeightClip"."""

    distribution: str
    version: str
    contributes: tuple[str, ...]
    failure: str | None = None


def modifier_paths(manager: QuadPluginManager | None = None) -> dict[str, Contribution]:
    """Returns the contributed modifiers by recipe name, without importing them.

    Raises:
        PluginError: if a plugin returns no mapping of names to "module:Class", or two claim one name.
    """
    return _table("modifier", manager)


def kernel_backends(manager: QuadPluginManager | None = None) -> dict[str, Contribution]:
    """Returns the contributed kernel backends by name, without importing them.

    Raises:
        PluginError: if a plugin returns no mapping of names to "module:object", or two claim one name.
    """
    return _table("kernel backend", manager)


def linear_terms(manager: QuadPluginManager | None = None) -> dict[str, Contribution]:
    """Returns the contributed kinds of terms of a linear by name, without importing them."""
    return _table("linear term", manager)


def checkpoint_sections(manager: QuadPluginManager | None = None) -> dict[str, Contribution]:
    """Returns the contributed sections of a checkpoint by name, without importing them."""
    return _table("checkpoint section", manager)


def architectures(manager: QuadPluginManager | None = None) -> "dict[str, Architecture]":
    """Returns the contributed architecture mappings by `model_type`.

    Raises:
        PluginError: if a plugin returns anything but architectures, or two claim one `model_type`.
    """
    return {name: each.value for name, each in _table("architecture", manager).items()}


def recipe_folders(manager: QuadPluginManager | None = None) -> list[Path]:
    """Returns the contributed recipe folders.

    Raises:
        PluginError: if a plugin returns anything but existing folders.
    """
    hook, _ = _HOOKS["recipe"]
    results = (manager or get_plugin_manager()).results(hook)
    return [folder for distribution, returned in results for folder in _folders(distribution, hook, returned)]


def recipe_files(manager: QuadPluginManager | None = None) -> dict[str, Contribution]:
    """Returns the contributed recipes by bare name (the file name without `.yaml`).

    Raises:
        PluginError: if a folder does not exist, or two plugins claim one recipe name.
    """
    return _table("recipe", manager)


def plugin_table(manager: QuadPluginManager | None = None) -> list[PluginRow]:
    """Returns one row for each distribution with what it contributes, then one for each failure.

    Raises:
        PluginError: if what a plugin contributes is not valid.
    """
    manager = manager or get_plugin_manager()
    lines: dict[Distribution, list[str]] = {distribution: [] for distribution in manager.distributions()}
    for kind in _HOOKS:
        for name, contribution in _table(kind, manager).items():
            lines[contribution.distribution].append(f"{kind} {name}")
    rows = [PluginRow(each.name, each.version, tuple(contributes)) for each, contributes in lines.items()]
    for failure in manager.failed:
        rows.append(PluginRow(failure.distribution.name, failure.distribution.version, (), str(failure)))
    return rows


def _table(kind: str, manager: QuadPluginManager | None) -> dict[str, Contribution]:
    hook, read = _HOOKS[kind]
    table: dict[str, Contribution] = {}
    for distribution, returned in (manager or get_plugin_manager()).results(hook):
        for name, value in read(distribution, hook, returned):
            if name in table:
                raise PluginError(
                    f"{kind} {name!r} is claimed twice, by {table[name].distribution} and by {distribution}; a name "
                    "must be unique: uninstall one of the two, or leave one out with "
                    f"{BLOCK_VARIABLE}={distribution.name}"
                )
            table[name] = Contribution(name, value, distribution)
    return table


def _paths(form: str, distribution: Distribution, hook: str, returned: object) -> Iterator[tuple[str, str]]:
    if not isinstance(returned, Mapping):
        raise PluginError(
            f"{distribution}: {hook} must return a mapping of names to {form!r}, not {type(returned).__name__}"
        )
    for name, path in returned.items():
        if not isinstance(name, str) or not isinstance(path, str) or not _IMPORT_PATH.fullmatch(path):
            raise PluginError(
                f"{distribution}: {hook} returned {name!r}: {path!r}; the value must have the form {form!r}"
            )
        yield name, path


def _modifiers(distribution: Distribution, hook: str, returned: object) -> Iterator[tuple[str, str]]:
    for name, path in _paths("module:Class", distribution, hook, returned):
        class_name = path.rpartition(":")[2]
        if class_name != name:
            raise PluginError(
                f"{distribution}: modifier {name!r} has the class name {class_name!r}; the two must be equal, because "
                f"recipes are saved under the class name: contribute it as {class_name!r} or rename the class"
            )
        yield name, path


def _architectures(distribution: Distribution, hook: str, returned: object) -> Iterator[tuple[str, Any]]:
    for item in _sequence(distribution, hook, returned, "Architecture"):
        model_type = getattr(item, "model_type", None)
        if not isinstance(model_type, str) or not model_type:
            raise PluginError(
                f"{distribution}: {hook} returned {item!r}, which has no model_type; return "
                "quad_modifiers.model.architecture.Architecture objects"
            )
        yield model_type, item


def _recipes(distribution: Distribution, hook: str, returned: object) -> Iterator[tuple[str, Path]]:
    for folder in _folders(distribution, hook, returned):
        yield from ((path.stem, path) for path in sorted(folder.glob("*.yaml")))


def _folders(distribution: Distribution, hook: str, returned: object) -> Iterator[Path]:
    for folder in _sequence(distribution, hook, returned, "pathlib.Path"):
        if not isinstance(folder, Path) or not folder.is_dir():
            raise PluginError(
                f"{distribution}: recipe folder {str(folder)!r} is not a pathlib.Path of an existing folder; include "
                "the recipes in the distribution's package data"
            )
        yield folder


def _sequence(distribution: Distribution, hook: str, returned: object, form: str) -> Sequence[Any]:
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise PluginError(f"{distribution}: {hook} must return a list of {form}, not {type(returned).__name__}")
    return returned


_Read = Callable[[Distribution, str, object], Iterator[tuple[str, Any]]]
_class_paths = partial(_paths, "module:Class")
# By kind, in the order of the plugin table: the hook, and what checks its result and yields names and values.
_HOOKS: dict[str, tuple[str, _Read]] = {
    "modifier": ("quad_modifiers_modifiers", _modifiers),
    "architecture": ("quad_modifiers_architectures", _architectures),
    "recipe": ("quad_modifiers_recipe_folders", _recipes),
    "kernel backend": ("quad_modifiers_kernel_backends", partial(_paths, "module:object")),
    "linear term": ("quad_modifiers_linear_terms", _class_paths),
    "checkpoint section": ("quad_modifiers_checkpoint_sections", _class_paths),
}
