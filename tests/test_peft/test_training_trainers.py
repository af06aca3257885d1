"""Stock trainers on an outlier adapter: transformers' Trainer, ours, TRL's, and two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytest.importorskip("llmcompressor")
pytest.importorskip("peft")

import quad_modifiers
from quad_modifiers import oneshot
from quad_modifiers.records.tuning_record import read_tuning
from quad_peft import get_outlier_model
from quad_peft.training.data import Collator, Samples
from quad_peft.training.losses import IGNORED
from quad_peft.training.measure import measure
from quad_peft.training.teacher import LiveTeacher
from quad_peft.training.trainer import QuadTrainer

ROOT = Path(quad_modifiers.__file__).parents[1]
RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""


def rows(lengths: list[int]) -> Samples:
    generator = torch.Generator().manual_seed(7)
    return Samples([torch.randint(3, 320, (n,), generator=generator) for n in lengths], range(len(lengths)))


PACKED, PADDED = rows([24] * 8), rows([24, 9, 17, 5, 24, 12, 20, 7])


@pytest.fixture(scope="module")
def checkpoint(make_toy, toy_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "toy-quad"
    ids = torch.randint(3, 320, (8, 48), generator=torch.Generator().manual_seed(5))
    oneshot(make_toy(), RECIPE, dataset=ids, num_calibration_samples=8, max_seq_length=48, output_dir=folder)
    toy_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    return get_outlier_model(AutoModelForCausalLM.from_pretrained(checkpoint))


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "max_grad_norm": 0.0,
            **options,
        },
    )


class StockCollator(Collator):
    """Without what only our trainer reads."""

    def __call__(self, samples):
        return {name: tensor for name, tensor in super().__call__(samples).items() if name != "place"}


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, samples: Samples, places: list[int], teacher=None) -> torch.Tensor:
    """The mean over all positions, from whole logits."""
    batch = Collator(2)([samples[place] for place in places])
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.float()
    labels = batch["labels"]
    if teacher is None:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    with torch.no_grad():
        theirs = teacher(input_ids=batch["input_ids"], attention_mask=mask).logits.float()
    kept = labels != IGNORED
    divergence = F.kl_div(logits[kept].log_softmax(-1), theirs[kept].log_softmax(-1), reduction="sum", log_target=True)
    return divergence / kept.sum()


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (PACKED, {}),
        (PADDED, {"gradient_accumulation_steps": 2}),
        (PADDED, {"gradient_checkpointing": True}),
        (PACKED, {"bf16": True, "use_cpu": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ],
    ids=["packed", "padded-accumulated", "padded-checkpointed", "bf16-checkpointed-accumulated"],
)
@pytest.mark.parametrize("trainer_class", [Trainer, QuadTrainer])
def test_trainers_train_the_outlier_weights(trainer_class, samples, options, model, tmp_path) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    collator = (StockCollator if trainer_class is Trainer else Collator)(2)
    trainer = trainer_class(
        model=model, args=arguments(tmp_path, **options), train_dataset=samples, data_collator=collator
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.dtype == torch.float32 or not parameter.requires_grad


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_our_trainer_agrees_with_the_stock_one(options, checkpoint, tmp_path) -> None:
    results = []
    for trainer_class, collator in ((Trainer, StockCollator(2)), (QuadTrainer, Collator(2))):
        model = get_outlier_model(AutoModelForCausalLM.from_pretrained(checkpoint))
        chosen = arguments(tmp_path, learning_rate=1e-3, gradient_accumulation_steps=2, **options)
        trainer = trainer_class(model=model, args=chosen, train_dataset=PADDED, data_collator=collator)
        trainer.train()
        results.append((trained(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (stock, stock_losses), (ours, our_losses) = results
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(stock_losses), rtol=1e-4, atol=1e-5)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("distil", [False, True], ids=["next-token", "distillation"])
def test_accumulated_padded_batches_give_the_mean_over_all_positions(distil, model, make_toy, tmp_path) -> None:
    original = make_toy()
    seen: dict[str, torch.Tensor] = {}

    class Watching(QuadTrainer):
        def create_optimizer(self, *given):
            optimizer = super().create_optimizer(*given)
            optimizer.register_step_pre_hook(
                lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
            )
            return optimizer

    trainer = Watching(
        model=model,
        args=arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, train_sampling_strategy="sequential"),
        train_dataset=PADDED,
        data_collator=Collator(2),
        teacher=LiveTeacher(original) if distil else None,
    )
    trainer.train()
    model.zero_grad()
    model.train()
    wanted = plain_loss(model_before(model, trainer), PADDED, list(range(8)), original if distil else None)
    wanted.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-3)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient, rtol=2e-2, atol=2e-5)


def model_before(model, trainer):
    """The model at the weights of the only step: those of a new adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_B" in name
            parameter.data.zero_()
    return model


def test_measured_quality_is_that_of_whole_logits(model, make_toy) -> None:
    original = make_toy()
    quality = measure(model, PADDED, Collator(2), batch_size=3, teacher=LiveTeacher(original))
    places = list(range(8))
    with torch.no_grad():
        assert quality.perplexity == pytest.approx(plain_loss(model, PADDED, places).exp().item(), rel=1e-4)
        assert quality.original_perplexity == pytest.approx(plain_loss(original, PADDED, places).exp().item(), rel=1e-4)
        assert quality.divergence == pytest.approx(plain_loss(model, PADDED, places, original).item(), rel=1e-3)


def test_a_trainable_head_is_refused(model, tmp_path) -> None:
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="the head is trainable"):
        QuadTrainer(model=model, args=arguments(tmp_path), train_dataset=PACKED, data_collator=Collator())


def test_sft_trainer(model, checkpoint, tmp_path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    before = trained(model)
    texts = [f"{i}. Seven wizards mixed a jug of black liquid." for i in range(8)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            bf16=False,
            max_length=32,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    after = trained(model)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.float32 and not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_two_processes_do_what_one_does(checkpoint, tmp_path) -> None:
    """Two processes of two samples are one of four."""
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"{i}. Seven wizards mixed a jug of black liquid and measured it twice.\n" for i in range(60))
    )
    common = ["finetune", str(checkpoint), "--data", str(text), "--seq-length", "32", "--samples", "20"]
    common += ["--max-steps", "3", "--evaluations", "2", "--learning-rate", "0.001"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    # With --cpu the launcher starts one process, whatever --num_processes says, unless MPI starts the others.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["-m", "quad_modifiers"]
    for launcher, size, name in (([*launch], "2", "two"), (["quad_modifiers"], "4", "one")):
        command = [sys.executable, "-m", *launcher, *common, "--batch-size", size, "-o", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
    from safetensors.torch import load_file

    records = [read_tuning(tmp_path / name) for name in ("one", "two")]
    assert [record.batch_size for record in records] == [4, 4]
    assert records[1].after.perplexity == pytest.approx(records[0].after.perplexity, rel=1e-3)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "one", "two"}
