"""Idle threads of a command sleep soon, unless the user has said how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "quad": "from quad_modifiers.tools.cli import main; main(['plugins'])",
    "demo": "from quad_modifiers.tools.demo.__main__ import main; main(['fetch', 'smollm2', '--to', '/dev/null/x'])",
}


def shown(setting: dict[str, str], code: str) -> str:
    """What libgomp reads when it is loaded, as it says itself after `code` has brought torch in."""
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport torch"],
        env={**free, "OMP_DISPLAY_ENV": "VERBOSE", **setting},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    (line,) = lines  # each copy of the library says the same
    return line.split("=")[1].strip(" '")


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is PyTorch's on Linux")
@pytest.mark.parametrize("code", COMMANDS.values(), ids=COMMANDS)
def test_threads_of_a_command_wait_briefly(code: str) -> None:
    assert int(shown({}, "")) > 100_000, "a library leaves the waiting as it is"
    assert 0 < int(shown({}, code)) < 10_000
    assert shown({"GOMP_SPINCOUNT": "77"}, code) == "77"
    assert shown({"OMP_WAIT_POLICY": "passive"}, code) == "0"
