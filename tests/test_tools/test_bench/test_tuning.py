"""The measurements of tuning, on toys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")
pytest.importorskip("llmcompressor")
pytest.importorskip("gensim")

from quad_modifiers.data import news_articles
from quad_modifiers.tools.bench import tuning_benchmark as tuning
from quad_modifiers.tools.bench import tuning_peers
from quad_modifiers.tools.bench.__main__ import main
from quad_peft import get_outlier_model

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {}
    OutlierSplitGPTQ: {}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> tuple[str, str, str]:
    """A toy, its QUAD checkpoint, and an adapter of random values."""
    from quad_modifiers import oneshot

    folder = tmp_path_factory.mktemp("tuning")
    original = toy_checkpoint()
    ids = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
    oneshot(
        str(original), RECIPE, dataset=ids, num_calibration_samples=8, max_seq_length=48, output_dir=folder / "quad"
    )
    model = get_outlier_model(AutoModelForCausalLM.from_pretrained(folder / "quad"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder / "adapter")
    return str(original), str(folder / "quad"), str(folder / "adapter")


def test_rows_tell_the_adapter_from_the_checkpoint(
    folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, quad, adapter = folders
    windows = {"news": 2}
    monkeypatch.setattr(tuning, "TEXTS", {"news": lambda: news_articles()[:30]})
    (alone,) = tuning.measure_tuning(original, quad, windows)
    (tuned,) = tuning.measure_tuning(original, quad, windows, adapter)
    assert alone["original_perplexity"] == tuned["original_perplexity"]
    assert tuned["divergence"] > alone["divergence"] > 0  # random values make it worse
    assert alone["ratio"] == alone["perplexity"] / alone["original_perplexity"]


def test_results_are_kept_with_the_machine(
    folders: tuple[str, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = {"some": lambda: ["one word after another "] * 300, "other": lambda: ["def nothing(): pass\n"] * 300}
    monkeypatch.setattr(tuning, "TEXTS", texts)
    monkeypatch.setattr("quad_modifiers.tools.bench.__main__.TEXTS", texts)
    results = tmp_path / "tuning.jsonl"
    assert main(["tuning", *folders[:2], "--windows", "2", "--results", str(results)]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["some", "other"]
    assert [row["windows"] for row in rows] == [2, 1]
    assert all(row["torch"] and row["commit"] is not None for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_peers_differ_in_what_is_trained(folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_peers, "LENGTH", 32)
    monkeypatch.setattr(tuning_peers, "LORA_RATES", (1e-3,))
    rows = list(tuning_peers.compare_tuning(*folders[:2], steps=2))
    assert [row["peer"] for row in rows] == [peer.title for peer in tuning_peers.PEERS]
    outlier, lora, distilled, lora_on_quad = rows
    assert outlier["parameters"] == distilled["parameters"]
    assert abs(lora_on_quad["parameters"] / outlier["parameters"] - 1) < 0.3  # ranks are whole numbers
    assert outlier["loss_before"] == distilled["loss_before"] == lora_on_quad["loss_before"]
    assert lora["loss_before"] != outlier["loss_before"]
    assert lora["divergence_after"] is None
    assert distilled["divergence_after"] is not None


@pytest.mark.parametrize("which", [0, 1])
def test_a_training_step_is_measured(folders: tuple[str, str, str], which: int) -> None:
    found = tuning._train_here(folders[which])
    assert found["parameters"] > 0
    assert found["seconds"] > 0
    assert found["peak"] > 2**20
