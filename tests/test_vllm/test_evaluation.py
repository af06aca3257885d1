"""`quad eval --backend vllm` beside the same command with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quad_modifiers.checkpoint.format import InputFormat, WeightFormat

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]


def measured(folder: Path, backend: str, scratch: Path) -> dict:
    """evaluation.json of a run in a process of its own."""
    output = scratch / f"{backend}.json"
    command = [sys.executable, "-m", "quad_modifiers", "eval", str(folder), "--tasks", "", "--backend", backend]
    command += ["--perplexity", str(scratch / "text.txt"), "--window-length", "32", "--windows", "6"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        "QUAD_EVALUATION_CACHE": str(scratch / "kept"),
    }
    done = subprocess.run(
        [*command, "-o", str(output)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


def test_perplexity_is_that_of_transformers(toy_quad, write_toy, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("lm_eval")
    # 8 bits: a rounding that falls the other way changes little
    folder = write_toy(toy_quad("llama", weight=WeightFormat(bits=8), quantized=InputFormat(bits=8, clip_ratio=1.0)))
    assert text.parent == tmp_path
    ours, theirs = (measured(folder, backend, tmp_path) for backend in ("vllm", "transformers"))
    assert any(name.startswith("vllm") for name in ours["packages"])
    assert not any(name.startswith("vllm") for name in theirs["packages"])
    (found,), (wanted,) = ours["perplexity"], theirs["perplexity"]
    assert found["tokens"] == wanted["tokens"] == 6 * 31
    assert found["value"] == pytest.approx(wanted["value"], rel=0.02)
