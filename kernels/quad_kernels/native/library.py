"""Loads the library of native kernels and chooses its instruction set.

The library is no Python module: it registers the operators `torch.ops.quad_native`, and a few plain functions for this
file. Hadamard matrices are constructed in Python and handed over when their size is met for the first time.
"""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quad_kernels.hadamard import plan_hadamard
from quad_kernels.hadamard.construct import hadamard_factor

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QUAD_KERNELS_ISA"
INSTRUCTION_SETS = ("amx", "avx512vnni", "avxvnni", "avx2")
LIBRARY_VARIABLE = "QUAD_KERNELS_LIBRARY"
PROMPTS_VARIABLE = "QUAD_KERNELS_PROMPTS"
_INTERFACE = 8  # of the operators; an editable installation may hold an older library
_BUILT = Path(__file__).with_name("_kernels.so")


class NativeLibraryError(RuntimeError):
    """The native kernels cannot run here."""


class InstructionSetError(RuntimeError):
    """An instruction set that was asked for is not there."""


@cache
def load() -> ctypes.CDLL:
    """Returns the library, loaded once, with its instruction set chosen.

    That is the best one of the processor, or the one named by the environment variable QUAD_KERNELS_ISA. The variable
    QUAD_KERNELS_LIBRARY names another library file, such as one that was built with sanitizers.

    Raises:
        NativeLibraryError: if the library was not built or does not load, or the processor has no AVX2.
        InstructionSetError: if the processor does not have the instruction set that was asked for.
    """
    path = Path(os.environ.get(LIBRARY_VARIABLE) or _BUILT)
    if not path.is_file():
        raise NativeLibraryError("they were not built; see 'native CPU kernels' in the installation guide")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"their library does not load ({error}); build it again with this torch") from error
    if not hasattr(library, "quad_interface") or library.quad_interface() != _INTERFACE:
        raise NativeLibraryError("they were built from another version; install it again")
    _register_shapes()
    library.quad_planned_outputs.restype = ctypes.c_int64
    library.quad_supported.restype = library.quad_chosen.restype = ctypes.c_char_p
    library.quad_set_planner(_planner)
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "")
    found = library.quad_supported().decode()
    if not found:
        raise NativeLibraryError("this processor has no AVX2")
    if wanted:
        _choose(library, wanted)
    logger.info("native CPU kernels: %s (the processor has %s)", library.quad_chosen().decode(), found)
    return library


def _register_shapes() -> None:
    """Tells torch.compile what the operators return."""
    ops = torch.ops.quad_native

    @torch.library.register_fake(ops.linear.default)
    def _(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], arguments[15])  # out_features

    @torch.library.register_fake(ops.planned_linear.default)
    def _(x: torch.Tensor, number: int) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], load().quad_planned_outputs(ctypes.c_int64(number)))

    @torch.library.register_fake(ops.block_in.default)
    def _(x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
        numbers = arguments[6]
        return [x.new_empty(*x.shape[:-1], out_features) for out_features in numbers[-8::3]]

    @torch.library.register_fake(ops.block_out.default)
    def _(attention: torch.Tensor, residual: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return residual.new_empty(residual.shape)

    @torch.library.register_fake(ops.attend_prompt.default)
    def _(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        batch, heads, positions, head_dim = query.shape
        return query.new_empty(batch, positions, heads * head_dim)

    @torch.library.register_fake(ops.dense_head.default)
    def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake(ops.norm.default)
    def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake(ops.silu.default)
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape)


def forget_blocks(number: int) -> None:
    """Frees what `torch.ops.quad_native.plan_blocks` keeps."""
    load().quad_forget_blocks(ctypes.c_int64(number))


def forget_linear(number: int) -> None:
    """Frees what `torch.ops.quad_native.plan_linear` keeps."""
    load().quad_forget_linear(ctypes.c_int64(number))


def supported() -> tuple[str, ...]:
    """Returns the instruction sets that this processor has, the best first."""
    return tuple(load().quad_supported().decode().split())


def instruction_set() -> str:
    """Returns the name of the instruction set that runs."""
    return str(load().quad_chosen().decode())


def choose_instruction_set(name: str) -> None:
    """Makes another instruction set run, in all threads, from the next call on.

    Raises:
        InstructionSetError: if the processor does not have it.
    """
    _choose(load(), name)


def attends_prompts() -> bool:
    """Whether prompts should use `torch.ops.quad_native.attend_prompt`.

    That is so without AVX-512, where PyTorch's attention was the slower one, unless QUAD_KERNELS_PROMPTS is 1 or 0.
    """
    wanted = os.environ.get(PROMPTS_VARIABLE)
    return wanted == "1" or (wanted != "0" and instruction_set() in ("avx2", "avxvnni"))


def _choose(library: ctypes.CDLL, name: str) -> None:
    if not library.quad_choose(name.encode()):
        found = library.quad_supported().decode().replace(" ", ", ")
        raise InstructionSetError(
            f"there are no kernels for the instruction set {name!r} here, only for {found}; change or unset "
            f"{ENVIRONMENT_VARIABLE}"
        )


@ctypes.CFUNCTYPE(None, ctypes.c_int64)
def _planner(size: int) -> None:
    """Hands the library the plan of a transform of `size` coordinates."""
    plan = plan_hadamard(size)
    signs = torch.cat([torch.zeros(0, dtype=torch.uint8), *(_signs(n) for n in plan.factors if n & (n - 1))])
    orders = (ctypes.c_int32 * len(plan.factors))(*plan.factors)
    pointer = ctypes.cast(signs.data_ptr(), ctypes.POINTER(ctypes.c_uint8))
    load().quad_add_plan(ctypes.c_int64(size), ctypes.c_int64(plan.block), len(plan.factors), orders, pointer)


def _signs(order: int) -> torch.Tensor:
    """Returns the signs of a factor, `[columns * order / 4]`, uint8: bit i of byte g is set where row 4 g + i is -1."""
    negative = hadamard_factor(order, torch.float32, torch.device("cpu")).T.contiguous() < 0
    weights = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)
    return (negative.view(order, -1, 4).to(torch.uint8) * weights).sum(-1).to(torch.uint8).flatten()
