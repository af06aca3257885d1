"""`compare_checkpoints`: from files alone, and against a common original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quad_modifiers.tools.inspection import compare_checkpoints
from quad_modifiers.tools.inspection.compared import comparison_rows

pytest.importorskip("llmcompressor")

EVALUATION = {
    "format_version": 1,
    "baseline": "org/toy",
    "perplexity": [
        {"text": "held-out", "window_length": 512, "tokens": 100, "value": 21.5, "stderr": 0.25, "baseline": 18.0}
    ],
    "results": {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.02, "alias": "piqa"}},
}


@pytest.fixture(scope="module")
def pair(make_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    evaluated = tmp_path_factory.mktemp("pair") / "evaluated"
    shutil.copytree(make_checkpoint(4), evaluated)
    (evaluated / "evaluation.json").write_text(json.dumps(EVALUATION))
    return [evaluated, make_checkpoint(8)]


def test_from_files(pair: list[Path]) -> None:
    found = compare_checkpoints(pair)
    four, eight = found.entries
    assert [entry.name for entry in found.entries] == ["evaluated", "llama-w4a4a8"]
    assert [entry.widths for entry in found.entries] == ["w4a4", "w4a4a8"]
    assert four.modifiers == ["SVDOutlierProjection", "DynamicActQuant", "OutlierSplitGPTQ"]
    assert (four.rank, four.basis, four.format) == (8, "extended", "QUAD, version 1")
    tensors = load_file(pair[0] / "model.safetensors")
    assert four.total == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert [(score.what, score.value) for score in four.scores] == [
        ("held-out, windows of 512, 100 tokens", 21.5),
        ("piqa, acc", 0.5),
    ]
    assert eight.scores == []
    assert (found.baseline, found.settings, four.loss) == (None, None, None)


def test_rows(pair: list[Path]) -> None:
    header, rows = comparison_rows(compare_checkpoints(pair))
    assert header == ("", "evaluated", "llama-w4a4a8")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["bits"] == ("w4a4", "w4a4a8")
    assert cells["held-out, windows of 512, 100 tokens"] == ("21.50 ± 0.25 (original 18.00)", "-")
    assert cells["piqa, acc"] == ("0.5000 ± 0.0200", "-")
    assert not any("divergence" in name for name in cells)


def test_against_the_original(pair: list[Path], toy_checkpoint, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = compare_checkpoints(
        pair, tmp_path / "out", baseline=toy_checkpoint("llama"), dataset=str(text_file), eval_windows=2, seq_length=48
    )
    four, eight = found.entries
    assert four.loss.divergence > eight.loss.divergence > 0
    assert len(four.blocks) == 2
    assert four.blocks[0].alone > eight.blocks[0].alone
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for name in ("size", "perplexity", "tasks", "block-error", "block-alone"):
        assert (tmp_path / "out" / f"{name}.png").is_file()
        assert f'<section id="{name}">' in page
    assert "http" not in page
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [entry["name"] for entry in numbers["entries"]] == ["evaluated", "llama-w4a4a8"]


def test_an_unquantized_model_beside_them(pair: list[Path], toy_checkpoint) -> None:
    found = compare_checkpoints([*pair, toy_checkpoint("llama")])
    assert (found.entries[2].format, found.entries[2].widths) == ("unquantized", None)


def test_folders_of_one_name(pair: list[Path], tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(pair[0], tmp_path / parent / "out")
    found = compare_checkpoints([tmp_path / "a" / "out", tmp_path / "b" / "out"])
    assert [entry.name for entry in found.entries] == ["a/out", "b/out"]
    for parent in ("c", "d"):
        shutil.copytree(pair[0], tmp_path / parent / "same" / "out")
    found = compare_checkpoints([tmp_path / "c" / "same" / "out", tmp_path / "d" / "same" / "out", pair[1]])
    assert [entry.name for entry in found.entries] == ["c/same/out", "d/same/out", "llama-w4a4a8"]


def test_results_on_other_items_are_not_beside_each_other(pair: list[Path], tmp_path: Path) -> None:
    for name, items, interval in (("all", 450, [-0.1, -0.01]), ("few", 10, [-0.1, 0.1])):
        shutil.copytree(pair[0], tmp_path / name)
        task = {"task": "quad_code", "metric": "acc", "items": items, "value": 0.5, "baseline": 0.55}
        (tmp_path / name / "evaluation.json").write_text(
            json.dumps({"format_version": 1, "baseline": "x", "comparisons": [{**task, "interval": interval}]})
        )
    rows = {row[0]: row[1:] for row in comparison_rows(compare_checkpoints([tmp_path / "all", tmp_path / "few"]))[1]}
    assert rows["quad_code, acc, 450 items"] == ("0.5000 (original 0.5500)", "-")
    assert rows["quad_code, acc, 10 items"] == ("-", "0.5000 (original 0.5500, no difference seen)")


def test_bad_input(pair: list[Path], make_checkpoint, toy_checkpoint, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two checkpoints, not 1"):
        compare_checkpoints(pair[:1])
    with pytest.raises(ValueError, match="is given more than once"):
        compare_checkpoints([pair[0], pair[0]])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compare_checkpoints([pair[0], tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        compare_checkpoints([pair[0], tmp_path / "empty"])
    with pytest.raises(ValueError, match="the baseline must be the unquantized original"):
        compare_checkpoints(pair, baseline=pair[0])
    with pytest.raises(ValueError, match="made of a llama model, but the baseline is a qwen2 model"):
        compare_checkpoints(pair, baseline=toy_checkpoint("qwen2"))
    with pytest.raises(ValueError, match=r"evaluated: no change of basis"):
        compare_checkpoints(
            pair, baseline=toy_checkpoint("llama", seed=7), dataset=str(text_file), eval_windows=2, seq_length=48
        )


def test_a_damaged_evaluation(pair: list[Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"evaluation\.json: format_version"):
        compare_checkpoints([tmp_path / "out", pair[1]])
