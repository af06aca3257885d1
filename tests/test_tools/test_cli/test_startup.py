"""Asking for help must not take seconds, and the libraries are still taught the format in time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quad_modifiers

ROOT = Path(quad_modifiers.__file__).parents[1]
HEAVY = {"torch", "transformers", "llmcompressor", "huggingface_hub", "numpy"}


def run(code: str) -> str:
    """Run code in a fresh process and return its output."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compress", "--help"], ["publish", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    output = run(f"import sys; from quad_modifiers.tools.cli import main; main({arguments}); print(*sys.modules)")
    assert HEAVY & set(output.splitlines()[-1].split()) == set()


def test_a_model_is_fetched_without_torch() -> None:
    output = run("import sys, quad_modifiers.tools.demo.original; print(*sys.modules)")
    assert {"torch", "transformers"} & set(output.split()) == set()


IMPORTS = [
    "import quad_modifiers, transformers",
    "import transformers, quad_modifiers",
    "import quad_modifiers, llmcompressor",
    "import llmcompressor, quad_modifiers",
    "from quad_modifiers.plugins import plugin_table; plugin_table()",
    "import quad_modifiers.checkpoint.models",
    "import quad_modifiers.checkpoint.save",
    "import quad_modifiers.checkpoint.opened",
    "import quad_modifiers.modifiers.outlier_split_gptq",
]


@pytest.mark.parametrize("imports", IMPORTS)
def test_everything_is_registered_whatever_is_imported_first(imports: str) -> None:
    if "llmcompressor" in imports or ".modifiers." in imports:
        pytest.importorskip("llmcompressor")
    run(f"""{imports}
import sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "quad" in AUTO_QUANTIZER_MAPPING
if "llmcompressor" in sys.modules:
    from llmcompressor.modifiers import ModifierFactory
    assert "OutlierSplitGPTQ" in ModifierFactory._registered_registry
""")
