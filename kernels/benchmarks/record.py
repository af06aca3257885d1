"""Rows of results: what is in them, the file that keeps them, and where they were measured."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
_KEY = ("machine", "torch", "triton", "backend", "dtype", "case", "tokens")


def environment(device: torch.device, backend: str, dtype: torch.dtype, commit: str | None) -> Row:
    """What a row says of its origin."""
    return {
        "machine": machine(device),
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "humming-kernels": _version("humming-kernels") if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's with its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    flags = _read("/proc/cpuinfo")
    extension = " (AVX512-VNNI)" if "avx512_vnni" in flags else ""
    return f"{torch.get_num_threads()} threads of {name}{extension}"


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return int(size.removesuffix("K")) * 1024 if size.endswith("K") else 64 * 2**20


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file; none if there is no file.

    Raises:
        ValueError: for a line that is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; delete the line to go on") from error
    return rows


def add_row(path: Path, row: Row) -> None:
    """Adds a row to a file, in the place of one of the same machine, versions and case."""
    rows = [other for other in read_rows(path) if _key(other) != _key(row)]
    write_rows(path, [*rows, row])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    temporary.replace(path)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str:
    commit = _run("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return "unknown"
    changed = _run("git", "status", "--porcelain", "--", str(Path(__file__).parents[1]))
    return f"{commit}+changes" if changed else commit


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
