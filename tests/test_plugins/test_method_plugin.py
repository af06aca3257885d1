"""The cost of a new method: a distribution that is installed separately adds all of it, and no file here changes.

`method_plugin` brings a term of the linear, a section of the checkpoint, a weight layout with its backend, and a model
family with fused linears. Its checks run in a process where it is installed; what is left to see here is what its
checkpoints are to those who do not have it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import quad_modifiers  # noqa: F401  (teaches transformers the format)
from quad_modifiers.plugins import PluginError
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.records.widths import width_tags

from .installed import install, run, search_path

MODULES = sorted(path.name for path in (Path(__file__).parent / "method_plugin" / "checks").glob("test_*.py"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints `branched`, `noted` and `twin`, which the checks of the plugin left behind."""
    folder = tmp_path_factory.mktemp("method")
    target, made = install("method_plugin", folder), folder / "made"
    settings = ["-p", "no:cacheprovider", f"--basetemp={made}"]
    path = search_path(target)
    output = run([sys.executable, "-m", "pytest", *settings, "checks"], folder / "source", PYTHONPATH=path)
    assert all(f"checks/{module}" in output for module in MODULES)
    return made


def test_its_checks_pass_where_it_is_installed(checkpoints: Path) -> None:
    assert checkpoints.is_dir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("branched", "a linear has the term 'low_rank', which no installed package knows; install the plugin"),
        ("noted", "it has the section 'method_note', which no installed package knows; install the plugin"),
    ],
)
def test_without_it_a_checkpoint_is_refused_by_name(name: str, message: str, checkpoints: Path) -> None:
    with pytest.raises(PluginError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoints / name)


def test_without_it_the_model_family_is_unknown(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match=r"quad_twin \(pip install quad-modifiers, then import quad_modifiers\)"):
        AutoModelForCausalLM.from_pretrained(checkpoints / "twin")


def test_what_the_files_say_is_told_without_it(checkpoints: Path) -> None:
    assert width_tags(read_inventory(checkpoints / "branched")) == ["w4a4"]
    assert width_tags(read_inventory(checkpoints / "twin")) == [], "which linears write the stream is not known"
