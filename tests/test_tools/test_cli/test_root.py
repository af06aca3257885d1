"""`quad` itself: help, version, exit codes, errors."""

from __future__ import annotations

import pkgutil
import platform
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import quad_modifiers
from quad_modifiers.plugins import PluginWarning
from quad_modifiers.recipe import RecipeError
from quad_modifiers.recipe.problems import Problem
from quad_modifiers.records.tested_versions import TESTED, is_tested
from quad_modifiers.tools.cli import main as entry
from quad_modifiers.tools.cli import recipes
from quad_modifiers.tools.cli.errors import describe, exit_code
from quad_modifiers.tools.cli.installed_versions import native_kernels

COMMANDS = [
    ("compress",),
    ("finetune",),
    ("merge",),
    ("eval",),
    ("inspect",),
    ("compare",),
    ("recipes",),
    ("recipes", "list"),
    ("recipes", "show"),
    ("recipes", "validate"),
    ("recipes", "suggest"),
    ("plugins",),
    ("export",),
    ("publish",),
]


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["nothing", "--help"])
def test_help(quad, arguments: tuple[str, ...]) -> None:
    done = quad(*arguments)
    assert (done.code, done.err) == (0, "")
    for command in COMMANDS:
        assert command[0] in done.out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_names_its_python_function(quad, command: tuple[str, ...]) -> None:
    done = quad(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert "Usage: quad" in done.out
    named = re.search(r"Python:\s+([\w.]+)", done.out)
    assert named, "the help does not name a Python function"
    if "." in named[1]:
        assert callable(pkgutil.resolve_name(":".join(named[1].rsplit(".", 1))))


def test_version_lists_what_is_installed(quad) -> None:
    done = quad("--version")
    first, *rows = done.out.splitlines()
    assert first == f"quad-modifiers {quad_modifiers.__version__}"
    found = dict(row.split(maxsplit=1) for row in rows[:-1])
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")
    assert set(found) == set(TESTED)
    assert rows[-1].startswith("native kernels ")


def test_version_warns_of_what_was_not_tested(quad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TESTED, "torch", ("1.0.0",))
    done = quad("--version")
    assert done.code == 0
    installed = version("torch")
    assert f"warning: torch {installed} was not tested with quad-modifiers" in done.err
    assert is_tested("transformers", f"{TESTED['transformers'][0]}+cpu")
    assert not is_tested("python", "3.9.1")


def test_version_names_the_instruction_set_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("quad_kernels.native.library")
    try:
        expected = library.supported()[0]
    except library.NativeLibraryError:
        pytest.skip("no native kernels here")
    monkeypatch.delenv("QUAD_KERNELS_ISA", raising=False)
    assert native_kernels() == expected
    old = tmp_path / "cpuinfo"
    old.write_text("flags\t\t: fpu avx2 fma f16c\n")
    assert native_kernels(old) == "avx2"
    monkeypatch.setenv("QUAD_KERNELS_ISA", "amx")
    assert native_kernels(old) == "amx, which this processor does not have"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compres",), "No such command 'compres'"),
        (("compress", "model"), "Missing argument"),
        (("compress", "model", "quad_w4a4"), "Missing option '--output'"),
        (("compress", "model", "quad_w4a4", "-o", "out", "--samples", "0"), "--samples"),
        (("compress", "model", "quad_w4a4", "-o", "out", "--sample", "3"), "No such option"),
        (("export", "model", "-o", "out", "--format", "gguf"), "gguf"),
    ],
)
def test_wrong_usage(quad, arguments: tuple[str, ...], message: str) -> None:
    done = quad(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "--help`)" in done.err
    assert done.err.count("\n") == 1


def test_debug_shows_the_traceback_and_may_stand_anywhere(quad) -> None:
    for arguments in (("--debug", "recipes", "show", "nothing"), ("recipes", "show", "nothing", "--debug")):
        done = quad(*arguments)
        assert done.code == 2
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1].startswith("error: recipe 'nothing'")
    assert "Traceback" not in quad("recipes", "show", "nothing").err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("rank (64)\n  must be smaller"), 2, "rank (64) must be smaller"),
        (FileNotFoundError("there is no x"), 2, "there is no x"),
        (FileExistsError("x exists"), 2, "x exists"),
        (OSError("disk full"), 1, "disk full"),
        (RuntimeError("refused"), 1, "refused"),
        (KeyError("a"), 1, "KeyError: 'a'; run the command again with --debug for the traceback"),
        (AssertionError(), 1, "AssertionError: ; run the command again with --debug for the traceback"),
        (
            ModuleNotFoundError("No module named 'llmcompressor'", name="llmcompressor.core"),
            1,
            "No module named 'llmcompressor'; install it with `pip install 'quad-modifiers[compress]'`",
        ),
        (
            RecipeError("a.yaml", [Problem(3, "no", "do"), Problem(4, "nor", "do")]),
            2,
            "the recipe cannot be used:\na.yaml:3: no. do.\na.yaml:4: nor. do.",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors(error: Exception, code: int, text: str) -> None:
    assert exit_code(error) == code
    assert describe(error) == text


def test_an_interrupted_command(quad, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quad_modifiers.plugins.plugin_table", interrupted)
    assert quad("plugins") == (130, "", "interrupted\n")


def test_only_our_warnings_are_shown(quad, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> list[object]:
        warnings.simplefilter("always")
        warnings.warn("left out", PluginWarning, stacklevel=1)
        warnings.warn_explicit("deprecated", DeprecationWarning, "somewhere/else.py", 1)
        return []

    monkeypatch.setattr("quad_modifiers.plugins.plugin_table", warn)
    assert quad("plugins").err == "warning: left out\n"


def test_python_m(start_quad: Callable) -> None:
    process = start_quad("--version")
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()[0]) == (0, f"quad-modifiers {quad_modifiers.__version__}"), err


class TestRecipes:
    def test_list(self, quad) -> None:
        done = quad("recipes")
        assert done.code == 0
        assert done == quad("recipes", "list")
        for line in ("quad_w4a4 ", "QuaRot: the plain Hadamard rotation", "quad-modifiers"):
            assert line in done.out

    def test_summary_of_a_recipe_without_header(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("a_stage:\n")
        assert recipes._summary(tmp_path / "a.yaml") == ""

    def test_show_prints_the_file_as_it_is(self, quad) -> None:
        path = quad_modifiers.recipe.resolve_recipe("quad_w4a4")
        assert quad("recipes", "show", "quad_w4a4") == (0, path.read_text(), "")

    def test_validate(self, quad, recipe: Path) -> None:
        pytest.importorskip("llmcompressor")
        done = quad("recipes", "validate", recipe, "quad_w4a4")
        assert done.code == 0
        assert [line.rpartition(": ")[2] for line in done.out.splitlines()] == ["sound", "sound"]

    def test_validate_names_line_and_remedy(self, quad, recipe: Path) -> None:
        pytest.importorskip("llmcompressor")
        recipe.write_text(recipe.read_text().replace("bits: 4}", "bitz: 4}"))
        done = quad("recipes", "validate", "quad_w4a4", recipe)
        assert done.code == 2
        assert f"{recipe}:6: OutlierSplitGPTQ has no field 'bitz'. Did you mean bits?" in done.out


def test_plugins(quad) -> None:
    done = quad("plugins")
    assert done.code == 0
    for line in ("quad-modifiers", "modifier SVDOutlierProjection", "architecture llama", "recipe quad_w4a4"):
        assert line in done.out


def test_entry_point_is_the_function(pytestconfig: pytest.Config) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["quad"] == f"{entry.__module__.rpartition('.')[0]}:{entry.__name__}"
