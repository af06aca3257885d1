"""What tuning the outlier weights gives, and what a training step costs beside stock LoRA."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.data import token_windows
from quad_modifiers.records.machine import peak_memory
from quad_modifiers.tools.bench.rows import TEXTS
from quad_modifiers.tools.publishing.markdown import markdown_table

LENGTH = 512
LORA_RANK, BATCH, STEPS, ROUNDS = 64, 4, 4, 3


def measure_tuning(
    original: str, checkpoint: str, windows: dict[str, int], adapter: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yields perplexity and divergence from the original model on each text, with an adapter if one is given.

    `windows` is the number of windows of 512 tokens of each of `TEXTS`, drawn with seed 0.
    """
    from quad_peft.training.data import Collator, Samples
    from quad_peft.training.measure import measure
    from quad_peft.training.teacher import LiveTeacher

    tokenizer = AutoTokenizer.from_pretrained(original)
    teacher = LiveTeacher(load_whole_model(original))
    model: Any = load_whole_model(checkpoint)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    for text, count in windows.items():
        samples = list(token_windows(tokenizer, TEXTS[text](), LENGTH, count, seed=0))
        found = measure(model, Samples(samples, range(count)), Collator(0), 1, teacher)
        assert found.original_perplexity is not None
        yield {
            "original": Path(original).name,
            "checkpoint": Path(checkpoint).name,
            "adapter": None if adapter is None else Path(adapter).name,
            "text": text,
            "windows": count,
            "perplexity": found.perplexity,
            "original_perplexity": found.original_perplexity,
            "ratio": found.perplexity / found.original_perplexity,
            "divergence": found.divergence,
        }


def compare_training_cost(original: str, checkpoint: str) -> str:
    """Returns a Markdown table: a training step of an outlier adapter beside stock LoRA on the original model.

    Both train on 4 windows of 512 tokens with the loss of transformers, AdamW and no gradient checkpointing. Each
    runs in processes of its own, in turn, three times; step times are medians, memory is the peak resident size. The
    LoRA of rank 64 is put on the original in bf16.
    """
    runs: dict[str, list[dict[str, float]]] = {"LoRA rank 64, bf16": [], "outlier adapter": []}
    for _ in range(ROUNDS):
        for name, folder in zip(runs, (original, checkpoint), strict=True):
            command = [sys.executable, "-m", "quad_modifiers.tools.bench.tuning_benchmark", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in ("parameters", "seconds", "peak")}
        for name, found in runs.items()
    }
    rows = [
        (name, f"{m['parameters'] / 1e6:.2f} M", f"{m['seconds']:.2f}", f"{m['peak'] / 1e9:.2f}")
        for name, m in medians.items()
    ]
    lora, outlier = medians.values()
    ratios = (f"{outlier[key] / lora[key]:.2f}" for key in ("seconds", "peak"))
    table = markdown_table(("", "trainable parameters", "step [s]", "peak memory [GB]"), rows)
    return f"{table}\n| outlier / LoRA | | {' | '.join(ratios)} |"


def _train_here(folder: str) -> dict[str, float]:
    """Trains a few steps; the kind of checkpoint decides what is trained."""
    from peft import LoraConfig, get_peft_model

    from quad_modifiers.nn.quad_linear import QuadLinear
    from quad_peft import get_outlier_model

    base: PreTrainedModel = load_whole_model(folder, dtype=torch.bfloat16)
    if any(isinstance(module, QuadLinear) for module in base.modules()):
        model = get_outlier_model(base)
    else:
        model = get_peft_model(base, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(base.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    times = []
    for step in range(STEPS + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first one warms up
            times.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in trained),
        "seconds": statistics.median(times),
        "peak": peak_memory(),
    }


if __name__ == "__main__":
    print(json.dumps(_train_here(sys.argv[1])))
