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

import quad_modifiers
from quad_modifiers.tools.cli import main

ROOT = Path(quad_modifiers.__file__).parents[1]


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
