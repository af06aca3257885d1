"""`quad publish`: what it prints; what it does is in tests/test_tools/test_publishing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quad_modifiers.tools import publishing
from quad_modifiers.tools.publishing import HubError


@pytest.fixture
def checkpoint(quad_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be changed at will."""
    return Path(shutil.copytree(quad_checkpoint, tmp_path / "toy-quad"))


def test_dry_run_prints_files_and_card(quad, checkpoint: Path) -> None:
    before = {path.name for path in checkpoint.iterdir()}
    done = quad("publish", checkpoint, "me/toy", "--dry-run", "--skip-check", "--license", "mit")
    assert done.code == 0, done.err
    files, _, card = done.out.partition("\n---\n")
    for name in before | {"README.md", "all"}:
        assert f"\n {name}" in files or f"\n{name}" in files
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size / 1e3:.1f} kB" in files
    assert "license: mit" in card
    assert f"---\n{card}" == publishing.plan(checkpoint, "me/toy", license="mit", check=False).card
    assert {path.name for path in checkpoint.iterdir()} == before


def test_without_a_token(quad, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    done = quad("publish", checkpoint, "me/toy")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: checking the token failed: there is no token; log in with")


def test_an_incomplete_folder(quad, checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    done = quad("publish", checkpoint, "me/toy")
    assert (done.code, done.out) == (2, "")
    assert "has no config.json" in done.err


def test_options_reach_the_function(quad, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def stand_in(folder: Path, repo_id: str, **options: object) -> None:
        seen.update(options, folder=folder, repo_id=repo_id)
        raise HubError("the end")

    monkeypatch.setattr(publishing, "publish", stand_in)
    options = ["--private", "--base-model", "org/base", "--license", "mit", "--token", "t", "--revision", "r"]
    done = quad("publish", checkpoint, "me/toy", *options, "--message", "m", "--skip-check", "--overwrite")
    assert (done.code, done.err) == (1, "error: the end\n")
    assert seen == {
        "folder": checkpoint,
        "repo_id": "me/toy",
        "private": True,
        "base_model": "org/base",
        "license": "mit",
        "token": "t",
        "revision": "r",
        "message": "m",
        "check": False,
        "overwrite": True,
    }
