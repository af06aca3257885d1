"""Compresses a real model and prints what that cost and gained: perplexity, speed, size, time, memory, a sentence."""

import logging
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import quad_modifiers
from quad_modifiers.before_compression import PARTIAL
from quad_modifiers.checkpoint.whole_model import load_reference, load_whole_model
from quad_modifiers.data import held_out_name, held_out_prose, token_windows
from quad_modifiers.output_folder import move_entries
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.records.machine import peak_memory
from quad_modifiers.tools.demo.original import Source, fetch_original
from quad_modifiers.tools.demo.token_speed import STANDARD, SpeedTask, measure_speed, speed_lines
from quad_modifiers.tools.evaluation import Perplexity, perplexity

logger = logging.getLogger(__name__)

_DEFAULT_FOLDERS = {"smollm2": "outputs/SmolLM2-135M", "qwen": "outputs/Qwen2.5-Coder-0.5B"}
# What a run that was killed leaves: a checkpoint not put in place yet, what is kept for --resume, half a checkpoint.
_UNFINISHED = re.compile(rf"\.new({re.escape(PARTIAL)})?|\.\.new\.[0-9a-f]{{8}}")
_PROMPT = "Why is the sky blue? Answer in one sentence."
_NEW_TOKENS = 40


class Compression(NamedTuple):
    """What the compression step took: wall-clock seconds and the process's peak memory in bytes."""

    seconds: float
    peak_bytes: int


class Measured(NamedTuple):
    """One checkpoint's numbers: perplexity, bytes of its tensors, bytes of embedding and lm_head among them, a text."""

    perplexity: Perplexity
    tensor_bytes: int
    embedding_bytes: int
    generated: str


def run(
    name: str,
    model_folder: Path | None,
    recipe: str,
    output: Path,
    *,
    source: Source = "auto",
    force: bool = False,
    window_length: int = 512,
    window_count: int = 32,
    speed_task: SpeedTask = STANDARD,
) -> None:
    """Compress the named demonstration model by `recipe` into `output`, and print both models' numbers.

    The compression comes first in the process, so that its peak memory is its own. A missing original is fetched, and a
    checkpoint in `output` reused unless `force`; anything else there is refused with a FileExistsError. The report says
    where the original came from, `source` (see `fetch_original`), and which text perplexity was measured on.
    """
    original = model_folder or Path(_DEFAULT_FOLDERS[name])
    origin = fetch_original(name, original, source)
    compression = compress(original, recipe, output, force=force)
    tokenizer = AutoTokenizer.from_pretrained(original)
    windows = token_windows(tokenizer, held_out_prose(), window_length, window_count, seed=0)
    text = f"{window_count} windows of {window_length} tokens of {held_out_name()}"
    full, packed = load_reference(original), load_whole_model(output)
    before = _measure(full, original, tokenizer, windows)
    after = _measure(packed, output, tokenizer, windows)
    speed_before, speed_after = measure_speed([full, packed], speed_task)
    speed = speed_lines(full, packed, speed_before, speed_after, speed_task)
    print(_report(original, origin, output, text, before, after, speed, compression))


def compress(original: Path, recipe: str, output: Path, *, force: bool) -> Compression | None:
    """Compress `original` into `output`; None where the checkpoint that is there is reused."""
    # A new checkpoint replaces the old one only when it is complete; the folder itself may be a mount point or a link.
    fresh = output / ".new"
    entries = list(output.iterdir()) if output.exists() else []
    unfinished = [entry for entry in entries if _UNFINISHED.fullmatch(entry.name)]
    if len(entries) > len(unfinished):
        if not (output / "config.json").is_file():
            raise FileExistsError(f"{output} is not empty and holds no checkpoint; choose another --output")
        if not force:
            logger.info("%s exists: reusing it for the comparison (--force compresses again)", output)
            return None
    for folder in unfinished:  # not resumed: the report says what a whole compression takes
        logger.info("%s is of a demonstration that was cut off; starting again", folder)
        shutil.rmtree(folder)
    start = time.perf_counter()
    quad_modifiers.oneshot(model=str(original), recipe=recipe, output_dir=str(fresh))
    compression = Compression(time.perf_counter() - start, peak_memory())
    for old in sorted(output.iterdir(), key=lambda entry: entry.name != "config.json"):
        if old.is_dir() and old != fresh:
            shutil.rmtree(old)
        elif old != fresh:
            old.unlink()
    move_entries(fresh, output)
    return compression


def _measure(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor
) -> Measured:
    """Returns the numbers of a model and of the checkpoint in `folder` that it was loaded from."""
    measured = perplexity(model, windows)
    inventory = read_inventory(folder)
    return Measured(measured, inventory.total, inventory.embeddings, _generate(model, tokenizer))


@torch.inference_mode()
def _generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the model's greedy answer to the demonstration's question."""
    messages = [{"role": "user", "content": _PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _report(
    original: Path,
    origin: str,
    output: Path,
    text: str,
    before: Measured,
    after: Measured,
    speed: list[str],
    compression: Compression | None,
) -> str:
    """Returns the closing table; `speed` are its lines about speed."""
    ratio = after.perplexity.value / before.perplexity.value
    layers_before = before.tensor_bytes - before.embedding_bytes
    layers_after = after.tensor_bytes - after.embedding_bytes
    lines = [
        "",
        f"original    {original}",
        f"  from      {origin}",
        f"compressed  {output}",
        "",
        f"perplexity, {text}",
        f"  before    {before.perplexity}",
        f"  after     {after.perplexity}   ratio {ratio:.3f}",
        *speed,
        "size of the tensors",
        f"  before    {_size(before)}",
        f"  after     {_size(after)}   decoder layers {layers_before / max(layers_after, 1):.2f}x smaller",
    ]
    if compression is None:
        lines.append("compression  reused, not timed (--force compresses again)")
    else:
        lines.append(f"compression  {compression.seconds:.0f} s, peak memory {compression.peak_bytes / 2**30:.2f} GiB")
    lines += [f"{_PROMPT}", f"  before    {before.generated}", f"  after     {after.generated}"]
    return "\n".join(lines)


def _size(measured: Measured) -> str:
    """Returns the size of a checkpoint with the share of its embeddings."""
    total, ends = measured.tensor_bytes / 1e6, measured.embedding_bytes / 1e6
    return f"{total:.1f} MB, of which embedding and lm_head {ends:.1f} MB"
