"""Measures one row in a process of its own, so that peak memory and time are the row's alone."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.data import calibration_windows, token_windows
from quad_modifiers.data.wikipedia import gensim_test_data
from quad_modifiers.records.evaluation_record import Comparison
from quad_modifiers.records.machine import machine_name, package_versions, peak_memory
from quad_modifiers.tools.bench.rows import CODE, NEWS, ROWS, TEXTS, WIKIPEDIA, Row
from quad_modifiers.tools.demo.packaged_models import fetch
from quad_modifiers.tools.evaluation import Perplexity, perplexity
from quad_modifiers.tools.evaluation.comparison import AVERAGE

LENGTH = 512
WINDOWS = 40  # held-out windows, 20440 predicted tokens
TUNING_SAMPLES = 300  # windows of 512 tokens of the default text, of which a twentieth chooses the best state
_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "lm-eval", "peft")


@dataclass(frozen=True)
class Measurement:
    """One measured row."""

    row: str  # key in `ROWS`
    model: str  # "smollm2" or "qwen"
    seed: int  # seed of calibration windows and rotation
    samples: int  # calibration windows of 512 tokens
    perplexity: float  # perplexity on held-out Wikipedia articles
    stderr: float  # standard error of the mean negative log-likelihood, nats
    tokens: int  # predicted tokens
    seconds: float  # duration of the compression, evaluation excluded
    peak_bytes: int  # peak resident memory of the process until the compression was done
    checkpoint_bytes: int  # size of the weight files, 0 where none was written
    # perplexities on half as many windows of news and of Python code, by name
    other_perplexities: dict[str, float] = field(default_factory=dict)
    # the offline tasks beside the original, and their average, in the form of evaluation.json (`Comparison`); empty
    # where they were not run
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def average(self) -> Comparison | None:
        """The average over the tasks, None where they were not run."""
        return next((Comparison(**task) for task in self.tasks if task["task"] == AVERAGE), None)


def measure_here(
    row: str, model: str, folder: Path, seed: int, samples: int, items: int | None = None, windows: int = WINDOWS
) -> Measurement:
    """Compresses and evaluates in this process; own checkpoints are written, reloaded, and measured as reloaded.

    The original is fetched to `folder` if it is missing. `seed` is that of the calibration windows and, in tuning, of
    the order of the samples; `items` of each offline task are asked, None for all, 0 to leave the tasks out.
    """
    chosen = ROWS[row]
    gensim_test_data()  # no row is calibrated or measured on another text
    original = fetch(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(original)
    seconds, size = 0.0, 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made: Any = original
        if chosen.recipe is not None:
            start = time.perf_counter()
            made = _make(chosen, original, tokenizer, Path(scratch), seed, samples)
            seconds = time.perf_counter() - start
        peak = peak_memory()
        if isinstance(made, Path) and made != original:
            size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        tasks = [] if items == 0 else _tasks(made, original, tokenizer, items)
        loaded = load_whole_model(made) if isinstance(made, Path) else made
        result = _perplexity(loaded, tokenizer, WIKIPEDIA, windows)
        others = {text: _perplexity(loaded, tokenizer, text, windows // 2).value for text in (NEWS, CODE)}
    return Measurement(
        row, model, seed, samples, result.value, result.stderr, result.tokens, seconds, peak, size, others, tasks
    )


def _make(row: Row, original: Path, tokenizer: Any, scratch: Path, seed: int, samples: int) -> Path | torch.nn.Module:
    """Returns the folder of the checkpoint, or the model of a row whose checkpoint would not be our own."""
    from quad_modifiers import oneshot

    recipe, output = row.recipe, scratch / "out"
    assert recipe is not None
    windows = calibration_windows(None, tokenizer, num_samples=samples, sequence_length=LENGTH, seed=seed)
    stock = "_stage" in recipe and "OutlierSplitGPTQ" not in recipe
    compressed = oneshot(
        str(original),
        recipe=recipe,
        dataset=torch.cat(windows),
        num_calibration_samples=samples,
        max_seq_length=LENGTH,
        seed=seed,
        output_dir=None if stock else output,
    )
    if not output.is_dir():
        return compressed
    if not row.tuned:
        return output
    from quad_peft.training import TuningSettings, finetune, merge

    del compressed
    finetune(output, scratch / "adapter", original=original, samples=TUNING_SAMPLES, settings=TuningSettings(seed=seed))
    merge(output, scratch / "adapter", scratch / "tuned")
    return scratch / "tuned"


def _perplexity(model: Any, tokenizer: Any, text: str, windows: int) -> Perplexity:
    return perplexity(model, token_windows(tokenizer, TEXTS[text](), LENGTH, windows, seed=0), progress=False)


def _tasks(model: Any, original: Path, tokenizer: Any, items: int | None) -> list[dict[str, Any]]:
    from quad_modifiers.tools.evaluation import evaluate

    found = evaluate(model, baseline=original, tokenizer=tokenizer, text=None, limit=items)
    assert found.average is not None
    return [task.model_dump() for task in (*found.comparisons, found.average)]


def measure(row: str, model: str, folder: Path, seed: int, samples: int, items: int | None = None) -> Measurement:
    """Measures in a new process, whose progress goes to stderr; the arguments are those of `measure_here`.

    Raises:
        RuntimeError: if the process fails; its messages are on stderr.
    """
    arguments = json.dumps([row, model, str(folder), seed, samples, items])
    command = [sys.executable, "-m", "quad_modifiers.tools.bench.quality", arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} on {model} failed with exit status {done.returncode}")
    return Measurement(**json.loads(done.stdout.strip().splitlines()[-1]))


def environment() -> dict[str, str]:
    """Returns machine, versions and commit, which are recorded beside every number."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    return {"cpu": machine_name(), **package_versions(_PACKAGES), "commit": commit}


if __name__ == "__main__":
    row, model, folder, *numbers = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure_here(row, model, Path(folder), *numbers))))
