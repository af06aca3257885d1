"""Measures one row in a process of its own, so that peak memory and time are the row's alone."""

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quad_modifiers.bench.rows import ROWS
from quad_modifiers.calibration import calibration_windows
from quad_modifiers.demo.models import fetch
from quad_modifiers.evaluation import perplexity
from quad_modifiers.text import token_windows, wikipedia_articles

LENGTH = 512
WINDOWS = 40  # held-out windows, 20440 predicted tokens
_PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors")


@dataclass(frozen=True)
class Measurement:
    """One measured row.

    Attributes:
        row: key in `ROWS`.
        model: "smollm2" or "qwen".
        seed: of calibration windows and rotation.
        samples: calibration windows of 512 tokens.
        perplexity: on held-out text.
        stderr: standard error of the mean negative log-likelihood, nats.
        tokens: predicted tokens.
        seconds: of the compression, evaluation excluded.
        peak_bytes: peak resident memory of the process until the compression was done.
        checkpoint_bytes: size of the weight files, 0 where none was written.
    """

    row: str
    model: str
    seed: int
    samples: int
    perplexity: float
    stderr: float
    tokens: int
    seconds: float
    peak_bytes: int
    checkpoint_bytes: int


def measure_here(row: str, model: str, folder: Path, seed: int, samples: int, windows: int = WINDOWS) -> Measurement:
    """Compresses and evaluates in this process; own checkpoints are written, reloaded, and measured as reloaded."""
    original = fetch(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(original)
    recipe = ROWS[row].recipe
    seconds, size = 0.0, 0
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if recipe is None:
            evaluated = AutoModelForCausalLM.from_pretrained(original)
        else:
            output = Path(scratch) / "out"
            start = time.perf_counter()
            evaluated = _compress(row, recipe, original, tokenizer, output, seed, samples)
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if recipe is not None and (Path(scratch) / "out").is_dir():
            evaluated = AutoModelForCausalLM.from_pretrained(Path(scratch) / "out")
            size = sum(file.stat().st_size for file in (Path(scratch) / "out").glob("*.safetensors"))
        held_out = token_windows(tokenizer, wikipedia_articles("held_out"), LENGTH, windows, seed=0)
        result = perplexity(evaluated, held_out, progress=False)
    return Measurement(row, model, seed, samples, result.value, result.stderr, result.tokens, seconds, peak, size)


def _compress(
    row: str, recipe: str, original: Path, tokenizer: object, output: Path, seed: int, samples: int
) -> torch.nn.Module:
    from quad_modifiers import oneshot

    windows = calibration_windows(None, tokenizer, num_samples=samples, sequence_length=LENGTH, seed=seed)
    stock = "_stage" in recipe and "OutlierSplitGPTQ" not in recipe
    return oneshot(
        str(original),
        recipe=recipe,
        dataset=torch.cat(windows),
        num_calibration_samples=samples,
        max_seq_length=LENGTH,
        seed=seed,
        output_dir=None if stock else output,
    )


def measure(row: str, model: str, folder: Path, seed: int, samples: int, windows: int = WINDOWS) -> Measurement:
    """Measures in a new process.

    Raises:
        RuntimeError: with the end of its output if the process fails.
    """
    arguments = [row, model, str(folder), str(seed), str(samples), str(windows)]
    done = subprocess.run(
        [sys.executable, "-m", "quad_modifiers.bench.measure", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{row} on {model} failed:\n{done.stderr[-2000:]}")
    return Measurement(**json.loads(done.stdout.strip().splitlines()[-1]))


def environment() -> dict[str, str]:
    """Machine, versions and commit, recorded beside every number."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{len(names)} cores of {names[0]}" if names else cpu
    return {
        "cpu": cpu,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }


if __name__ == "__main__":
    name, which, where, number, count, evaluated_windows = sys.argv[1:]
    found = measure_here(name, which, Path(where), int(number), int(count), int(evaluated_windows))
    print(json.dumps(asdict(found)))
