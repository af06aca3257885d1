"""`quad inspect` and `quad compare`: what they print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts blank: tests/test_tools/test_inspection draws them."""
    from quad_modifiers.tools.inspection import figures

    monkeypatch.setattr(figures, "draw", lambda _: ("<svg></svg>", b"\x89PNG"))


SHORT = ("--samples", 4, "--eval-windows", 2, "--seq-length", 48)


def test_inspect_a_model(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = quad(
        "inspect", toy_checkpoint("llama"), "-o", out, "--recipe", recipe, "--dataset", text, "--layer", 1, *SHORT
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(out / "report.html")
    numbers = json.loads((out / "inspection.json").read_text())
    rules = numbers["recommendation"]["rules"]
    for rule in rules:
        assert rule["number"] in done.out
    assert rules[-1]["answer"].split()[0].rstrip(",") in done.out
    assert {surface["layer"] for surface in numbers["surfaces"]} == {1}
    for kind, part in (("inputs", "group"), ("weights", "role")):
        for name in {row[part] for row in numbers[kind]}:
            rows = [row for row in numbers[kind] if row[part] == name]
            means = [
                sum(row["step_to_std"] for row in rows if row["stage"] == stage) / 2 for stage in ("before", "after")
            ]
            (line,) = [line for line in done.out.splitlines() if line.strip().startswith(f"{kind}: {name} ")]
            assert line.split()[-2:] == [f"{mean:.3f}" for mean in means]
    assert "inspecting" in done.err


def test_inspect_a_checkpoint(quad, quad_checkpoint: Path, toy_checkpoint, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = quad("inspect", quad_checkpoint, "-o", out, "--baseline", toy_checkpoint("llama"), "--dataset", text, *SHORT)
    assert done.code == 0, done.err
    assert (out / "block-error.png").is_file()


def test_inspect_bad_input(quad, toy_checkpoint, recipe: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("./nothing",), "there is no model folder ./nothing"),
        ((toy_checkpoint("llama"), "--recipe", "rtn_w4a4"), "has no SVDOutlierProjection"),
        ((toy_checkpoint("llama"), "--recipe", recipe, "--layer", 9), "has no block 9; choose 0 to 1"),
        ((toy_checkpoint("llama"), "--samples", 0), "--samples"),
    ):
        done = quad("inspect", *arguments, "-o", tmp_path / "report")
        assert done.code == 2, done.err
        assert done.err.splitlines()[-1].startswith("error: ")
        assert message in done.err
        assert not (tmp_path / "report").exists()


def test_compare(quad, quad_checkpoint: Path, toy_checkpoint, tmp_path: Path) -> None:
    done = quad("compare", quad_checkpoint, toy_checkpoint("llama"), "-o", tmp_path / "report")
    assert done.code == 0, done.err
    for text in ("toy-quad", "w4a4a8", "QUAD, version 1", "unquantized", "SVDOutlierProjection"):
        assert text in done.out
    assert done.out.splitlines()[-1] == str(tmp_path / "report" / "report.html")
    assert (tmp_path / "report" / "size.png").is_file()


def test_compare_without_a_report(quad, quad_checkpoint: Path, toy_checkpoint, text: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    original = toy_checkpoint("llama")
    short = ("--dataset", text, "--eval-windows", 2, "--seq-length", 48)
    done = quad("compare", quad_checkpoint, original, "--baseline", original, *short)
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if "divergence, nats" in line).split()
    assert float(row[-1]) == pytest.approx(0, abs=1e-4), "the original beside itself"
    assert float(row[-2]) > 1e-3
    assert set(tmp_path.iterdir()) == before


def test_compare_bad_input(quad, quad_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("x")
    for arguments, message in (
        ((quad_checkpoint,), "at least two checkpoints, not 1"),
        ((quad_checkpoint, tmp_path / "nothing"), "there is no folder"),
        ((quad_checkpoint, quad_checkpoint, "-o", tmp_path / "report"), "exists and is not empty"),
    ):
        done = quad("compare", *arguments)
        assert done.code == 2, done.err
        assert message in done.err
