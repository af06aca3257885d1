"""A compression that several processes share: the checkpoint of one process, whatever happens to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import quad_modifiers
from quad_modifiers.journal import SharedStep, Step
from tests.test_compression.toy_runs import SETTINGS, files_of, recipe_text

pytest.importorskip("llmcompressor")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

# Windows of 2048 tokens would be one batch: as many windows as give each rank some.
MORE = SETTINGS | {"num_calibration_samples": 100, "max_seq_length": 64}


@pytest.mark.parametrize(("name", "count"), [("corrected", 2), ("auto", 3), ("smoothed", 2), ("learned", 2)])
def test_the_checkpoint_is_the_same(
    name: str, count: int, toy_checkpoint, tmp_path: Path, in_ranks, one_thread
) -> None:
    model, text = toy_checkpoint("llama"), recipe_text(name)
    quad_modifiers.oneshot(model, text, output_dir=tmp_path / "alone", **MORE)

    def work(rank: int) -> Any:
        found = quad_modifiers.oneshot(model, text, output_dir=tmp_path / "shared", **MORE)
        return float(found(**found.dummy_inputs).logits.sum())

    logits = in_ranks(count, work)
    assert isinstance(logits[0], float), logits
    assert logits == logits[:1] * count
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")
    assert not (tmp_path / "shared.partial").exists()


def test_what_one_left_behind_others_go_on_with(toy_checkpoint, tmp_path: Path, in_ranks) -> None:
    """Two ranks, one of which is killed in its work; three go on, are cut off as well; one process ends it."""
    model, text = toy_checkpoint("llama"), recipe_text("corrected")
    quad_modifiers.oneshot(model, text, output_dir=tmp_path / "whole", **MORE)

    def cut_off(rank: int, victim: int, layer: int, resume: bool) -> Any:
        real, count = SharedStep.finish, iter(range(100))

        def finish(step: SharedStep, *arguments: Any, **named: Any) -> None:
            if rank == victim and next(count) == layer:
                os.kill(os.getpid(), signal.SIGKILL)
            real(step, *arguments, **named)

        SharedStep.finish = finish  # in this process alone
        quad_modifiers.oneshot(model, text, output_dir=tmp_path / "out", resume=resume, **MORE)

    found = in_ranks(2, lambda rank: cut_off(rank, 1, 1, False))
    assert found[1] == signal.SIGKILL
    assert found[0].startswith("RankLost"), found
    found = in_ranks(3, lambda rank: cut_off(rank, 2, 1, True))
    assert found[2] == signal.SIGKILL
    assert found[0].startswith("RankLost"), found
    with pytest.MonkeyPatch.context() as patched:
        kept = []
        real = Step.finish
        patched.setattr(Step, "finish", lambda step, *args, **named: (kept.append(1), real(step, *args, **named))[1])
        quad_modifiers.oneshot(model, text, output_dir=tmp_path / "out", resume=True, **MORE)
    assert len(kept) == 2, "two of four layers were kept"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_first_rank_looks_at_the_output(toy_checkpoint, tmp_path: Path, in_ranks) -> None:
    (tmp_path / "file").touch()

    def work(rank: int) -> Any:
        quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("rounded"), output_dir=tmp_path, **SETTINGS)

    found = in_ranks(2, work)
    assert found[0].startswith("FileExistsError")
    assert "is not empty" in found[0]
    # And the reason, unless the first rank, which holds the store here, has gone before it is read.
    assert found[1].startswith("RankLost: another rank of this run has ended (")


def test_recipes_that_cannot_be_shared_are_refused(toy_checkpoint, tmp_path: Path, in_ranks) -> None:
    stock = "quad_stage:\n  quad_modifiers:\n    QuantizationModifier: {scheme: W8A16, targets: Linear}\n"

    refused = {recipe_text("tuned"): "OutlierLoRA works in one process; leave it out", stock: "no modifier of this"}

    def work(rank: int) -> Any:
        for text, message in refused.items():
            with pytest.raises(ValueError, match=message):
                quad_modifiers.oneshot(toy_checkpoint("llama"), text, output_dir=tmp_path / "out", **SETTINGS)

    assert in_ranks(2, work) == [None, None]


def test_torch_distributed_must_not_be_set_up(toy_checkpoint, tmp_path: Path, in_ranks) -> None:
    def work(rank: int) -> Any:
        torch.distributed.init_process_group("gloo")
        return quad_modifiers.oneshot(toy_checkpoint("llama"), recipe_text("rounded"), **SETTINGS)

    for found in in_ranks(2, work):
        assert found.startswith("RuntimeError: torch.distributed is set up in this process already; leave")
