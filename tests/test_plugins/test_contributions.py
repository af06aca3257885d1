"""What plugins return is checked, and names that two claim are refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.plugins import (
    Distribution,
    PluginError,
    QuadPluginManager,
    architectures,
    kernel_backends,
    modifier_paths,
    plugin_table,
    recipe_files,
    recipe_folders,
)

MakePlugin = Callable[..., types.ModuleType]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe folder with one recipe named `twin`."""
    (tmp_path / "twin.yaml").write_text("quad_stage: {}\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no recipe\n", encoding="utf-8")
    return tmp_path


def test_contributions_carry_name_path_and_distribution(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, folder: Path
) -> None:
    llama = types.SimpleNamespace(model_type="llama")
    plugin = make_plugin(
        modifiers={"Clip": "pkg.clip:Clip"},
        architectures=[llama],
        recipe_folders=[folder],
        kernel_backends={"fast": "pkg.kernels:backend"},
    )
    manager.add(plugin, alpha, "entry")
    contributed = modifier_paths(manager)["Clip"]
    assert (contributed.name, contributed.path, contributed.distribution) == ("Clip", "pkg.clip:Clip", alpha)
    assert architectures(manager) == {"llama": llama}
    assert recipe_folders(manager) == [folder]
    assert {name: each.path for name, each in recipe_files(manager).items()} == {"twin": folder / "twin.yaml"}
    assert kernel_backends(manager)["fast"].path == "pkg.kernels:backend"


def test_table_has_a_row_for_each_distribution_and_each_failure(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, beta: Distribution, folder: Path
) -> None:
    manager.add(make_plugin(modifiers={"Clip": "pkg.clip:Clip"}, recipe_folders=[folder]), alpha, "entry")
    with pytest.warns(UserWarning, match="beta-dist"):
        manager.report_failure(beta, "entry", ImportError("gone"))
    first, second = plugin_table(manager)
    assert (first.distribution, first.version, first.failure) == ("alpha-dist", "1.0", None)
    assert first.contributes == ("modifier Clip", "recipe twin")
    assert second.distribution == "beta-dist"
    assert "ImportError: gone" in str(second.failure)


def test_name_claimed_twice_names_both_distributions(
    manager: QuadPluginManager, make_plugin: MakePlugin, alpha: Distribution, beta: Distribution, folder: Path
) -> None:
    for distribution in (alpha, beta):
        plugin = make_plugin(
            modifiers={"Clip": "pkg.clip:Clip"},
            architectures=[types.SimpleNamespace(model_type="llama")],
            recipe_folders=[folder],
            kernel_backends={"fast": "pkg.kernels:backend"},
        )
        manager.add(plugin, distribution, "entry")
    for function, claimed in (
        (modifier_paths, "modifier 'Clip'"),
        (architectures, "architecture 'llama'"),
        (recipe_files, "recipe 'twin'"),
        (kernel_backends, "kernel backend 'fast'"),
    ):
        with pytest.raises(PluginError) as caught:
            function(manager)
        assert claimed in str(caught.value)
        assert "alpha-dist 1.0" in str(caught.value)
        assert "beta-dist 2.0" in str(caught.value)


@pytest.mark.parametrize(
    ("hook", "returned", "reason"),
    [
        ("modifiers", None, "must return a mapping .*NoneType"),
        ("modifiers", ["Clip"], "must return a mapping .*list"),
        ("modifiers", {"Clip": "pkg.clip.Clip"}, "'Clip': 'pkg.clip.Clip'.*'module:Class'"),
        ("modifiers", {"Clip": int}, "'Clip'.*'module:Class'"),
        ("modifiers", {"Clip": "pkg.clip:OtherName"}, "'Clip' has the class name 'OtherName'.*must be equal"),
        ("kernel_backends", {"fast": "pkg"}, "'fast': 'pkg'.*'module:object'"),
        ("architectures", [object()], "has no model_type"),
        ("architectures", {"llama": 1}, "must return a list of Architecture, not dict"),
        ("recipe_folders", "recipes", "must return a list of pathlib.Path, not str"),
        ("recipe_folders", [Path("surely/not/there")], "surely.*existing folder"),
    ],
)
def test_bad_return_names_the_distribution(
    manager: QuadPluginManager,
    make_plugin: MakePlugin,
    alpha: Distribution,
    hook: str,
    returned: Any,
    reason: str,
) -> None:
    manager.add(make_plugin(**{hook: returned}), alpha, "entry")
    read = {
        "modifiers": modifier_paths,
        "kernel_backends": kernel_backends,
        "architectures": architectures,
        "recipe_folders": recipe_folders,
    }[hook]
    with pytest.raises(PluginError, match=rf"alpha-dist 1\.0: .*{reason}"):
        read(manager)
