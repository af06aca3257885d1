"""Import paths of documented modules of version 0.1.0: they work for one more release, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import cast

MOVED = {
    "quad_modifiers.bench": "quad_modifiers.tools.bench",
    "quad_modifiers.architectures": "quad_modifiers.model.architecture",
    "quad_modifiers.calibration": "quad_modifiers.data.calibration",
    "quad_modifiers.cli": "quad_modifiers.tools.cli",
    "quad_modifiers.checkpoint.locate": "quad_modifiers.checkpoint.opened",
    "quad_modifiers.demo": "quad_modifiers.tools.demo",
    "quad_modifiers.demo.models": "quad_modifiers.tools.demo.packaged_models",
    "quad_modifiers.evaluation": "quad_modifiers.tools.evaluation",
    "quad_modifiers.inspection": "quad_modifiers.tools.inspection",
    "quad_modifiers.nn.input_split": "quad_kernels.formats",
    "quad_modifiers.plugins.registration": "quad_modifiers.plugins.modifier_classes",
    "quad_modifiers.publishing": "quad_modifiers.tools.publishing",
    "quad_modifiers.publishing.evaluation": "quad_modifiers.records.evaluation_record",
    "quad_modifiers.publishing.publish": "quad_modifiers.tools.publishing.publication",
    "quad_modifiers.text": "quad_modifiers.data",
}
STAY = ("quad_modifiers.bench",)  # names of commands, which are promised to stay: no warning


class _OldPackage(ModuleType):
    """A package at its old path: has its own submodules, and takes everything else from the package at the new path.

    Not the new package itself: Python makes an imported submodule an attribute of its parent, and some functions have
    the name of the module that they were in.
    """

    def __init__(self, name: str, new: ModuleType) -> None:
        super().__init__(name, new.__doc__)
        self.__dict__["_new"] = new

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._new, attribute)

    def __setattr__(self, attribute: str, value: object) -> None:
        if isinstance(value, ModuleType) and attribute in getattr(self._new, "__all__", ()):
            return  # `from package import name` goes on giving the function
        super().__setattr__(attribute, value)


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Answers an import of an old path with the module at its new one."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns a spec for an old path, None for any other."""
        new = new_path(name)
        if new is None:
            return None
        found = importlib.util.find_spec(new)
        if found is None:
            return None
        if not name.startswith(STAY):
            text = f"{name} has moved to {new}; the old path will be removed in the next release"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(name, self, origin=found.origin, is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Returns the module itself, not a copy: classes must stay the same."""
        module = importlib.import_module(str(new_path(spec.name)))
        if spec.submodule_search_locations is not None:
            return _OldPackage(spec.name, module)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives a module its own spec back; it was executed under its new path."""
        if not isinstance(module, _OldPackage):
            assert module.__spec__ is not None
            module.__spec__ = self._specs.pop(module.__spec__.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """Returns the code of the module at its new path, which `python -m` runs under the old one."""
        new = str(new_path(fullname))
        loader = cast(importlib.abc.InspectLoader, importlib.util.find_spec(new).loader)  # type: ignore[union-attr]
        return loader.get_code(new)

    def get_source(self, fullname: str) -> None:
        """The old path has none."""
        return None


def new_path(name: str) -> str | None:
    """Returns where an old import path leads today, None for one that did not move."""
    for old in (name, name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]):
        if old in MOVED:
            return MOVED[old] + name.removeprefix(old)
    return None


def keep_old_paths() -> None:
    """Installs the finder; calling it again changes nothing."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())  # before the finder of files, which would load a module twice
