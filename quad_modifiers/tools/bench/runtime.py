"""Speed of a checkpoint beside its original in transformers, on this machine."""

import torch
from transformers import PreTrainedModel

from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.records.machine import machine_name
from quad_modifiers.tools.demo.token_speed import SpeedTask, kernels_in_use, measure_speed
from quad_modifiers.tools.publishing.markdown import markdown_table

TASK = SpeedTask(runs=5)


def compare_runtime(original: str, compressed: str) -> str:
    """Times prefill and decode of a checkpoint and its original in turn, and returns a Markdown table of medians.

    The original runs in bf16 and in float32: which is the faster depends on the processor. All models stay in memory.
    What is timed: `quad_modifiers.tools.demo.token_speed.measure_speed`, five runs.
    """
    models = [_load(original, torch.bfloat16), _load(original, torch.float32), _load(compressed, torch.bfloat16)]
    bf16, wide, quad = measure_speed(models, TASK)
    tasks = {
        f"prefill of {TASK.prompt} tokens": [speed.prefill for speed in (bf16, wide, quad)],
        f"decode, {TASK.new} tokens after {TASK.context}": [speed.decode for speed in (bf16, wide, quad)],
    }
    rows = [
        (task, f"{a:.1f}", f"{b:.1f}", f"{c:.1f}", f"{c / a:.2f}", f"{c / max(a, b):.2f}")
        for task, (a, b, c) in tasks.items()
    ]
    head = ("tokens per second", "bf16", "float32", "QUAD", "QUAD / bf16", "QUAD / the faster")
    machine = f"{machine_name()}; {torch.get_num_threads()} threads; torch {torch.__version__}"
    return f"{markdown_table(head, rows)}\n\n{machine}; kernels: {kernels_in_use(models[2].device)}"


def _load(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = load_whole_model(folder, dtype=dtype)
    return model
