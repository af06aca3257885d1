"""What the base installation needs: nothing of the commands, of compressing, tuning or evaluating."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quad_modifiers
from quad_modifiers.records.tested_versions import TESTED

ROOT = Path(quad_modifiers.__file__).parents[1]
OPTIONAL = ("typer", "rich", "click", "llmcompressor", "datasets", "gensim", "peft", "lm_eval", "matplotlib", "gguf")

# httpx comes with huggingface_hub, so only this project is kept from importing it.
BLOCK = """
import builtins, sys

for name in OPTIONAL:
    sys.modules[name] = None
plain_import = builtins.__import__

def guarded(name, globals=None, *further, **named):
    if name == "httpx" and str((globals or {}).get("__name__")).startswith("quad_"):
        raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
    return plain_import(name, globals, *further, **named)

builtins.__import__ = guarded
"""
LOAD = """
import torch
import quad_modifiers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(type(model).__name__, bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()))
"""
COMMAND = "from quad_modifiers.tools.cli import main\nraise SystemExit(main(['--version']))"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", f"OPTIONAL = {OPTIONAL}{BLOCK}{code}", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_checkpoint_loads_and_runs(quad_checkpoint) -> None:
    done = run(LOAD, quad_checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["QuadLlamaForCausalLM", "True"]


def test_the_command_says_what_it_needs() -> None:
    done = run(COMMAND)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the command `quad` needs typer and rich; install them with `pip install 'quad-modifiers[cli]'`\n"
    )


@pytest.fixture(scope="module")
def project() -> dict:
    file = ROOT / "pyproject.toml"
    if not file.is_file():
        pytest.skip("not in a checkout")
    return tomllib.loads(file.read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=;~! ]", requirement)[0].lower() for requirement in requirements}


def test_what_is_optional_is_in_extras(project) -> None:
    base, extras = names(project["dependencies"]), project["optional-dependencies"]
    assert not base & {name.replace("_", "-") for name in (*OPTIONAL, "httpx")}
    assert [name for name, needed in extras.items() if "gensim" in names(needed)] == ["text"]
    assert {"compress", "demo", "eval", "peft", "report", "triton", "docs", "dev", "cli", "text"} <= set(extras)
    for name in ("compress", "eval", "peft", "report"):
        assert "quad-modifiers[cli]" in extras[name], "the commands of this extra would not start"


def test_the_table_of_tested_versions_is_that_of_the_code_and_the_constraints(project) -> None:
    page = (ROOT / "docs/guide/installation.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\d., ]+) \|", page, re.M))
    assert {name: tuple(text.strip().split(", ")) for name, text in rows.items()} == TESTED
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    for name, versions in TESTED.items():
        if name in pinned:
            assert pinned[name] in versions, f"{name} {pinned[name]} of constraints.txt is not said to be tested"
