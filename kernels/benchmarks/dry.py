"""Runs a module in Triton's interpreter, mended as the tests mend it: a trial without a GPU.

TRITON_INTERPRET=1 QUAD_KERNELS=triton python -m benchmarks.dry benchmarks.run --models toy --device cpu --dtype float16
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from triton.runtime import interpreter

_MENDING = Path(__file__).parents[2] / "tests" / "test_kernels" / "conftest.py"


def mend_interpreter() -> None:
    """Makes the interpreter compute bfloat16 and fused multiply-add as a GPU does, for the rest of the process."""
    spec = importlib.util.spec_from_file_location("mending", _MENDING)
    if spec is None or spec.loader is None:
        raise ImportError(f"{_MENDING} cannot be loaded")
    mending = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mending)
    patch = pytest.MonkeyPatch()
    mending._mend_bfloat16(interpreter, patch)
    mending._mend_fma(interpreter, patch)


if __name__ == "__main__":
    mend_interpreter()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
