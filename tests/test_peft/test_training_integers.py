"""Runs that train outliers, scales and integers: the checkpoint is what was trained; two phases; what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from quad_modifiers.records.tuning_record import read_tuning
from quad_modifiers.tools.cli.main import app
from quad_peft.integer_change import integer_changes
from quad_peft.modifier import OutlierLoRA
from quad_peft.training import TuningSettings, finetune, merge
from quad_peft.training.phases import first_fixed_step, integers_schedule
from quad_peft.training.trained_parts import adapter_fields, trained_parts

from .test_training_run import KilledAt, adapter, add_callback, checkpoint, logits, original, token_ids, weights

ALL = ("outliers", "scales", "weights")
SETTINGS = TuningSettings(
    max_steps=20, batch_size=2, learning_rate=3e-4, evaluations=5, train=ALL, weight_learning_rate=0.01, fixed_share=0.4
)
TEXT = token_ids(1).expand(24, -1)  # over and over: the samples held back are learnt too
FIXED = 12
__all__ = ["adapter", "checkpoint", "original"]


class Watch(TrainerCallback):
    """Keeps the integers after each step, and what is still trained."""

    def __init__(self) -> None:
        self.after: list[list[torch.Tensor]] = []
        self.trained: list[int] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **context) -> None:
        self.trained.append(sum(p.grad is not None for p in model.parameters()))

    def on_step_end(self, args, state, control, model=None, **context) -> None:
        self.after.append([change.detach().round() for change in integer_changes(model)])


@pytest.fixture(scope="module")
def run(checkpoint, original, tmp_path_factory) -> tuple[Path, Watch]:
    watch, folder = Watch(), tmp_path_factory.mktemp("integers") / "adapter"
    with pytest.MonkeyPatch.context() as patched:
        add_callback(patched, watch)
        finetune(checkpoint, folder, data=TEXT, original=original, settings=SETTINGS, validation=0.2)
    return folder, watch


def test_the_merged_checkpoint_is_what_was_trained(run, checkpoint, tmp_path) -> None:
    folder, _ = run
    merge(checkpoint, folder, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(tuned))
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "merged"))
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight", "weight_scale", "weight_packed"}
    configs = [json.loads((f / "config.json").read_text()) for f in (checkpoint, tmp_path / "merged")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_record_says_what_was_trained(run) -> None:
    folder, _ = run
    record = read_tuning(folder)
    assert record is not None
    print(record)
    assert record.weight_scales
    assert record.weights
    assert record.moved_integers > 100
    assert record.after.divergence < record.before.divergence
    saved = [t for n, t in weights(folder).items() if "integer_change" in n]
    assert record.moved_integers == sum(int(tensor.count_nonzero()) for tensor in saved)


def test_integers_stay_in_the_last_phase_while_the_rest_is_trained(run) -> None:
    _, watch = run
    assert first_fixed_step(20, 0.4) == FIXED
    assert any(not torch.equal(*pair) for pair in zip(watch.after[0], watch.after[FIXED - 1], strict=True))
    for later in watch.after[FIXED:]:
        assert all(torch.equal(*pair) for pair in zip(watch.after[FIXED - 1], later, strict=True))
    layers = len(watch.after[0])
    assert watch.trained[0] - watch.trained[-1] == layers
    assert watch.trained[-1] == 2 * layers


@pytest.mark.parametrize("step", [5, 15])
def test_a_killed_run_resumes_to_the_same_result(step, run, checkpoint, original, tmp_path, monkeypatch) -> None:
    arguments = {"data": TEXT, "original": original, "settings": SETTINGS, "validation": 0.2}
    with monkeypatch.context() as patched:
        add_callback(patched, KilledAt(step))
        with pytest.raises(KeyboardInterrupt):
            finetune(checkpoint, tmp_path / "a", **arguments)
    finetune(checkpoint, tmp_path / "a", resume=True, **arguments)
    wanted, got = weights(run[0]), weights(tmp_path / "a")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_integers_beside_the_rest_end_closer_to_the_original(run, checkpoint, original, tmp_path) -> None:
    settings = replace(SETTINGS, train=("outliers", "scales"))
    arguments = {"data": TEXT, "original": original, "settings": settings, "validation": 0.2}
    without = finetune(checkpoint, tmp_path / "a", **arguments).record
    record = read_tuning(run[0])
    assert record is not None
    assert without.after.divergence is not None
    print(record.after, without.after)
    assert record.after.divergence < 0.95 * without.after.divergence


def test_a_run_that_makes_it_worse_leaves_the_integers(checkpoint, original, tmp_path) -> None:
    settings = replace(SETTINGS, max_steps=4, evaluations=2, learning_rate=0.5, weight_learning_rate=3.0)
    record = finetune(
        checkpoint, tmp_path / "a", data=TEXT, original=original, settings=settings, validation=0.2
    ).record
    assert (record.best_step, record.moved_integers) == (0, 0)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "a"))
    assert torch.equal(logits(tuned), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))


def test_the_best_state_is_kept_even_from_before_the_last_phase(checkpoint, original, tmp_path, monkeypatch) -> None:
    """The outlier weights are ruined in the last phase; the state before it is what comes out."""

    class Ruin(TrainerCallback):
        def on_step_begin(self, args, state, control, model: nn.Module | None = None, **context) -> None:
            if state.global_step == FIXED:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora_B" in name:
                            parameter.add_(1.0)

    add_callback(monkeypatch, Ruin())
    record = finetune(
        checkpoint, tmp_path / "a", data=TEXT, original=original, settings=SETTINGS, validation=0.2
    ).record
    assert 0 < record.best_step <= FIXED
    assert record.after.divergence < record.before.divergence
    assert record.moved_integers > 0


def test_a_wider_dtype_in_training_leaves_the_checkpoint_its_own(original, tmp_path) -> None:
    """`--dtype float32` trains in float32; what is merged has the checkpoint's bfloat16."""
    from quad_modifiers import oneshot

    from .test_training_run import RECIPE

    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    oneshot(model, RECIPE, dataset=token_ids(8, 48), num_calibration_samples=8, output_dir=tmp_path / "half")
    text = tmp_path / "text.txt"
    text.write_text("Seven wizards mixed a jug of black liquid and measured it twice. " * 40)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "half")
    arguments = ["finetune", str(tmp_path / "half"), "-o", str(tmp_path / "a"), "--merge", str(tmp_path / "merged")]
    arguments += ["--data", str(text), "--dtype", "float32", "--train", "outliers,scales,weights", "--seq-length", "32"]
    arguments += ["--max-steps", "4", "--batch-size", "2", "--weight-learning-rate", "0.3", "--evaluations", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("half", "merged"))
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}


class TestSchedule:
    def test_integers_come_to_rest_by_the_last_phase(self) -> None:
        factor = integers_schedule(2, 8)
        values = [factor(step) for step in range(12)]
        assert values[:3] == [0.0, 0.5, 1.0]
        assert all(one > two for one, two in itertools.pairwise(values[2:9]))
        assert values[8:] == [0.0] * 4

    @pytest.mark.parametrize(("steps", "share", "first"), [(10, 0.2, 8), (10, 0.0, 10), (3, 0.5, 2), (1, 0.9, 1)])
    def test_first_fixed_step(self, steps: int, share: float, first: int) -> None:
        assert first_fixed_step(steps, share) == first


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("outliers,biases", "there is no part 'biases' to train; choose from outliers, scales, weights"),
            ("outliers,clips", "clips are not trained: the format has one clip ratio for a role in all layers"),
            ("scales,weights", r"train \(scales, weights\) must name outliers"),
            ((), r"train \(nothing\) must name outliers"),
            ("", "there is no part ''"),
        ],
    )
    def test_names(self, names: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trained_parts(names)
        with pytest.raises(ValueError, match=message):
            TuningSettings(train=names)
        with pytest.raises(ValueError, match=message):
            OutlierLoRA(train=names.split(",") if isinstance(names, str) else [])

    def test_order_and_repetition_do_not_matter(self) -> None:
        assert trained_parts(" weights, outliers,weights") == ("outliers", "weights")
        assert adapter_fields(("outliers", "weights")) == {"train_weight_scales": False, "train_weights": True}

    @pytest.mark.parametrize("fields", [{"fixed_share": 1.0}, {"fixed_share": -0.1}, {"weight_learning_rate": 0.0}])
    def test_ranges(self, fields: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=next(iter(fields))):
            TuningSettings(**fields)

    def test_no_quad_checkpoint(self, original, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"no QUAD checkpoint|not a QUAD checkpoint"):
            finetune(original, tmp_path / "a", data=TEXT, settings=SETTINGS)

    def test_a_disk_that_is_too_small(self, checkpoint, tmp_path, monkeypatch) -> None:
        from quad_peft.training import finetuning

        def full(folder: Path, size: int) -> None:
            raise OSError(f"{size} bytes")

        monkeypatch.setattr(finetuning, "check_space", full)
        with pytest.raises(OSError, match="bytes"):
            finetune(checkpoint, tmp_path / "a", data=TEXT, settings=SETTINGS)
        assert not list(tmp_path.iterdir())


def test_the_modifier_trains_them_too(make_toy, compress, tmp_path) -> None:
    from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
    from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
    from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

    before = [
        SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4),
        DynamicActQuant(u_type_bits=4, d_type_bits=8),
        OutlierSplitGPTQ(bits=2),
    ]
    tuning = OutlierLoRA(
        train=list(ALL), epochs=16, learning_rate=2e-4, weight_learning_rate=0.01, batch_size=2, validation=0.3
    )
    model = compress(make_toy(), *before, tuning, dataset=token_ids(1, 48).expand(8, -1), output_dir=tmp_path / "out")
    record = read_tuning(tmp_path / "out")
    assert record is not None
    print(record)
    assert record.moved_integers > 0
    assert record.after.divergence < record.before.divergence
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert "weights" in (tmp_path / "out" / "recipe.yaml").read_text()
