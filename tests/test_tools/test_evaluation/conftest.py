"""Results of an evaluation are kept in a folder of the test's own."""

from pathlib import Path

import pytest

from quad_modifiers.tools.evaluation.cache import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder where results are kept."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"
