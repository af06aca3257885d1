"""Kills compressions at random moments, resumes them, and compares what comes of it with a run that was left alone.

`python tests/kills.py MODEL [--recipe quad_w4a4] [--count 20] [--samples 4] [--seed 0]` works in a temporary folder. It
prints a line for each kill: when, how many layers were finished then, what finishing took. Repeated in the end is what
differs from the run that was left alone, which must be nothing.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(arguments: argparse.Namespace, output: Path, *more: str) -> list[str]:
    """The command line of one run."""
    program = [sys.executable, "-m", "quad_modifiers", "compress", arguments.model, arguments.recipe]
    return [*program, "-o", str(output), "--samples", str(arguments.samples), "--no-check", *more]


def finished_layers(partial: Path) -> list[int]:
    """Layers that each step of a run has finished."""
    return [len(list(step.glob("layer-*"))) for step in sorted(partial.glob("[0-9]*"))]


def files_of(folder: Path) -> dict[str, bytes]:
    """What a checkpoint holds."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(line: list[str]) -> float:
    """Runs a command to its end; returns the seconds that it took."""
    start = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.monotonic() - start


def killed(line: list[str], seconds: float) -> bool:
    """Begins a run and kills it; False if it was finished before."""
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.wait()
        return True
    return False


def main() -> int:
    """Returns the exit code: 0 if every resumed run gave the same files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="quad_w4a4")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    drawn, wrong = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        alone = run(command(arguments, place / "alone"))
        wanted = files_of(place / "alone")
        print(f"left alone: {alone:.1f} s", flush=True)
        done = 0
        while done < arguments.count:
            output = place / f"out-{done}"
            moment = alone * drawn.uniform(0.05, 1.0)
            if not killed(command(arguments, output), moment):
                alone = moment  # the machine is faster than it was: later moments are none
                shutil.rmtree(output)
                continue
            layers = finished_layers(output.with_name(f"{output.name}.partial"))
            rest = run(command(arguments, output, "--resume"))
            same = files_of(output) == wanted
            left = sorted(each.name for each in place.iterdir() if each.name not in ("alone", output.name))
            wrong += not same or bool(left)
            verdict = "the same" if same else "ANOTHER RESULT"
            print(f"killed after {moment:.1f} s at {layers}: {rest:.1f} s more, {verdict} {left or ''}", flush=True)
            shutil.rmtree(output)
            done += 1
    print(f"{arguments.count - wrong} of {arguments.count} the same, and nothing left over")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
