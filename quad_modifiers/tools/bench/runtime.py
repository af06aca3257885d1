"""Speed of a checkpoint beside its original in transformers, on this machine."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.tools.publishing.markdown import markdown_table

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 16, 5


def compare_runtime(original: str, compressed: str) -> str:
    """Times prefill and decode of two checkpoints in turn, and returns a Markdown table of medians.

    Prefill is one forward pass over 512 tokens, decode the time of each of 16 tokens generated greedily for one
    sequence. Both models, the bf16 original and its QUAD checkpoint, stay in memory.
    """
    models = {"bf16": _load(original), "QUAD": _load(compressed)}
    ids = torch.randint(100, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    tasks: dict[str, Callable[[PreTrainedModel], object]] = {
        f"prefill, {PROMPT_TOKENS} tokens": lambda model: model(ids, logits_to_keep=1),
        "decode, each token": lambda model: model.generate(
            ids[:, :NEW_TOKENS], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        ),
    }
    rows = []
    with torch.no_grad():
        for task, run in tasks.items():
            times: dict[str, list[float]] = {name: [] for name in models}
            for round_ in range(ROUNDS + 1):
                for name, model in models.items():
                    start = time.perf_counter()
                    run(model)
                    if round_:  # the first one warms up
                        times[name].append(time.perf_counter() - start)
            divisor = NEW_TOKENS if task.startswith("decode") else 1
            bf16, quad = (statistics.median(times[name]) / divisor for name in models)
            rows.append((task, f"{bf16 * 1e3:.1f}", f"{quad * 1e3:.1f}", f"{bf16 / quad:.2f}"))
    return markdown_table(("", "bf16 ms", "QUAD ms", "bf16 / QUAD"), rows)


def _load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
