"""Collects what the plugins contribute, checks it, and refuses a name that two distributions claim."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
class ContributedModifier:
    """A modifier under its recipe name; `path` is "module:Class" and not imported yet."""

    name: str
    path: str
    distribution: Distribution


@dataclass(frozen=True)
class ContributedArchitecture:
    """An architecture mapping and the distribution that it came from."""

    architecture: Architecture
    distribution: Distribution


@dataclass(frozen=True)
class ContributedRecipe:
    """A recipe file under its bare name."""

    name: str
    path: Path
    distribution: Distribution


@dataclass(frozen=True)
class ContributedBackend:
    """A kernel backend; `path` is "module:object" and not imported yet."""

    name: str
    path: str
    distribution: Distribution


@dataclass(frozen=True)
class ContributedPart:
    """A kind of part of a checkpoint; `path` is "module:Class" and not imported yet."""

    name: str
    path: str
    distribution: Distribution


@dataclass(frozen=True)
class PluginRow:
    """One line of the plugin table; `contributes` holds lines such as "modifier WeightClip"."""

    distribution: str
    version: str
    contributes: tuple[str, ...]
    failure: str | None = None


class _Contributed(Protocol):
    @property
    def distribution(self) -> Distribution: ...


_Item = TypeVar("_Item", bound=_Contributed)


def modifier_paths(manager: QuadPluginManager | None = None) -> dict[str, ContributedModifier]:
    """Return the contributed modifiers by recipe name, without importing them.

    Raises:
        PluginError: If a plugin returns no mapping of names to "module:Class", or two claim one name.
    """
    table: dict[str, ContributedModifier] = {}
    for distribution, name, path in _import_paths(manager, "quad_modifiers_modifiers", "module:Class"):
        class_name = path.rpartition(":")[2]
        if class_name != name:
            raise PluginError(
                f"{distribution}: modifier {name!r} has the class name {class_name!r}; the two must be "
                "equal, because "
                f"recipes are saved under the class name: contribute it as {class_name!r} or rename the class"
            )
        _claim(table, name, ContributedModifier(name, path, distribution), "modifier")
    return table


def kernel_backends(manager: QuadPluginManager | None = None) -> dict[str, ContributedBackend]:
    """Return the contributed kernel backends by name, without importing them.

    Raises:
        PluginError: If a plugin returns no mapping of names to "module:object", or two claim one name.
    """
    table: dict[str, ContributedBackend] = {}
    for distribution, name, path in _import_paths(manager, "quad_modifiers_kernel_backends", "module:object"):
        _claim(table, name, ContributedBackend(name, path, distribution), "kernel backend")
    return table


def linear_terms(manager: QuadPluginManager | None = None) -> dict[str, ContributedPart]:
    """Returns the contributed kinds of terms of a linear by name, without importing them.

    Raises:
        PluginError: if a plugin returns no mapping of names to "module:Class", or two claim one name.
    """
    return _parts(manager, "quad_modifiers_linear_terms", "linear term")


def checkpoint_sections(manager: QuadPluginManager | None = None) -> dict[str, ContributedPart]:
    """Returns the contributed sections of a checkpoint by name, without importing them.

    Raises:
        PluginError: if a plugin returns no mapping of names to "module:Class", or two claim one name.
    """
    return _parts(manager, "quad_modifiers_checkpoint_sections", "checkpoint section")


def _parts(manager: QuadPluginManager | None, hook_name: str, kind: str) -> dict[str, ContributedPart]:
    table: dict[str, ContributedPart] = {}
    for distribution, name, path in _import_paths(manager, hook_name, "module:Class"):
        _claim(table, name, ContributedPart(name, path, distribution), kind)
    return table


def architectures(manager: QuadPluginManager | None = None) -> dict[str, Architecture]:
    """Return the contributed architecture mappings by `model_type`.

    Raises:
        PluginError: If a plugin returns anything but architectures, or two claim one `model_type`.
    """
    return {name: contributed.architecture for name, contributed in _architectures(manager).items()}


def recipe_folders(manager: QuadPluginManager | None = None) -> list[Path]:
    """Return the contributed recipe folders.

    Raises:
        PluginError: If a plugin returns anything but existing folders.
    """
    return [folder for _, folder in _folders(manager)]


def recipe_files(manager: QuadPluginManager | None = None) -> dict[str, ContributedRecipe]:
    """Return the contributed recipes by bare name (the file name without `.yaml`).

    Raises:
        PluginError: If a folder does not exist, or two plugins claim one recipe name.
    """
    table: dict[str, ContributedRecipe] = {}
    for distribution, folder in _folders(manager):
        for path in sorted(folder.glob("*.yaml")):
            _claim(table, path.stem, ContributedRecipe(path.stem, path, distribution), "recipe")
    return table


def plugin_table(manager: QuadPluginManager | None = None) -> list[PluginRow]:
    """Return one row for each distribution with what it contributes, then one for each failure.

    Raises:
        PluginError: If what a plugin contributes is not valid.
    """
    manager = manager or get_plugin_manager()
    lines: dict[Distribution, list[str]] = {distribution: [] for distribution in manager.distributions()}
    kinds: list[tuple[str, Mapping[str, _Contributed]]] = [
        ("modifier", modifier_paths(manager)),
        ("architecture", _architectures(manager)),
        ("recipe", recipe_files(manager)),
        ("kernel backend", kernel_backends(manager)),
        ("linear term", linear_terms(manager)),
        ("checkpoint section", checkpoint_sections(manager)),
    ]
    for kind, table in kinds:
        for name, contributed in table.items():
            lines[contributed.distribution].append(f"{kind} {name}")
    rows = [PluginRow(each.name, each.version, tuple(contributes)) for each, contributes in lines.items()]
    for failure in manager.failed:
        rows.append(PluginRow(failure.distribution.name, failure.distribution.version, (), str(failure)))
    return rows


def _architectures(manager: QuadPluginManager | None) -> dict[str, ContributedArchitecture]:
    table: dict[str, ContributedArchitecture] = {}
    for distribution, returned in (manager or get_plugin_manager()).results("quad_modifiers_architectures"):
        for item in _sequence(distribution, "quad_modifiers_architectures", returned, "Architecture"):
            model_type = getattr(item, "model_type", None)
            if not isinstance(model_type, str) or not model_type:
                raise PluginError(
                    f"{distribution}: quad_modifiers_architectures returned {item!r}, which has no "
                    "model_type; "
                    "return quad_modifiers.model.architecture.Architecture objects"
                )
            _claim(table, model_type, ContributedArchitecture(item, distribution), "architecture")
    return table


def _folders(manager: QuadPluginManager | None) -> Iterator[tuple[Distribution, Path]]:
    for distribution, returned in (manager or get_plugin_manager()).results("quad_modifiers_recipe_folders"):
        for folder in _sequence(distribution, "quad_modifiers_recipe_folders", returned, "pathlib.Path"):
            if not isinstance(folder, Path) or not folder.is_dir():
                raise PluginError(
                    f"{distribution}: recipe folder {str(folder)!r} is not a pathlib.Path of an existing "
                    "folder; "
                    "include the recipes in the distribution's package data"
                )
            yield distribution, folder


def _import_paths(
    manager: QuadPluginManager | None, hook_name: str, form: str
) -> Iterator[tuple[Distribution, str, str]]:
    """Yield (distribution, name, import path) of a hook that returns a mapping of names to import paths."""
    for distribution, returned in (manager or get_plugin_manager()).results(hook_name):
        if not isinstance(returned, Mapping):
            raise PluginError(
                f"{distribution}: {hook_name} must return a mapping of names to {form!r}, not {type(returned).__name__}"
            )
        for name, path in returned.items():
            if not isinstance(name, str) or not isinstance(path, str) or not _IMPORT_PATH.fullmatch(path):
                raise PluginError(
                    f"{distribution}: {hook_name} returned {name!r}: {path!r}; the value must have the form {form!r}"
                )
            yield distribution, name, path


def _sequence(distribution: Distribution, hook_name: str, returned: object, form: str) -> Sequence[Any]:
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise PluginError(f"{distribution}: {hook_name} must return a list of {form}, not {type(returned).__name__}")
    return returned


def _claim(table: dict[str, _Item], name: str, item: _Item, kind: str) -> None:
    """Enter `item` under `name`, which must be free."""
    if name in table:
        first, second = table[name].distribution, item.distribution
        raise PluginError(
            f"{kind} {name!r} is claimed twice, by {first} and by {second}; a name must be unique: uninstall "
            "one of "
            f"the two, or leave one out with {BLOCK_VARIABLE}={second.name}"
        )
    table[name] = item
