"""Compresses a model of random weights and times it whole beside the original: a decode step and a prompt.

PYTHONPATH=.:kernels python -m benchmarks.whole_model --model llama-3-8b --layers 32 --output results.jsonl

Needs the project's own packages besides torch; no hub, no tokenizer. Random weights compress and run as fast as trained
ones. A prompt and a decode step are replays of CUDA graphs on a CUDA device, plain calls elsewhere; both models take
turns.
"""

import argparse
import gc
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from quad_kernels import block, choose_backend
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, StaticCache

from benchmarks.record import Row, add_row, environment
from benchmarks.shapes import MODELS

LAYERS = {"llama-3-8b": 32, "llama-3.2-1b": 16, "qwen2.5-7b": 28, "qwen2.5-0.5b": 24, "smollm2-135m": 30, "toy": 2}
VOCABULARY = {"llama-3-8b": 128256, "llama-3.2-1b": 128256, "qwen2.5-7b": 152064, "qwen2.5-0.5b": 151936}
_SMALL_VOCABULARY = 320
_AT_ONCE = 3  # replays per sample


def random_model(name: str, layers: int, device: torch.device) -> PreTrainedModel:
    """A model of these sizes in bfloat16; the same weights for the same arguments."""
    sizes = MODELS[name]
    config_class = Qwen2Config if sizes.qkv_bias else LlamaConfig
    config = config_class(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY.get(name, _SMALL_VOCABULARY),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    if not sizes.qkv_bias:
        config.head_dim = sizes.head_dim
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


class Step:
    """One forward pass whose shapes never change: a CUDA graph of it on a CUDA device.

    Args:
        model: what to run.
        tokens: tokens of the pass; 1 is a decode step behind `context` tokens in a static cache.
        context: tokens in the cache before a decode step.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, context: int = 0) -> None:
        device = model.device
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        ids = ids.to(device)
        positions = torch.arange(context, context + tokens, device=device)[None]
        if tokens > 1:
            self._run = lambda: model(ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        else:
            cache = StaticCache(config=model.config, max_cache_len=context + 64)
            prompt = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
            model(prompt.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)

            def decode() -> torch.Tensor:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(context)
                return model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits

            self._run = decode
        self.logits = self._run()
        self.graph = _graph(self._run) if device.type == "cuda" else None

    def __call__(self) -> None:
        """Runs it once more."""
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def eager(self) -> None:
        """Runs it once more, launch by launch."""
        self._run()


def _graph(run: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def seconds_in_turn(calls: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call; the calls take turns in random order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(_AT_ONCE):
                calls[name]()
            _synchronize(device)
            times[name].append((time.perf_counter() - start) / _AT_ONCE)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _measured(row: Row, name: str, device: torch.device) -> Iterator[None]:
    """Notes seconds and the peak of allocated memory, or why it failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        yield
        _synchronize(device)
        row[f"{name}_seconds"] = time.perf_counter() - start
        if device.type == "cuda":
            row[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:  # a visit is short: what comes after is measured all the same
        traceback.print_exc()
        row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:500]
    print({key: value for key, value in row.items() if key.startswith(name)}, file=sys.stderr, flush=True)


def compress(model: PreTrainedModel, options: argparse.Namespace) -> PreTrainedModel:
    """The model compressed by the recipe, calibrated on random tokens."""
    from quad_modifiers import oneshot

    generator = torch.Generator().manual_seed(2)
    shape = (options.samples, options.length)
    windows = torch.randint(model.config.vocab_size, shape, generator=generator)
    return oneshot(
        model,
        options.recipe,
        dataset=list(windows),
        num_calibration_samples=options.samples,
        max_seq_length=options.length,
        device=str(torch.device(options.device).type),
        overrides=options.overrides,
    )


def measure(options: argparse.Namespace) -> Row:
    """Compresses and times; what fails is noted and the rest goes on."""
    device = torch.device(options.device)
    layers = options.layers or LAYERS[options.model]
    row: Row = {
        **environment(device, choose_backend(device).name, torch.bfloat16, options.commit),
        "case": f"{options.model}/{layers} layers, {options.recipe}, {options.samples} x {options.length}"
        + (", few launches" if block.is_wanted() else ""),
        "tokens": options.prompt,
    }
    with _measured(row, "build", device):
        model = random_model(options.model, layers, device)
    with _measured(row, "compress", device):
        quad = compress(model, options)
    if "compress" in row.get("failed", {}):
        return row
    with _measured(row, "rebuild", device):
        original = random_model(options.model, layers, device)
    models = {"bf16": original, "quad": quad.to(device)}
    with torch.inference_mode():
        for name, tokens, context in (("decode", 1, options.context), ("prefill", options.prompt, 0)):
            steps: dict[str, Step] = {}
            for which, each in models.items():
                with _measured(row, f"{name}_{which}_capture", device):
                    steps[which] = Step(each, tokens, context)
            calls: dict[str, Any] = {which: step for which, step in steps.items() if step.graph or device.type == "cpu"}
            calls |= {f"{which}_eager": step.eager for which, step in steps.items()}
            times = seconds_in_turn(calls, options.repeats, device)
            row[name] = times
            print(name, times, file=sys.stderr, flush=True)
            if options.profile:
                for which, step in steps.items():
                    _profile(f"{name} {which}", step, options.profile)
            del steps, calls
            gc.collect()
    return row


def _profile(title: str, step: Step, rows: int) -> None:
    """Prints the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    if step.logits.device.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    print(f"== {title}")
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=rows, max_name_column_width=60))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=list(LAYERS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--recipe", default="quad_w4a4")
    parser.add_argument("--overrides", nargs="*", default=[], help="fields of the recipe, Modifier.field=value")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    parser.add_argument("--context", type=int, default=256, help="tokens before the decode step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", type=int, default=0, help="kernels to list of each pass")
    parser.add_argument("--output", type=Path, help="a file of JSON lines")
    parser.add_argument("--commit", help="to record; default: that of the working tree")
    options = parser.parse_args(argv)
    row = measure(options)
    if options.output is not None:
        add_row(options.output, row)
    for key, value in row.items():
        print(f"{key:28} {value}")
    return 1 if row.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
