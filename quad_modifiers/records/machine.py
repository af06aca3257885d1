"""What measured: processor, graphics processor, versions of packages, peak memory."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quad_modifiers.version import __version__

_PACKAGES = ("lm-eval", "transformers", "torch")


def package_versions(names: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of Python, of this package, and of those of `names` that are installed."""
    found = {"python": platform.python_version(), "quad-modifiers": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine_name() -> str:
    """Returns the name of the GPU, or number and name of the processors."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def peak_memory() -> int:
    """Returns the largest resident memory of this process so far, in bytes; 0 on Windows, which has no getrusage."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
