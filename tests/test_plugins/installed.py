"""Installs a distribution of this folder into a folder of its own, and runs a Python that finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import quad_kernels

import quad_modifiers


def install(distribution: str, folder: Path) -> Path:
    """Returns the target folder, `folder`/installed; the sources are copied to `folder`/source."""
    source, target = folder / "source", folder / "installed"
    unwanted = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(Path(__file__).parent / distribution, source, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    run([*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)], folder)
    return target


def search_path(*first: Path) -> str:
    """Returns a PYTHONPATH of some folders and the packages of this project."""
    packages = (Path(package.__file__).parents[1] for package in (quad_modifiers, quad_kernels))
    return os.pathsep.join(map(str, (*first, *packages)))


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Returns the output of a command that runs in `folder`; fails with what it printed."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
