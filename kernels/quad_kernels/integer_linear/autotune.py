"""Which configuration runs a problem: measured, where somebody tuned it on this kind of GPU, else by the model.

Measurements are kept in `$QUAD_KERNELS_CACHE`, by default `~/.cache/quad_kernels`, in one file for each GPU, version of
Triton and state of the kernel's source. Serving never tunes by itself; `tune.tune` does, and QUAD_KERNELS_AUTOTUNE=1
does for every new problem.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import triton

from quad_kernels.integer_linear.config import Config, Device, Problem, candidates, default_config

logger = logging.getLogger(__name__)

AUTOTUNE_VARIABLE = "QUAD_KERNELS_AUTOTUNE"
CACHE_VARIABLE = "QUAD_KERNELS_CACHE"
MOST_CONFIGS = 8  # measured for one problem
SECONDS = 20.0  # after which no further configuration of a problem is compiled and measured

_OFFLINE = Device(processors=132, shared_memory=227 * 1024, hopper=True)  # taken where the interpreter runs
_chosen: dict[tuple[Problem, int | None], Config] = {}


def choose_config(problem: Problem, device: torch.device, launch: Callable[[Config], torch.Tensor]) -> Config:
    """Returns the configuration for a problem; `launch` runs it with a given one, should it be measured."""
    key = (problem, device.index)
    config = _chosen.get(key)
    if config is None:
        config = measured(device).get(problem)
        if config is None and os.environ.get(AUTOTUNE_VARIABLE) == "1" and device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return default_config(problem, describe(device))
            config = tune_problem(problem, device, launch)
        if config is None:
            config = default_config(problem, describe(device))
        _chosen[key] = config
    return config


@lru_cache(maxsize=64)
def describe(device: torch.device) -> Device:
    """What the model needs to know of `device`."""
    if device.type != "cuda":
        return _OFFLINE
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], hopper)


def tune_problem(
    problem: Problem, device: torch.device, launch: Callable[[Config], torch.Tensor], seconds: float = SECONDS
) -> Config:
    """Measures the most promising configurations, keeps the fastest, and remembers it on disk."""
    deadline = time.monotonic() + seconds
    best, best_time = None, float("inf")
    for config in candidates(problem, describe(device))[:MOST_CONFIGS]:
        try:
            milliseconds = triton.testing.do_bench(lambda config=config: launch(config), 5, 20, return_mode="median")
        except (triton.TritonError, RuntimeError) as error:
            logger.warning("%s cannot run %s: %s", config, problem, error)
            continue
        logger.debug("%s: %s: %.4f ms", problem, config, milliseconds)
        if milliseconds < best_time:
            best, best_time = config, milliseconds
        if time.monotonic() > deadline:
            break
    if best is None:
        raise RuntimeError(f"no configuration of the integer_linear kernel runs {problem} on {device}")
    remember(problem, best, device)
    return best


def remember(problem: Problem, config: Config, device: torch.device) -> None:
    """Uses `config` for `problem` from now on, in this process and in later ones."""
    _chosen[(problem, device.index)] = config
    table = measured(device)
    table |= {**_read(cache_file(device)), problem: config}  # other processes may have written meanwhile
    _write(cache_file(device), table)


@lru_cache(maxsize=64)
def measured(device: torch.device) -> dict[Problem, Config]:
    """What was measured on GPUs of this kind."""
    return _read(cache_file(device))


def forget() -> None:
    """Drops every choice of this process; the files stay."""
    _chosen.clear()
    measured.cache_clear()


def cache_file(device: torch.device) -> Path:
    """Where the measurements of this GPU, version of Triton and state of the source are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = "".join(letter if letter.isalnum() else "-" for letter in name)
    try:
        folder = Path(os.environ.get(CACHE_VARIABLE) or Path("~", ".cache", "quad_kernels")).expanduser()
    except RuntimeError:  # a container's user without a name and a home
        folder = Path(tempfile.gettempdir(), "quad_kernels")
    return folder / f"integer_linear_{name}_triton-{triton.__version__}_{_source_hash()}.json"


@lru_cache(maxsize=1)
def _source_hash() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(
        b"".join((here / name).read_bytes() for name in ("block.py", "kernel.py", "launch.py", "config.py"))
    ).hexdigest()[:16]


def _read(path: Path) -> dict[Problem, Config]:
    try:
        rows = json.loads(path.read_text())
        table = {Problem._make(map(_whole, problem)): Config._make(map(_whole, config)) for problem, config in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged and ignored (%s); tune again to replace it", path, error)
        return {}
    return table


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is not an integer")
    return value


def _write(path: Path, table: dict[Problem, Config]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not by `tempfile`, whose files only their owner can read: a cache may be shared.
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump([[list(problem), list(config)] for problem, config in table.items()], file)
        temporary.replace(path)
    except OSError as error:
        logger.warning("the measurements cannot be kept in %s: %s", path, error)
