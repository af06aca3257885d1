"""`finetune` and `merge` on a toy checkpoint: what is written, what is refused, what survives a kill."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

pytest.importorskip("llmcompressor")
pytest.importorskip("peft")

from quad_modifiers import oneshot
from quad_modifiers.records.tuning_record import read_tuning
from quad_peft.training import TuningSettings, finetune, merge
from quad_peft.training import tuning_loop as loop_module
from quad_peft.training.curve import CURVE_NUMBERS, CURVE_PICTURE
from quad_peft.training.measure import Quality
from quad_peft.training.trainer import NonFiniteError, QuadTrainer

RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 2}
"""
SETTINGS = TuningSettings(max_steps=6, batch_size=2, learning_rate=1e-3, evaluations=3)


def token_ids(samples: int = 24, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 320, (samples, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def original(make_toy, toy_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "toy-original"
    make_toy().save_pretrained(folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "toy-quad"
    oneshot(original, RECIPE, dataset=token_ids(8, 48), num_calibration_samples=8, max_seq_length=48, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    finetune(checkpoint, folder, data=token_ids(), original=original, settings=SETTINGS, validation=0.2)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 16)).logits


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_distillation_brings_the_model_closer(adapter) -> None:
    record = read_tuning(adapter)
    assert record is not None
    print(record)
    assert record.loss == "distillation"
    assert record.original == "toy-original"
    assert record.after.divergence < record.before.divergence
    assert record.original_perplexity is not None
    assert (record.steps, record.samples, record.validation_samples, record.batch_size) == (6, 19, 5, 2)
    assert record.tokens == 19 * 24
    assert record.packages["torch"] == torch.__version__.partition("+")[0] or record.packages["torch"]


def test_the_folder_is_a_peft_adapter_with_record_and_curve(adapter) -> None:
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tuning.json", CURVE_NUMBERS, CURVE_PICTURE} <= names
    curve = json.loads((adapter / CURVE_NUMBERS).read_text())
    assert [step for step, _ in curve["validation"]] == [2, 4, 6]
    assert [step for step, _ in curve["training"]] == [1, 2, 3, 4, 5, 6]
    assert (adapter / CURVE_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_next_token_loss_falls(checkpoint, tmp_path) -> None:
    settings = TuningSettings(max_steps=12, batch_size=2, learning_rate=1e-2, evaluations=2)
    text = ["Seven wizards mixed a jug of black liquid and measured it twice. " * 20] * 2
    record = finetune(checkpoint, tmp_path / "a", data=text, settings=settings, length=32).record
    print(record)
    assert record.loss == "next_token"
    assert record.after.divergence is None
    assert record.after.perplexity < 0.9 * record.before.perplexity


def test_merging_writes_a_checkpoint_that_says_so(adapter, checkpoint, tmp_path) -> None:
    from peft import PeftModel

    merge(checkpoint, adapter, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(tuned))
    assert not torch.equal(logits(merged), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))
    assert read_tuning(tmp_path / "merged") == read_tuning(adapter)
    base, after = ({p.name for p in folder.iterdir()} for folder in (checkpoint, tmp_path / "merged"))
    assert after == base | {"tuning.json"}
    config, merged_config = (
        json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "merged")
    )
    assert merged_config["quantization_config"] == config["quantization_config"]
    before = load_file(checkpoint / "model.safetensors")
    changed = {
        name
        for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(name.endswith("outlier.weight") for name in changed)


def test_a_cached_teacher_trains_the_same(adapter, checkpoint, original, tmp_path) -> None:
    cache = tmp_path / "cache"
    finetune(
        checkpoint,
        tmp_path / "a",
        data=token_ids(),
        original=original,
        settings=SETTINGS,
        validation=0.2,
        teacher_cache=cache,
    )
    assert list(cache.rglob("*.safetensors"))
    live, cached = weights(adapter), weights(tmp_path / "a")
    for name, tensor in live.items():
        torch.testing.assert_close(cached[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_original_is_widened_where_its_dtype_is_emulated(checkpoint, original, tmp_path, monkeypatch) -> None:
    """An original given by its path, that is: one that somebody else loaded stays as it is."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    loaded = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "original")
    given = {tmp_path / "original": torch.float32, loaded: torch.bfloat16}
    for number, (each, dtype) in enumerate(given.items()):
        cache = tmp_path / f"cache-{number}"
        arguments = {"original": each, "teacher_cache": cache, "settings": replace(SETTINGS, max_steps=1)}
        finetune(checkpoint, tmp_path / f"adapter-{number}", data=token_ids(), **arguments)
        (shard,) = cache.rglob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(shard).values()} == {dtype}
    assert loaded.dtype == torch.bfloat16


def test_scales_are_trained_when_asked(checkpoint, original, tmp_path) -> None:
    # One text over and over: the sample held back is learnt too, so the state at the end is the best.
    settings = replace(SETTINGS, max_steps=24, learning_rate=3e-4)
    arguments = {"data": token_ids(1).expand(24, -1), "original": original, "settings": settings}
    record = finetune(checkpoint, tmp_path / "a", train_weight_scales=True, **arguments).record
    assert record.weight_scales
    merge(checkpoint, tmp_path / "a", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path / "merged"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight", "weight_scale"}


def test_tensorboard_files_come_with_the_adapter(checkpoint, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    settings = TuningSettings(max_steps=2, batch_size=2, evaluations=2, report_to=("tensorboard",))
    finetune(checkpoint, tmp_path / "a", data=token_ids(), settings=settings)
    assert list((tmp_path / "a" / "runs").rglob("events.out.tfevents.*"))


class KilledAt(TrainerCallback):
    """Ends the process's work in the middle of a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **context) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def add_callback(monkeypatch, callback: TrainerCallback) -> None:
    class Trainer(QuadTrainer):
        def __init__(self, *args, **arguments) -> None:
            super().__init__(*args, **arguments)
            self.add_callback(callback)

    monkeypatch.setattr(loop_module, "QuadTrainer", Trainer)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_killed_run_resumes_to_the_same_result(step, adapter, checkpoint, original, tmp_path, monkeypatch) -> None:
    arguments = {"data": token_ids(), "original": original, "settings": SETTINGS, "validation": 0.2}
    with monkeypatch.context() as patched:
        add_callback(patched, KilledAt(step))
        with pytest.raises(KeyboardInterrupt):
            finetune(checkpoint, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()
    saved = sorted((tmp_path / "a.training").glob("checkpoint-*"))
    cut_off = tmp_path / "a.training" / "checkpoint-99"  # killed while it was written
    cut_off.mkdir()
    (cut_off / "adapter_config.json").write_text("{")
    with pytest.raises(FileExistsError, match="holds an unfinished run; go on with --resume"):
        finetune(checkpoint, tmp_path / "a", **arguments)
    finetune(checkpoint, tmp_path / "a", resume=True, **arguments)
    assert bool(saved) == (step > 2)
    wanted, got = weights(adapter), weights(tmp_path / "a")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    curves = [json.loads((folder / CURVE_NUMBERS).read_text()) for folder in (adapter, tmp_path / "a")]
    assert curves[0] == curves[1]
    one, two = (read_tuning(folder).model_dump(exclude={"seconds"}) for folder in (adapter, tmp_path / "a"))
    assert one == two


def test_another_run_is_not_resumed(checkpoint, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        add_callback(patched, KilledAt(3))
        with pytest.raises(KeyboardInterrupt):
            finetune(checkpoint, tmp_path / "a", data=token_ids(), settings=SETTINGS)
    of_the_run = {"checkpoint", "original", "data", "validation", "train_weight_scales"}
    assert set(json.loads((tmp_path / "a.training" / "run.json").read_text())) == of_the_run | set(asdict(SETTINGS))
    other = TuningSettings(max_steps=6, batch_size=2, learning_rate=2e-2, evaluations=3)
    with pytest.raises(ValueError, match=r"had another learning_rate \(learning_rate 0.001, now 0.02\)"):
        finetune(checkpoint, tmp_path / "a", data=token_ids(), settings=other, resume=True)
    with pytest.raises(ValueError, match="had another data"):
        finetune(checkpoint, tmp_path / "a", data=token_ids(20), settings=SETTINGS, resume=True)


class Poison(TrainerCallback):
    """Makes the loss NaN from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **context) -> None:
        if state.global_step == self.step:
            self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            model.get_input_embeddings().weight.data[:] = torch.nan


def test_nan_stops_the_run_and_keeps_the_weights_before_it(checkpoint, tmp_path, monkeypatch) -> None:
    poison = Poison(3)
    add_callback(monkeypatch, poison)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step 4 of 6.*last_good"):
        finetune(checkpoint, tmp_path / "a", data=token_ids(), settings=SETTINGS)
    assert not (tmp_path / "a").exists()
    kept = weights(tmp_path / "a.training" / "last_good")
    for name, parameter in poison.weights.items():
        assert torch.equal(kept[name.replace(".default", "")], parameter)
    assert loop_module.last_complete_state(tmp_path / "a.training").name == "checkpoint-2"


def test_best_state_is_kept(checkpoint, original, tmp_path) -> None:
    """The learning rate rises until it ruins the model."""
    settings = TuningSettings(max_steps=8, batch_size=2, learning_rate=0.006, evaluations=8, warmup=0.9)
    record = finetune(
        checkpoint, tmp_path / "a", data=token_ids(), original=original, settings=settings, validation=0.2
    ).record
    curve = dict(json.loads((tmp_path / "a" / CURVE_NUMBERS).read_text())["validation"])
    print(curve)
    assert 1 < record.best_step < 8
    assert curve[record.best_step] == min(curve.values()) < curve[8]
    assert record.after.divergence == pytest.approx(curve[record.best_step], rel=1e-3)


def test_a_run_that_only_ruins_leaves_the_model_as_it_was(checkpoint, original, tmp_path, caplog) -> None:
    settings = TuningSettings(max_steps=4, batch_size=2, learning_rate=1.0, evaluations=2, warmup=0)
    record = finetune(
        checkpoint, tmp_path / "a", data=token_ids(), original=original, settings=settings, validation=0.2
    ).record
    curve = dict(json.loads((tmp_path / "a" / CURVE_NUMBERS).read_text())["validation"])
    assert min(curve.values()) > record.before.divergence
    assert (record.best_step, record.after) == (0, record.before)
    assert "no state is better on the validation samples than the start" in caplog.text
    assert not any(tensor.any() for name, tensor in weights(tmp_path / "a").items() if ".lora_B." in name)


def test_a_model_that_got_worse_is_reported(caplog) -> None:
    loop_module._warn_if_worse(Quality(10.0, 0.1, 9.0), Quality(9.5, 0.2, 9.0))
    assert [each.getMessage().partition(";")[0] for each in caplog.records] == [
        "the divergence on the validation samples rose from 0.1 to 0.2"
    ]


def test_bad_input_is_refused_before_anything_is_written(checkpoint, original, make_toy, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    other = make_toy(vocab_size=400)
    for arguments, error, message in [
        ({"checkpoint": original}, ValueError, "is no QUAD checkpoint"),
        ({"checkpoint": tmp_path / "nowhere"}, FileNotFoundError, "there is no model folder"),
        ({"output": tmp_path / "full"}, FileExistsError, "exists and is not empty"),
        ({"data": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
    ]:
        with pytest.raises(error, match=message):
            finetune(**{"checkpoint": checkpoint, "output": tmp_path / "a", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(ValueError, match="the original model has vocab_size 400, the checkpoint 320"):
        finetune(checkpoint, tmp_path / "a", data=token_ids(), original=other)
    for itself in (checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint)):
        with pytest.raises(ValueError, match="the original model is a QUAD checkpoint itself"):
            finetune(checkpoint, tmp_path / "a", data=token_ids(), original=itself)


def test_processes_that_do_not_know_each_other_are_refused(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the launcher started 2 processes, but transformers sees 1"):
        finetune(checkpoint, tmp_path / "a", data=token_ids())


def test_rank_zero_has_nothing_to_train(make_toy, tmp_path) -> None:
    recipe = RECIPE.replace("rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4", "rank: 0")
    oneshot(
        make_toy(),
        recipe,
        dataset=token_ids(8, 48),
        num_calibration_samples=8,
        max_seq_length=48,
        output_dir=tmp_path / "quarot",
    )
    with pytest.raises(ValueError, match="no outlier weights"):
        finetune(tmp_path / "quarot", tmp_path / "a", data=token_ids())


def test_an_adapter_of_another_base_is_not_merged(adapter, checkpoint, make_toy, tmp_path) -> None:
    oneshot(
        make_toy(seed=3),
        RECIPE,
        dataset=token_ids(8, 48),
        num_calibration_samples=8,
        max_seq_length=48,
        output_dir=tmp_path / "other",
    )
    with pytest.raises(ValueError, match="another checkpoint"):
        merge(tmp_path / "other", adapter, tmp_path / "merged")
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "tuning.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tuning\.json"):
        merge(checkpoint, tmp_path / "broken", tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="it is no adapter"):
        merge(checkpoint, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("evaluations", 1), ("max_steps", 0), ("warmup", 1.0), ("learning_rate", -1.0)],
)
def test_settings_name_what_is_wrong(field, value) -> None:
    with pytest.raises(ValueError, match=rf"{field} \({value}\)"):
        TuningSettings(**{field: value})


def test_a_corrected_original_needs_no_cleaning_up(checkpoint, original, make_toy, tmp_path, monkeypatch) -> None:
    arguments = {"data": token_ids(), "settings": SETTINGS, "validation": 0.2}
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        finetune(checkpoint, tmp_path / "a", original=tmp_path / "typo", **arguments)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:  # as when the original does not fit into memory
        patch.setattr("quad_peft.training.finetuning.tune", None)
        with pytest.raises(TypeError):
            finetune(checkpoint, tmp_path / "a", **arguments)
    finetune(checkpoint, tmp_path / "a", original=original, **arguments)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_teacher_without_its_head_is_refused(quad_checkpoint: Path, make_toy, text: Path, tmp_path: Path) -> None:
    make_toy().model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        finetune(quad_checkpoint, tmp_path / "out", data=text, original=tmp_path / "base", length=16)
    assert not list(tmp_path.glob("out*"))


def test_a_quantized_original_is_refused(checkpoint, original, make_toy, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="the original model is quantized"):
        finetune(checkpoint, tmp_path / "adapter", original=tmp_path / "other", data=token_ids(), settings=SETTINGS)


def test_training_data_with_ids_that_are_not_embedded(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training data has the token id 3"):
        finetune(checkpoint, tmp_path / "adapter", data=token_ids() + 10, settings=SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_original_in_memory_and_the_process_are_left_as_they_were(checkpoint, make_toy, tmp_path: Path) -> None:
    teacher = make_toy().train()
    before = torch.get_rng_state()
    finetune(
        checkpoint, tmp_path / "adapter", data=token_ids(), original=teacher, settings=replace(SETTINGS, max_steps=1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in teacher.modules())
