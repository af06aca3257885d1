"""A recipe is found by path, or by name in the folders that plugins contribute."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from quad_modifiers.plugins import Distribution, QuadPluginManager, hookimpl
from quad_modifiers.recipe import builtin_recipe_folder, list_recipes, resolve_recipe, validate_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A contributed recipe folder, outside the current one."""
    folder = tmp_path / "contributed"
    folder.mkdir()
    for name in ("fine_w4a4", "fine_w4a16"):
        (folder / f"{name}.yaml").write_text("quad_stage: {}\n", encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder


@pytest.fixture
def manager(folder: Path) -> QuadPluginManager:
    """A manager whose only plugin contributes the folder."""
    plugin = types.ModuleType("folder_plugin")

    @hookimpl
    def quad_modifiers_recipe_folders() -> list[Path]:
        return [folder]

    plugin.quad_modifiers_recipe_folders = quad_modifiers_recipe_folders  # type: ignore[attr-defined]
    manager = QuadPluginManager()
    manager.add(plugin, Distribution("folder-dist", "1.0"), "entry")
    return manager


@pytest.mark.parametrize("given", ["fine_w4a4", "fine_w4a4.yaml", "recipes/fine_w4a4.yaml", Path("fine_w4a4.yaml")])
def test_by_name(manager: QuadPluginManager, folder: Path, given: str | Path) -> None:
    assert resolve_recipe(given, manager) == folder / "fine_w4a4.yaml"


def test_an_existing_file_wins(manager: QuadPluginManager, folder: Path) -> None:
    own = Path("fine_w4a4.yaml")
    own.write_text("own_stage: {}\n", encoding="utf-8")
    assert resolve_recipe("fine_w4a4.yaml", manager) == own
    assert resolve_recipe("fine_w4a4", manager) == folder / "fine_w4a4.yaml"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            "fine_w4a5",
            "is neither a file.*did you mean fine_w4a4 or fine_w4a16\\? Give a path.*names: fine_w4a16, fine_w4a4",
        ),
        ("elsewhere/fine_w4a4.yaml", "is neither a file.*'fine_w4a4' is found by its name alone"),
        (".", "is a folder"),
    ],
)
def test_unknown(manager: QuadPluginManager, given: str, reason: str) -> None:
    with pytest.raises(FileNotFoundError, match=reason):
        resolve_recipe(given, manager)


def test_list(manager: QuadPluginManager, folder: Path) -> None:
    assert list_recipes(manager) == {name: folder / f"{name}.yaml" for name in ("fine_w4a4", "fine_w4a16")}


def test_builtin_folder_holds_the_published_recipes() -> None:
    assert (builtin_recipe_folder() / "quad_w4a4.yaml").is_file()


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"caf\xe9: 1")
    with pytest.raises(ValueError, match=r"a\.yaml is not UTF-8 text \(byte 3\)"):
        validate_recipe(tmp_path / "a.yaml")
