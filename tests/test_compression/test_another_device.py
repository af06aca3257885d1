"""A model that is worked on elsewhere than it lies, as on a GPU: nothing of it is mixed, and all of it comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

IMITATION = Path(__file__).parents[1] / "another_device" / "imitation.py"
RECIPES = ["quad_w4a4", "quad_w4a4_e8", "resq_w4a4kv4"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="the imitated device is compiled")
def test_a_second_device(tmp_path: Path) -> None:
    """In a process of its own: torch knows such a device until the process ends."""
    command = [sys.executable, str(IMITATION), str(tmp_path), *RECIPES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["recipe"], row["place"]) for row in rows] == [
        (recipe, place) for recipe in RECIPES for place in ("cpu", "imitation")
    ]
    for row in rows:
        assert row["places"] == [row["place"]], row
        assert row["error"] < 0.3, row
