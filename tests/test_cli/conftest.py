"""Running `quad` in this process and in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import quad_modifiers
from quad_modifiers.tools.cli import main

ROOT = Path(quad_modifiers.__file__).parents[1]
RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def quad(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return `quad("compress", ...)`, which runs a command in this process."""

    def run(*arguments: object) -> Outcome:
        code = main([str(each) for each in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def start_quad() -> Callable[..., subprocess.Popen[str]]:
    """Return `start_quad("compress", ...)`, which starts a command in a process of its own."""

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "quad_modifiers", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A background job of a script ignores Ctrl-C, and so would what it starts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that fits the toys."""
    file = tmp_path / "toy.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Calibration text."""
    file = tmp_path / "text.txt"
    file.write_text(
        "".join(f"{i}. Seven wizards mixed a jug of black liquid and measured it twice.\n" for i in range(200))
    )
    return file


@pytest.fixture(scope="session")
def quad_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_toy, toy_tokenizer) -> Path:
    """A QUAD checkpoint with tokenizer; never write to it."""
    pytest.importorskip("llmcompressor")
    ids = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("cli") / "toy-quad"
    quad_modifiers.oneshot(
        make_toy("llama"), RECIPE, dataset=ids, num_calibration_samples=8, max_seq_length=48, output_dir=folder
    )
    toy_tokenizer.save_pretrained(folder)
    return folder
