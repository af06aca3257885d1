"""`quad --version`: what is installed here, and whether it was tested together."""

import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from quad_modifiers.records.tested_versions import TESTED, installed_versions, is_tested
from quad_modifiers.version import __version__

# What /proc/cpuinfo calls the parts of each instruction set of the native kernels, the best first.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_FLAGS = {
    "amx": (*_AVX512, "amx_tile", "amx_int8", "amx_bf16"),
    "avx512vnni": _AVX512,
    "avxvnni": ("avx2", "fma", "f16c", "avx_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
}


def version_lines() -> list[str]:
    """Returns the version of this package, and one line for each of the others and for the native kernels."""
    found = installed_versions()
    width = max(len(name) for name in (*found, "native kernels"))
    rows = [(name, installed or "not installed") for name, installed in found.items()]
    rows.append(("native kernels", native_kernels()))
    return [f"quad-modifiers {__version__}", *(f"{name.ljust(width)}  {text}" for name, text in rows)]


def version_warnings() -> list[str]:
    """Returns a sentence for each package whose version was not tested."""
    return [
        f"{name} {installed} was not tested with quad-modifiers {__version__}; tested: {', '.join(TESTED[name])}"
        for name, installed in installed_versions().items()
        if installed is not None and not is_tested(name, installed)
    ]


def native_kernels(processor: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the instruction set that the native kernels will take here, or why there are none; without torch."""
    spec = find_spec("quad_kernels")
    library = Path(os.environ.get("QUAD_KERNELS_LIBRARY", ""))
    if not library.is_file():
        folders = (spec.submodule_search_locations or ()) if spec is not None else ()
        built = [file for folder in folders if (file := Path(folder, "native", "_kernels.so")).is_file()]
        if not built:
            return "not built"
    if sys.platform != "linux" or not processor.is_file():
        return f"not known on {platform.system()}"
    flags = {
        flag
        for line in processor.read_text(encoding="utf-8").splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    able = [name for name, needed in _FLAGS.items() if flags.issuperset(needed)]
    wanted = os.environ.get("QUAD_KERNELS_ISA") or (able[0] if able else "")
    if wanted not in able:
        return f"{wanted or 'avx2'}, which this processor does not have"
    return wanted
