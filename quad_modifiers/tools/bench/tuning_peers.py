"""Outlier adapters beside stock LoRA: the same data, steps and batch; each LoRA at several learning rates."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.nn.quad_linear import QuadLinear

LENGTH, BATCH, VALIDATION = 256, 4, 12
OUTLIER_RATES, LORA_RATES = (1e-4,), (2e-4, 1e-3)


class Peer(NamedTuple):
    """One thing to train."""

    title: str  # title in the table
    quad: bool  # True to train on the QUAD checkpoint, False on the original model
    outlier: bool  # True for an outlier adapter, False for a stock LoRA
    distilled: bool  # True to distil from the original model, False to train on the next token
    rank: int | None = None  # rank of the LoRA; None for as many parameters as the outlier adapter has


PEERS = (
    Peer("next token, outlier adapter on QUAD", True, True, False),
    Peer("next token, LoRA rank 64 on bf16", False, False, False, 64),
    Peer("distillation, outlier adapter on QUAD", True, True, True),
    Peer("distillation, LoRA of equal size on QUAD", True, False, True),
)


def compare_tuning(original: str, checkpoint: str, steps: int) -> Iterator[dict[str, Any]]:
    """Trains each of `PEERS` on windows of 256 tokens of the default text and yields its validation results.

    Each of the `steps` takes 4 windows.
    """
    for peer in PEERS:
        for rate in OUTLIER_RATES if peer.outlier else LORA_RATES:
            yield _run(peer, rate, original, checkpoint, steps)


def _run(peer: Peer, rate: float, original: str, checkpoint: str, steps: int) -> dict[str, Any]:
    from quad_peft.training.data import training_data
    from quad_peft.training.teacher import LiveTeacher
    from quad_peft.training.tuning_loop import TuningSettings, tune

    samples = steps * BATCH + VALIDATION
    tokenizer = AutoTokenizer.from_pretrained(original)
    data = training_data(None, tokenizer, length=LENGTH, samples=samples, validation=VALIDATION / samples)
    settings = TuningSettings(batch_size=BATCH, max_steps=steps, learning_rate=rate, warmup=0.1, evaluations=2)
    model = _adapted(peer, load_whole_model(checkpoint if peer.quad else original))
    teacher = LiveTeacher(load_whole_model(original)) if peer.distilled else None
    with tempfile.TemporaryDirectory() as folder:
        outcome = tune(model, data, settings, settings.arguments(Path(folder)), teacher)
    return {
        "peer": peer.title,
        "original": Path(original).name,
        "checkpoint": Path(checkpoint).name,
        "learning_rate": rate,
        "steps": outcome.steps,
        "tokens": steps * BATCH * LENGTH,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_before": math.log(outcome.before.perplexity),
        "loss_after": math.log(outcome.after.perplexity),
        "divergence_before": outcome.before.divergence,
        "divergence_after": outcome.after.divergence,
    }


def _adapted(peer: Peer, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    from quad_peft import get_outlier_model

    if peer.outlier:
        return get_outlier_model(model)
    layers = [module for module in model.modules() if isinstance(module, QuadLinear)]
    rank = peer.rank or round(
        sum(m.out_features * m.split.rank for m in layers) / sum(m.in_features + m.out_features for m in layers)
    )
    roles: Any = sorted({module.role for module in layers}) if layers else "all-linear"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=roles, task_type="CAUSAL_LM"))
