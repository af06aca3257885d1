"""Recipes, texts and settings of runs on toys that tests interrupt, move to the disk, or share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.journal import Step

TEXTS = [f"Document {index} measures the bridge {index * 7} times. " * 20 for index in range(30)]
SETTINGS = {"dataset": TEXTS, "num_calibration_samples": 6, "max_seq_length": 48}
PROJECTION = "SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 8}"
RECIPES = {
    "corrected": (PROJECTION, "DynamicActQuant: {}", "OutlierSplitGPTQ: {error_correction: 0.4, sweeps: 1}"),
    "auto": (
        PROJECTION.replace("}", ", balanced: true}"),
        "DynamicActQuant: {u_type_clip_ratio: auto, d_type_clip_ratio: auto}",
        "OutlierSplitGPTQ: {error_correction: auto}",
    ),
    "two levels": (
        PROJECTION,
        "DynamicActQuant: {strategy: group, group_size: 16, sub_scale_bits: 4}",
        "OutlierSplitGPTQ: {group_size: 16, sub_scale_bits: 4, ignore: [gate_proj, up_proj, lm_head]}",
    ),
    "other bits": (
        PROJECTION,
        "DynamicActQuant: {d_type_clip_ratio: auto, overrides: [{layers: 1, linears: down_proj, bits: 8}]}",
        "OutlierSplitGPTQ: {overrides: [{layers: 0, linears: [gate_proj, up_proj], bits: 8}]}",
    ),
    "NVFP4": (
        PROJECTION,
        "DynamicActQuant: {number_format: nvfp4, d_type_clip_ratio: auto, four_over_six: true}",
        "OutlierSplitGPTQ: {number_format: nvfp4, error_correction: 0.4, sweeps: 1}",
    ),
    "zero points": ("OutlierSplitGPTQ: {symmetric: false, group_size: 16}",),
    "rounded": (PROJECTION, "OutlierSplitGPTQ: {method: rtn}"),
    "cache": (PROJECTION, "DynamicActQuant: {}", "OutlierSplitGPTQ: {}", "KVCacheQuant: {high_rank: 4, high_bits: 8}"),
    "ends": (PROJECTION, "OutlierSplitGPTQ: {}", "EmbeddingHeadQuant: {}"),
    "smoothed": ("SmoothQuantModifier: {smoothing_strength: 0.5}", PROJECTION, "OutlierSplitGPTQ: {}"),
    "outliers in 8 bits": (
        "SVDOutlierProjection: {rank: 1/8, basis: square, rotation: random, o_proj_rank_per_head: 1/8}",
        "DynamicActQuant: {outlier_bits: 8, o_proj_scale: head}",
        "OutlierSplitGPTQ: {outlier_bits: 8}",
    ),
    "learned": (
        PROJECTION,
        "FlattenedRotation: {tokens: 128, rounds: 4}",
        "LowRankBranch: {rank: 4}",
        "DynamicActQuant: {}",
        "OutlierSplitGPTQ: {}",
    ),
    "tuned": (PROJECTION, "DynamicActQuant: {}", "OutlierSplitGPTQ: {}", "OutlierLoRA: {batch_size: 2}"),
}


def recipe_text(name: str) -> str:
    return "quad_stage:\n  quad_modifiers:\n" + "".join(f"    {line}\n" for line in RECIPES[name])


def files_of(folder: Path) -> dict[str, bytes]:
    """What a checkpoint holds but for the time that its tuning took, and the checksum of that."""
    timed = {"tuning.json", "checksums.json"} if (folder / "tuning.json").exists() else set()
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in timed}


class CutOff:
    """Ends the process's run, as Ctrl-C would, before or after the given layer is kept; counts the layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1, after: bool = True) -> None:
        self.count = 0
        real = Step.finish

        def finish(step: Step, *arguments: Any, **named: Any) -> None:
            self.count += 1
            if self.count == at and not after:
                raise KeyboardInterrupt
            real(step, *arguments, **named)
            if self.count == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(Step, "finish", finish)
