"""Triton kernels are tested by the same bodies everywhere: compiled on a GPU (`-m gpu`), else interpreted on the CPU.

Triton reads TRITON_INTERPRET when it is imported, which torch._dynamo does: tests/conftest.py sets it where no GPU is.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quad_kernels.native import library

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not COMPILED, reason="no CUDA device")]),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the Triton kernels run; the backend is forced to them, references run on the CPU in any case."""
    if request.param == "cpu" and COMPILED:
        pytest.skip("with a GPU the kernels are compiled: run with -m gpu, or with TRITON_INTERPRET=1")
    monkeypatch.setenv("QUAD_KERNELS", "triton")
    return torch.device(request.param)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices and measurements of configurations of one test stay in it."""
    from quad_kernels.integer_linear import autotune

    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path / "cache"))
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every tensor that `torch.empty` makes with NaN or, for integers, with 85."""
    empty = torch.empty

    def garbage(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", garbage)


@pytest.fixture(scope="session", autouse=True)
def _exact_interpreter() -> Iterator[None]:
    """Mends what Triton's interpreter does unlike a GPU: bfloat16 (kept as uint16) in casts and products, and fma."""
    if COMPILED or not HAS_TRITON:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        _mend_bfloat16(interpreter, patch)
        _mend_fma(interpreter, patch)
        yield


def _mend_bfloat16(interpreter: ModuleType, patch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def exact_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).bfloat16()
            return handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return handle(torch.from_numpy(source.data.copy()).view(torch.bfloat16).float().numpy(), tl.float32)
        return cast(self, source, target)

    def exact_dot(self: Any, a: Any, b: Any, d: Any, *arguments: Any) -> Any:
        a, b = (exact_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *arguments)

    patch.setattr(builder, "cast_impl", exact_cast)
    patch.setattr(builder, "create_dot", exact_dot)


def _mend_fma(interpreter: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Triton before 3.9 rounds twice; in float64 the product of two float32 is exact."""

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        total = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(total.astype(x.data.dtype), x.dtype.scalar)

    if not hasattr(interpreter._interpreter, "fma_fp32"):
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the native CPU kernels with each instruction set that this processor has."""
    if request.param not in library.supported():
        pytest.skip(f"the processor has no {request.param}")
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)
