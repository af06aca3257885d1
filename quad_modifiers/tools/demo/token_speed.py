"""How fast models read a prompt and write a text in transformers: tokens per second, measured in turn."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from quad_kernels import choose_backend
from quad_kernels.native import library
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


class SpeedTask(NamedTuple):
    """What is timed.

    Attributes:
        prompt: tokens of the prefill.
        context: tokens before the first generated one.
        new: tokens that are generated, at least 2.
        runs: timed runs, of which the median counts; one before them warms up.
    """

    prompt: int = 512
    context: int = 64
    new: int = 48
    runs: int = 3


class Speed(NamedTuple):
    """Tokens per second of one sequence: of a prompt that is read at once, and of greedy generation."""

    prefill: float
    decode: float


STANDARD = SpeedTask()


@torch.inference_mode()
def measure_speed(models: Sequence[PreTrainedModel], task: SpeedTask = STANDARD) -> list[Speed]:
    """Returns the speed of each model, in tokens per second, for one sequence.

    The models take turns in each run, so that other work of the machine meets all of them. Prefill is a forward pass
    over ids `[1, task.prompt]`, int64, that returns the last position's logits. Decode is `generate` after ids
    `[1, task.context]`: the time from its first new token to its last, so the prompt does not count. The ids are drawn
    from the first model's vocabulary.

    Args:
        models: models of one vocabulary.
        task: sizes, and the number of runs.

    Raises:
        ValueError: if fewer than 2 tokens are to be generated, or nothing is to be run.
    """
    if task.new < 2 or task.runs < 1:
        raise ValueError(f"a speed takes at least 2 new tokens ({task.new}) and 1 run ({task.runs})")
    vocabulary, length = models[0].config.vocab_size, max(task.prompt, task.context)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]  # of prefill and decode, run by run
    for _ in range(task.runs + 1):
        for model, runs in zip(models, seconds, strict=True):
            own = ids.to(model.device)
            prefill = _prefill_seconds(model, own[:, : task.prompt])
            runs.append((prefill, _decode_seconds(model, own[:, : task.context], task.new)))
    medians = [[statistics.median(times) for times in zip(*runs[1:], strict=True)] for runs in seconds]
    return [Speed(task.prompt / prefill, (task.new - 1) / decode) for prefill, decode in medians]


def speed_lines(
    original: PreTrainedModel, compressed: PreTrainedModel, before: Speed, after: Speed, task: SpeedTask = STANDARD
) -> list[str]:
    """Returns the lines of a report: both models' speeds, after / before, and what they were measured with."""
    device, dtype = compressed.device, str(original.dtype).removeprefix("torch.")
    return [
        f"decode, tokens per second: {task.new} tokens after {task.context}",
        f"  before    {before.decode:.1f}",
        f"  after     {after.decode:.1f}   ratio {after.decode / before.decode:.2f}",
        f"prefill, tokens per second: {task.prompt} tokens at once",
        f"  before    {before.prefill:.1f}",
        f"  after     {after.prefill:.1f}   ratio {after.prefill / before.prefill:.2f}",
        f"kernels     {kernels_in_use(device)} on {device}, {torch.get_num_threads()} threads; before in {dtype}",
    ]


def kernels_in_use(device: torch.device) -> str:
    """Returns the name of the kernel backend on `device`, with the instruction set of the native CPU kernels."""
    name = str(choose_backend(device).name)
    return f"{name} ({library.instruction_set()})" if name == "native" else name


class _Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt and each new token, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: the last token came before."""


def _prefill_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(ids, logits_to_keep=1).logits.cpu()  # waits for the device
    return time.perf_counter() - start


def _decode_seconds(model: PreTrainedModel, ids: torch.Tensor, new: int) -> float:
    clock = _Clock()
    mask = torch.ones_like(ids)
    # The token that would end the text is one that there is not. A least number of new tokens would do it too, but
    # looks for such tokens in all scores.
    length = {"max_new_tokens": new, "eos_token_id": model.config.vocab_size}
    model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, streamer=clock, **length)
    _, first, *_, last = clock.times  # the prompt comes first
    return last - first
