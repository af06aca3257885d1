"""Lists the packages, which lie in three folders, and builds the native CPU kernels; the rest is in pyproject.toml."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/quad_kernels/native/src")
OBJECTS = Path("build/objects")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
# Each instruction set is a file of its own: what the processor does not have must not be in code that it runs.
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512vnni": AVX512,
    "amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
# No contraction: products and sums are rounded alike by every instruction set.
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
OPERATOR_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-DTORCH_TARGET_VERSION=0x020A000000000000"]  # torch 2.10


class BuildNative(build_ext):
    """Builds the library of native kernels, or says why the installation is without it."""

    def run(self) -> None:
        """Leaves the library out where it cannot be built: the package works without it, on oneDNN's kernels."""
        try:
            super().run()
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(
                f"quad_kernels: WITHOUT native CPU kernels ({reason}). Everything works, linears on a CPU are several "
                "times slower. They need x86-64 Linux, a C++17 compiler (gcc 11 or newer) and, while they are built, "
                "torch 2.10 or newer in the same environment (pip install --no-build-isolation)",
                file=sys.stderr,
            )

    def get_ext_filename(self, fullname: str) -> str:
        """The library is no Python module, so its name has no tag of an interpreter."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """Compiles every instruction set with its own flags, and the operators with torch's headers.

        What was compiled stays in build/objects: several environments of one working copy compile once.
        """
        if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
            raise RuntimeError(f"there are none for {platform.machine()} on {sys.platform}")
        try:
            import torch
        except ImportError as error:
            raise RuntimeError("torch cannot be imported") from error
        root = Path(torch.__file__).parent
        includes = [str(root / "include"), str(root / "include/torch/csrc/api/include")]
        self.mkpath(str(OBJECTS))
        compiler = os.environ.get("CXX", "g++")
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        versions = self._call([compiler, "--version"]) + torch.__version__
        sources = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))

        def compile_source(source: str) -> str:
            flags, paths = KERNEL_FLAGS + INSTRUCTION_SETS.get(Path(source).stem, []), []
            if Path(source).stem == "torch_ops":
                flags, paths = OPERATOR_FLAGS, [f"-I{path}" for path in includes]
            key = hashlib.sha256(" ".join([*flags, *extra, versions]).encode() + sources).hexdigest()[:16]
            target = OBJECTS / f"{Path(source).stem}-{key}.o"
            if not target.exists():
                unfinished = target.with_suffix(f".{os.getpid()}")
                self._call([compiler, *flags, *paths, *extra, "-c", source, "-o", str(unfinished)])
                unfinished.replace(target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compile_source, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(library.parent))
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        self._call([compiler, "-shared", *extra, *objects, "-o", str(library), *libraries])

    def _call(self, command: list[str]) -> str:
        print(" ".join(command))
        try:
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        except FileNotFoundError as error:
            raise RuntimeError(f"there is no C++ compiler {command[0]!r}; set CXX") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{command[0]} failed with status {error.returncode}, see above") from error


class Wheel(bdist_wheel):
    """A wheel for every Python: the library is loaded by PyTorch, not by the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        """Only the platform is the build's."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["quad_modifiers", "quad_modifiers.*", "quad_peft", "quad_peft.*"]),
        # kernels/ itself must not be a package: transformers probes for the PyPI package `kernels` by that name.
        *find_packages("kernels", include=["quad_kernels", "quad_kernels.*"]),
        # The recipes at the top of the repository are data of the installed package.
        "quad_modifiers._recipes",
    ],
    package_dir={"quad_kernels": "kernels/quad_kernels", "quad_modifiers._recipes": "recipes"},
    package_data={
        "quad_modifiers._recipes": ["*.yaml"],
        "quad_modifiers": ["py.typed", "tools/evaluation/tasks/*.yaml"],
        "quad_kernels": ["py.typed"],
    },
    ext_modules=[
        Extension(
            "quad_kernels.native._kernels",
            sources=[str(SOURCES / f"{name}.cpp") for name in (*INSTRUCTION_SETS, "choose", "torch_ops")],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
