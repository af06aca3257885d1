"""`push_to_hub` of a model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quad_modifiers.tools.publishing import push_to_hub

# huggingface_hub hands httpx a file in a way that httpx deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO = "me/pushed"


def download(hub, folder: Path) -> Path:
    """Write what the stub holds to a folder."""
    folder.mkdir()
    for name in hub.repositories[REPO].names():
        (folder / name).write_bytes(hub.content(REPO, name))
    return folder


@torch.no_grad()
def test_a_loaded_model(hub, checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    push_to_hub(model, REPO, private=True, check=False, license="mit")
    assert hub.repositories[REPO].private
    arrived = download(hub, tmp_path / "arrived")
    assert (arrived / "recipe.yaml").read_bytes() == (checkpoint / "recipe.yaml").read_bytes()
    assert "license: mit" in (arrived / "README.md").read_text().splitlines()
    ids = AutoTokenizer.from_pretrained(arrived)("The quick brown fox", return_tensors="pt").input_ids
    again = AutoModelForCausalLM.from_pretrained(arrived)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_token_false(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="needs a token"):
        push_to_hub(AutoModelForCausalLM.from_pretrained(checkpoint), REPO, token=False)


@torch.no_grad()
def test_a_compressed_model(hub, toy_checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    recipe = (
        "a_stage:\n  a_modifiers:\n"
        "    SVDOutlierProjection: {rank: 8, basis: square}\n    OutlierSplitGPTQ: {bits: 4}\n"
    )
    texts = [f"Document {index} measures the bridge {index * 7} times. " * 20 for index in range(30)]
    model = oneshot(toy_checkpoint("llama"), recipe, dataset=texts, num_calibration_samples=6, max_seq_length=48)
    model.push_to_hub(REPO, check=False)
    arrived = download(hub, tmp_path / "arrived")
    assert "SVDOutlierProjection" in (arrived / "recipe.yaml").read_text()
    assert "square basis" in (arrived / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(arrived)("The quick brown fox", return_tensors="pt").input_ids
    assert torch.equal(AutoModelForCausalLM.from_pretrained(arrived)(ids).logits, model(ids).logits)


def test_the_models_own_method(hub, checkpoint: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).push_to_hub(REPO, check=False, commit_message="By method")
    assert hub.repositories[REPO].commits[0]["summary"] == "By method"
    assert "## What is quantized" in hub.content(REPO, "README.md").decode()
