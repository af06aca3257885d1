"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, memory accesses, tensor cores.

    PYTHONPATH=kernels python kernels/benchmarks/inspect_ptx.py [--arch 80 90] [--filter hadamard] [--keep FOLDER]

The kernels are compiled exactly as they are launched: the public code runs on small CPU tensors with the launch
replaced by a recorder. To add a kernel, write a function that yields `Case`s and put it into `CASES`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported; an interpreted kernel cannot be compiled

import torch
import triton
from quad_kernels import InputQuantization, InputSplit, RMSNorm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_TENSOR_CORES = ("HMMA", "HGMMA", "IMMA", "IGMMA")
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")


@dataclass
class Case:
    """One kernel as it is launched.

    Attributes:
        name: name in the table.
        kernel: the `triton.jit` function.
        arguments: every argument by name: tensors (for pointers), numbers, None, and the constexprs.
        options: num_warps, num_stages and so on.
        capabilities: compute capabilities where it runs; empty for everywhere.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    capabilities: tuple[int, ...] = ()


@dataclass
class _Recorder:
    """Stands in the place of a kernel and keeps what it would be launched with."""

    kernel: Any
    launches: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*positional: Any, **keywords: Any) -> None:
            options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
            self.launches.append(({**dict(zip(self.kernel.arg_names, positional, strict=False)), **keywords}, options))

        return launch


def record(
    name: str, module: Any, kernel_name: str, call: Callable[[], Any], capabilities: tuple[int, ...] = ()
) -> Iterator[Case]:
    """Yields a case for each launch of `module.kernel_name` that `call` makes."""
    kernel = getattr(module, kernel_name)
    recorder = _Recorder(kernel)
    setattr(module, kernel_name, recorder)
    try:
        call()
    finally:
        setattr(module, kernel_name, kernel)
    for arguments, options in recorder.launches:
        yield Case(name, kernel, arguments, options, capabilities)


def quantize_cases() -> Iterator[Case]:
    """Residual widths of Llama-3-8B (U-type, and D-type without its Hadamard), groups, packing, the norm."""
    from quad_kernels.quantize_activations import kernel

    w4 = InputQuantization(4, 0.9)
    for name, quantization, split, norm, packed in (
        ("4096+64", w4, InputSplit(4160, 64), None, False),
        ("4096+64 norm", w4, InputSplit(4160, 64), RMSNorm(None, 1e-5), False),
        ("4096+64 packed", w4, InputSplit(4160, 64), None, True),
        ("576+72", w4, InputSplit(648, 72), None, False),
        ("14336", w4, InputSplit(14336), None, False),
        ("14336 zeroed", w4, InputSplit(14336, 64, 0, True), None, False),
        ("28672", w4, InputSplit(28672), None, False),
        ("4096 groups of 128", InputQuantization(4, 0.9, 128), InputSplit(4096), None, False),
        ("4096+64 NVFP4", InputQuantization(group_size=16, number_format="nvfp4"), InputSplit(4160, 64), None, False),
        (
            "4096+64 four over six",
            InputQuantization(4, 1.0, 16, None, True, "nvfp4", True),
            InputSplit(4160, 64),
            None,
            False,
        ),
        ("4096+64 MXFP4", InputQuantization(group_size=32, number_format="mxfp4"), InputSplit(4160, 64), None, False),
        ("4096+64 zero points", InputQuantization(4, 0.9, symmetric=False), InputSplit(4160, 64), None, False),
    ):
        x = torch.zeros(16, split.width, dtype=torch.bfloat16)

        def call(x: torch.Tensor = x, arguments: Any = (quantization, split, norm, packed)) -> None:
            kernel.quantize_activations(x, *arguments)

        yield from record(f"quantize {name}", kernel, "quantize_kernel", call)


def hadamard_cases() -> Iterator[Case]:
    """Down_proj of Llama-3-8B, Llama-3.2-1B, Qwen2.5-7B and 0.5B, Llama-2-7B, and o_proj; with the quantizer."""
    from quad_kernels.hadamard import launch

    for size, dtype in (
        (14336, torch.bfloat16),
        (14336, torch.float16),
        (8192, torch.bfloat16),
        (4096, torch.bfloat16),
        (2048, torch.bfloat16),
        (18944, torch.bfloat16),
        (4864, torch.bfloat16),
        (11008, torch.bfloat16),
        (28672, torch.bfloat16),
        (14336, torch.float32),
    ):
        x, split = torch.zeros(16, size, dtype=dtype), InputSplit(size, 64, 0, True, True)

        def call(x: torch.Tensor = x, split: InputSplit = split) -> None:
            launch.hadamard_quantize(x, InputQuantization(4, 0.9), split)

        yield from record(f"hadamard+quantize {size} {_TYPES[dtype]}", launch, "hadamard_kernel", call)
    for size in (14336, 4096):
        x, split = torch.zeros(1, size, dtype=torch.bfloat16), InputSplit(size, 64, 0, True, True)

        def call_one(x: torch.Tensor = x, split: InputSplit = split) -> None:
            launch.hadamard_quantize(x, InputQuantization(4, 0.9), split)

        yield from record(f"hadamard+quantize {size} bf16, one token", launch, "hadamard_kernel", call_one)
    wide, asymmetric = torch.zeros(16, 14336, dtype=torch.bfloat16), InputQuantization(4, symmetric=False)
    yield from record(
        "hadamard+quantize 14336 bf16, zero points",
        launch,
        "hadamard_kernel",
        lambda: launch.hadamard_quantize(wide, asymmetric, InputSplit(14336, hadamard=True)),
    )
    for size in (14336, 11008):
        x = torch.zeros(16, size, dtype=torch.bfloat16)
        yield from record(f"hadamard {size} bf16", launch, "hadamard_kernel", lambda x=x: launch.hadamard(x))


def small_cases() -> Iterator[Case]:
    """What a block computes between its linears, and the head with 8-bit rows."""
    from quad_kernels.elementwise import kernel as elementwise
    from quad_kernels.table_product import kernel as table

    query, key = torch.zeros(3, 32 * 128, dtype=torch.bfloat16), torch.zeros(3, 8 * 128, dtype=torch.bfloat16)
    cosine, norm = torch.zeros(3, 128, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.bfloat16)
    for name, norms in (("rotate", []), ("rotate with norms", [norm, norm])):
        yield from record(
            name,
            elementwise,
            "rotate_kernel",
            lambda norms=norms: elementwise.rotate(query, key, cosine, cosine, norms, 1e-6),
        )
    yield from record("gated", elementwise, "gated_kernel", lambda: elementwise.gated(query, query))
    words, scale = torch.zeros(64, 1024, dtype=torch.int32), torch.zeros(64, 1, dtype=torch.bfloat16)
    for tokens in (1, 8):
        x = torch.zeros(tokens, 4096, dtype=torch.bfloat16)
        yield from record(
            f"table {tokens} tokens", table, "table_kernel", lambda x=x: table.table_product(x, words, scale)
        )


def integer_linear_cases() -> Iterator[Case]:
    """Every tile where it may run: plain, with groups, zero points, int8 weights, packed x, a ragged width."""
    from quad_kernels.integer_linear.config import TILES, Config, Device, Problem, fits

    devices = {80: Device(108, 163 * 1024, hopper=False), 90: Device(132, 227 * 1024, hopper=True)}
    plain = Problem(8192, 1024, 4096, 4096, 64, True, False, False, False)
    for name, dtype, changes in (
        ("", torch.bfloat16, {}),
        ("fp16", torch.float16, {}),
        ("fp32", torch.float32, {"wide": True}),
        ("no outliers", torch.bfloat16, {"rank": 0}),
        ("zero points", torch.bfloat16, {"zero_point": True}),
        ("groups of 128", torch.bfloat16, {"group": 128}),
        ("groups of 128 zero points", torch.bfloat16, {"group": 128, "zero_point": True}),
        ("int8 weight", torch.bfloat16, {"nibbles": False}),
        ("packed x", torch.bfloat16, {"x_packed": True}),
        ("K 4032", torch.bfloat16, {"inputs": 4032, "group": 4032}),
    ):
        problem = plain._replace(**changes)
        for block_m, block_n, block_k, warps, stages in TILES:
            for split in (4 if block_m <= 64 else 1,) if name else (1, 4):
                config = Config(block_m, block_n, block_k, split, warps, stages)
                runs_on = tuple(capability for capability, device in devices.items() if fits(config, problem, device))
                if runs_on:
                    shape = f"{block_m}x{block_n}x{block_k} stages {stages} split {split}"
                    yield from _integer_linear_case(
                        f"integer_linear {shape} {name}".strip(), problem, config, dtype, runs_on
                    )


def _integer_linear_case(
    name: str, problem: Any, config: Any, dtype: torch.dtype, capabilities: tuple[int, ...]
) -> Iterator[Case]:
    from quad_kernels.integer_linear import launch
    from quad_kernels.integer_linear.operands import LinearOperands
    from quad_kernels.packing import nibble_bytes
    from quad_kernels.weight import QuantizedWeight

    m, n, k, rank = 2047, problem.outputs, problem.inputs, problem.rank  # no power of two divides the number of tokens

    def integers(rows: int, packed: bool) -> torch.Tensor:
        return torch.zeros(rows, nibble_bytes(k) if packed else k, dtype=torch.uint8 if packed else torch.int8)

    scale = torch.ones(n, k // problem.group, dtype=dtype)
    zeros = torch.zeros(scale.shape, dtype=torch.int8) if problem.zero_point else None
    bits, layout = (4, "nibbles") if problem.nibbles else (8, "int8")
    weight = QuantizedWeight(integers(n, problem.nibbles), scale, zeros, k, n, bits, layout)
    outliers = (torch.zeros(m, rank, dtype=dtype), torch.zeros(n, rank, dtype=dtype)) if rank else (None, None)

    def call() -> None:
        x = integers(m, problem.x_packed)
        operands = LinearOperands(x, torch.ones(m, 1), weight, *outliers, bias=None, out_dtype=dtype)
        launch.integer_linear(operands, config)

    row_sums = launch.row_sum_kernel
    launch.row_sum_kernel = _Recorder(row_sums)
    try:
        yield from record(name, launch, "linear_kernel", call, capabilities)
    finally:
        launch.row_sum_kernel = row_sums


def few_tokens_cases() -> Iterator[Case]:
    """Every candidate with 1, 4 and 8 tokens, 4096 and 14336 inputs; variants of one of them."""
    from quad_kernels.integer_linear import few_tokens

    first = few_tokens.CANDIDATES[0]
    variants = [
        ("", tokens, inputs, 64, torch.bfloat16, config)
        for tokens in (1, 4, 8)
        for inputs in (4096, 14336)
        for config in few_tokens.CANDIDATES
        if few_tokens.fits(config, tokens, inputs)
    ]
    variants += [
        ("fp32", 1, 4096, 64, torch.float32, first),
        ("no outliers", 1, 4096, 0, torch.bfloat16, first),
        ("K 4032 rank 72", 1, 4032, 72, torch.bfloat16, first),
        ("early", 1, 4096, 64, torch.bfloat16, first._replace(early=True)),
    ]
    for name, tokens, inputs, rank, dtype, config in variants:
        shape = f"tokens {tokens} K {inputs} block {config.block_n}x{config.block_w}x{config.depth}"
        yield from _few_tokens_case(f"few_tokens {shape} {name}".strip(), tokens, inputs, rank, dtype, config)


def _few_tokens_case(name: str, tokens: int, inputs: int, rank: int, dtype: torch.dtype, config: Any) -> Iterator[Case]:
    from quad_kernels.integer_linear import few_tokens
    from quad_kernels.packing import nibble_bytes

    outputs = 1024
    x, x_scale = torch.zeros(tokens, inputs, dtype=torch.int8), torch.ones(tokens, 1)
    packed, scale = torch.zeros(outputs, nibble_bytes(inputs), dtype=torch.uint8), torch.ones(outputs, 1, dtype=dtype)
    outliers = (
        (torch.zeros(tokens, rank, dtype=dtype), torch.zeros(outputs, rank, dtype=dtype)) if rank else (None, None)
    )

    def call() -> None:
        few_tokens.few_tokens_linear(x, x_scale, packed, scale, *outliers, None, dtype, config, compiled=True)

    yield from record(name, few_tokens, "few_tokens_kernel", call, (90,) if config.early else ())


def int4_kv_cases() -> Iterator[Case]:
    """Heads of 64, 80 and 128 coordinates."""
    from quad_kernels.int4_kv import kernel

    for head_dim in (64, 80, 128):
        x = torch.zeros(64, head_dim, dtype=torch.bfloat16)
        integers, scale = torch.zeros(64, head_dim // 2, dtype=torch.uint8), torch.zeros(64)

        def quantize(x: torch.Tensor = x) -> None:
            kernel.quantize_kv(x, 0.95, torch.float16)

        def dequantize(integers: torch.Tensor = integers, scale: torch.Tensor = scale) -> None:
            kernel.dequantize_kv(integers, scale.half(), scale.half(), torch.bfloat16)

        yield from record(f"quantize_kv {head_dim}", kernel, "quantize_kv_kernel", quantize)
        yield from record(f"dequantize_kv {head_dim}", kernel, "dequantize_kv_kernel", dequantize)


CASES: list[Callable[[], Iterator[Case]]] = [
    quantize_cases,
    hadamard_cases,
    int4_kv_cases,
    integer_linear_cases,
    few_tokens_cases,
    small_cases,
]


def compile_case(case: Case, capability: int) -> Any:
    """Returns triton's compiled kernel for compute capability `capability` / 10."""
    constants = {p.name for p in case.kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        if name in constants or value is None or (type(value) is int and value == 1):
            signature[name], values[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = f"*{_TYPES[value.dtype]}", True  # allocations start at multiples of 16 bytes
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            divisible = isinstance(value, int) and value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def report(compiled: Any, folder: Path) -> str:
    """One line on the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _cuobjdump("--dump-resource-usage", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = _cuobjdump("-sass", cubin)
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
    count = Counter(opcodes)
    spills = sum(n for opcode, n in count.items() if opcode.startswith(("LDL", "STL")))
    tensor = {name: sum(n for op, n in count.items() if op.split(".")[0] == name) for name in _TENSOR_CORES}
    cells = (
        f"{numbers.get('REG', 0):4d}",
        f"{compiled.metadata.shared / 1024:6.1f}",
        f"{spills:6d}",
        f"{len(opcodes):6d}",
        _widths(count, ("LDG", "LDGSTS")),
        _widths(count, ("STG",)),
        " ".join(f"{name} {n}" for name, n in tensor.items() if n) or "-",
    )
    return " | ".join(cells)


def _widths(count: Counter[str], names: tuple[str, ...]) -> str:
    """Number of accesses by width in bytes, as "16: 4, 2: 1"."""
    widths: Counter[int] = Counter()
    for opcode, n in count.items():
        parts = opcode.split(".")
        if parts[0] in names:
            size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
            widths[next((size[part] for part in parts if part in size), 4)] += n
    return ", ".join(f"{width}: {n}" for width, n in sorted(widths.items(), reverse=True)) or "-"


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(cubin)], check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Prints one line per kernel and architecture; 1 if a kernel spills registers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times 10")
    parser.add_argument("--filter", default="", help="only kernels whose name contains this")
    parser.add_argument("--keep", type=Path, help="a folder for TTGIR, PTX and SASS")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="triton")
    spilled = False
    print(f"triton {triton.__version__}; memory accesses as width in bytes: number of instructions")
    print("arch | regs | shared KiB | spills | instructions | loads | stores | tensor cores | warps | kernel")
    with tempfile.TemporaryDirectory() as temporary:
        for case in (case for cases in CASES for case in cases()):
            if arguments.filter not in case.name:
                continue
            for capability in arguments.arch:
                if case.capabilities and capability not in case.capabilities:
                    continue
                compiled = compile_case(case, capability)
                line = report(compiled, Path(temporary))
                spilled |= int(line.split(" | ")[2]) > 0
                print(f"sm{capability} | {line} | {case.options.get('num_warps', 4)} | {case.name}", flush=True)
                if arguments.keep:
                    _keep(compiled, arguments.keep / f"{case.name} sm{capability}".replace(" ", "_"), Path(temporary))
    return int(spilled)


def _keep(compiled: Any, stem: Path, temporary: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("ttgir", "ptx"):
        Path(f"{stem}.{kind}").write_text(compiled.asm[kind])
    Path(f"{stem}.sass").write_text(_cuobjdump("-sass", temporary / "kernel.cubin"))


if __name__ == "__main__":
    sys.exit(main())
