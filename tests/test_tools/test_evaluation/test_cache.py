"""Results that are kept."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import pytest

from quad_modifiers.tools.evaluation import cache

KEY = {"model": "abc", "task": "a", "limit": None}


def test_round_trip(kept: Path) -> None:
    assert cache.read(KEY) is None
    cache.keep(KEY, {"values": [1.0, 0.0]})
    assert cache.read(KEY) == {"values": [1.0, 0.0]}
    assert cache.read({**KEY, "limit": 5}) is None
    assert cache.read(dict(reversed(KEY.items()))) is not None
    assert [file.suffix for file in kept.iterdir()] == [".json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_damaged_file_is_no_result(kept: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.keep(KEY, 1)
    (file,) = kept.iterdir()
    file.write_text(content, encoding="latin-1")
    assert cache.read(KEY) is None
    assert "measuring again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        cache.keep(KEY, 1)
    assert "cannot be kept" in caplog.text


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    assert cache.cache_folder() == Path.home() / ".cache" / "quad_modifiers" / "evaluation"


def test_a_home_folder_in_the_variable_and_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.CACHE_VARIABLE, "~/results")
    assert cache.cache_folder() == tmp_path / "results"
    monkeypatch.delenv(cache.CACHE_VARIABLE)

    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.cache_folder().is_relative_to(tempfile.gettempdir())


def test_fingerprint_is_of_what_computes(toy_checkpoint, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(toy_checkpoint("llama"), folder)
    before = cache.fingerprint(first)
    assert cache.fingerprint(second) == before
    for name in ("evaluation.json", "README.md", ".hidden", "recipe.yaml"):
        (second / name).write_text("x")
    assert cache.fingerprint(second) == before
    weights = second / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cache.fingerprint(second) != before
    (first / "tokenizer.json").unlink()
    assert cache.fingerprint(first) != before
