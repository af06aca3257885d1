"""Toys that are worth inspecting: a model with outliers, and checkpoints made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quad_modifiers

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}}
    DynamicActQuant: {{u_type_bits: 4, d_type_bits: {d_type_bits}}}
    OutlierSplitGPTQ: {{bits: 4}}
"""
PROJECTION = RECIPE.format(d_type_bits=4)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        "".join(f"{i}. Seven wizards mixed a jug of black liquid and measured it twice.\n" for i in range(400))
    )
    return file


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(PROJECTION)
    return file


@pytest.fixture(scope="session")
def windows() -> list[torch.Tensor]:
    ids = torch.randint(3, 320, (6, 48), generator=torch.Generator().manual_seed(5))
    return list(ids.split(1))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_toy, toy_tokenizer, windows):
    """Return `make_checkpoint(d_type_bits=4, name=...)`: a QUAD checkpoint of the toy; never write to it."""
    pytest.importorskip("llmcompressor")
    made: dict[str, Path] = {}

    def make(d_type_bits: int = 4, model_type: str = "llama") -> Path:
        name = f"{model_type}-w4a4a{d_type_bits}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("made") / name
            quad_modifiers.oneshot(
                make_toy(model_type),
                RECIPE.format(d_type_bits=d_type_bits),
                dataset=[window[0] for window in windows],
                num_calibration_samples=6,
                max_seq_length=48,
                output_dir=made[name],
            )
            toy_tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts blank, which takes most of the time of a toy's report."""
    from quad_modifiers.tools.inspection import figures

    monkeypatch.setattr(figures, "draw", lambda _: ("<svg></svg>", b"\x89PNG"))
