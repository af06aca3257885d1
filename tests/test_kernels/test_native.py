"""The native CPU kernels, with every instruction set of this processor: exact sums, and the references' numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    apply_hadamard,
    quad_linear,
    quantize_activations,
)
from quad_kernels.hadamard import hadamard_matrix, plan_hadamard
from quad_kernels.native import library, lines, pages
from quad_kernels.native.pages import in_large_pages
from quad_kernels.quantize_activations.reference import quantize_activations as quantize_reference

from .native_weights import MISSING, in_lines, random_float4, random_sub_scaled, random_weight, results_everywhere

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")


SPLITS = {
    "whole": InputSplit(96),
    "stream": InputSplit(104, 8),
    "heads": InputSplit(96, 4, 24, keep_width=True),
    "dropped heads": InputSplit(96, 4, 24),
    "odd": InputSplit(77, 5),
    "wide": InputSplit(1100, 76),
}
QUANTIZATIONS = [InputQuantization(bits, clip) for bits in (2, 4, 8) for clip in (1.0, 0.86)]
QUANTIZATIONS += [InputQuantization(4, 0.92, 8, 4), InputQuantization(3, 1.0, 24, 4), InputQuantization(2, 0.86, 8, 6)]
QUANTIZATIONS += [
    InputQuantization(bits, clip, symmetric=False) for bits, clip in ((2, 1.0), (4, 1.0), (4, 0.9), (7, 0.9))
]
QUANTIZATIONS += [InputQuantization(4, 1.0, 8, symmetric=False)]
NVFP4 = InputQuantization(group_size=16, number_format="nvfp4")
MXFP4 = InputQuantization(group_size=32, number_format="mxfp4")
FOUR_OVER_SIX = replace(NVFP4, four_over_six=True)
QUANTIZATIONS += [NVFP4, MXFP4, replace(NVFP4, clip_ratio=0.9), replace(MXFP4, clip_ratio=0.9)]
QUANTIZATIONS += [FOUR_OVER_SIX, replace(FOUR_OVER_SIX, clip_ratio=0.9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_inputs_are_quantized_as_by_the_reference(
    instruction_set: str, dtype: torch.dtype, split: InputSplit, quantization: InputQuantization
) -> None:
    if split.residual_width % (quantization.group_size or 1):
        pytest.skip("the groups do not divide the width")
    generator = torch.Generator().manual_seed(quantization.bits)
    for tokens in (0, 1, 7):
        x = (torch.randn(tokens, split.width, generator=generator) * 3).to(dtype)
        x[:, : split.width // 3] *= 0.01  # groups of very different steps
        own = quantize_activations(x, quantization, split, backend="native")
        truth = quantize_reference(x, quantization, split, None, False)
        for a, b in zip(own, truth, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_ties_zeros_and_numbers_that_are_none(instruction_set: str) -> None:
    largest = torch.randn(64, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    x = largest[:, None] * torch.linspace(-1, 1, 31)  # every integer and every tie between two
    x[0] = 0
    x[1] = 1e-40
    quantization = InputQuantization(4)
    own = quantize_activations(x, quantization, backend="native")
    truth = quantize_reference(x, quantization, InputSplit(31), None, False)
    assert torch.equal(own.integers, truth[1])
    assert torch.equal(own.scale, truth[2])
    sub_scaled = InputQuantization(4, 1.0, 31, 4)
    own = quantize_activations(x, sub_scaled, backend="native")
    truth = quantize_reference(x, sub_scaled, InputSplit(31), None, False)
    assert torch.equal(own.integers, truth[1])
    assert torch.equal(own.scale, truth[2])
    asymmetric = InputQuantization(4, symmetric=False)
    own = quantize_activations(x, asymmetric, backend="native")
    truth = quantize_reference(x, asymmetric, InputSplit(31), None, False)
    assert torch.equal(own.integers, truth[1])
    assert torch.equal(own.scale, truth[2])
    x[2, 5], x[3, 7] = float("nan"), float("inf")
    padded = torch.nn.functional.pad(x, (0, 1))
    for each in (NVFP4, MXFP4, FOUR_OVER_SIX):
        own = quantize_activations(padded[4:], each, backend="native")
        truth = quantize_reference(padded[4:], each, InputSplit(32), None, False)
        assert torch.equal(own.integers, truth[1])
        integers, scale = quantize_activations(padded[:4], each, backend="native")[1:]
        assert not integers[:2].any()
        assert not scale[:2].any()
        assert not scale[2:4, 0].isfinite().any()
    for each in (sub_scaled, asymmetric):
        integers, scale = quantize_activations(x, each, backend="native")[1:]
        assert not scale[2:4].isfinite().any()
        assert not integers[2:4].any()
    y = quad_linear(x, in_lines(random_weight(20, 31, 4)), InputSplit(31), quantization, backend="native")
    assert y[2:4].isnan().all()
    assert y[:2].eq(0).all()
    assert y[4:].isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 64, 76, 96, 128, 144, 344, 1536, 4864, 11008])
def test_the_hadamard_transform_is_that_of_the_matrix(instruction_set: str, size: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    y = apply_hadamard(x, plan_hadamard(size), backend="native")
    torch.testing.assert_close(y.double(), x.double() @ hadamard_matrix(size), rtol=1e-5, atol=2e-6)
    narrow = apply_hadamard(x.bfloat16(), plan_hadamard(size), backend="native")
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), x.bfloat16().double() @ hadamard_matrix(size), rtol=8e-3, atol=1e-5)


LAYERS = {
    "stream": (InputSplit(576, 64), InputQuantization(4)),
    "stream, 8 bits": (InputSplit(576, 64), InputQuantization(8, 0.95)),
    "heads": (InputSplit(512, 8, 64, keep_width=True, hadamard=True), InputQuantization(4)),
    "channels": (InputSplit(1536, 16, keep_width=True, hadamard=True), InputQuantization(8)),
    "odd rank": (InputSplit(203, 3), InputQuantization(4)),
    "groups": (InputSplit(512), InputQuantization(4, group_size=32)),
    "wide groups": (InputSplit(576, 64), InputQuantization(4, group_size=128)),
    "zero points": (InputSplit(576, 64), InputQuantization(4, 0.95, symmetric=False)),
    "zero points of groups": (InputSplit(512), InputQuantization(4, group_size=64, symmetric=False)),
    "zero points behind a Hadamard": (
        InputSplit(1536, keep_width=True, hadamard=True),
        InputQuantization(4, symmetric=False),
    ),
    "two levels": (InputSplit(576, 64), InputQuantization(4, 0.92, 32, 4)),
    "two levels behind a Hadamard": (
        InputSplit(1536, 16, keep_width=True, hadamard=True),
        InputQuantization(4, 1.0, 32, 4),
    ),
    "two levels of the weight": (InputSplit(576, 64), InputQuantization(8)),
    "NVFP4": (InputSplit(576, 64), NVFP4),
    "MXFP4 behind a Hadamard": (InputSplit(1536, 16, keep_width=True, hadamard=True), MXFP4),
}


def layer_tensors(
    split: InputSplit, quantization: InputQuantization, dtype: torch.dtype, tokens: int, out: int = 50, bits: int = 4
) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    width = split.residual_width
    if bits == 4 and (quantization.sub_scale_bits or quantization == InputQuantization(8)):
        weight = random_sub_scaled(out, width, 32)
    elif bits == 4 and quantization.number_format != "int":
        weight = random_float4(out, width, quantization.number_format)
    else:
        weight = random_weight(out, width, bits, quantization.scales(width))
    weight = replace(weight, scale=(weight.scale * (0.01 if weight.sub_scale is None else 0.001)).to(dtype))
    outlier_weight = torch.randn(out, split.rank, generator=generator).to(dtype) if split.rank else None
    return {
        "x": torch.randn(tokens, split.width, generator=generator).to(dtype),
        "weight": weight,
        "split": split,
        "quantization": quantization,
        "outlier_weight": outlier_weight,
        "bias": torch.randn(out, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_is_that_of_its_parts(instruction_set: str, dtype: torch.dtype, layer: tuple, bits: int) -> None:
    """Its own quantized inputs, multiplied in float64: what is left is one rounding to the dtype."""
    split, quantization = layer
    for tokens in (1, 4, 21):
        given = layer_tensors(split, quantization, dtype, tokens, bits=bits)
        weight, outlier_weight, bias = given["weight"], given["outlier_weight"], given["bias"]
        outlier, integers, scale = quantize_activations(given["x"], quantization, split, backend="native")
        wide = scale.double().repeat_interleave(split.residual_width // scale.shape[1], 1)
        truth = (integers.double() * wide) @ weight.dequantized(torch.float64).T + bias.double()
        if outlier is not None:
            truth += outlier.double() @ outlier_weight.double().T
        y = quad_linear(**(given | {"weight": in_lines(weight)}), backend="native")
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_no_result_depends_on_the_batch_the_threads_or_the_processor(dtype: torch.dtype, layer: tuple) -> None:
    given = layer_tensors(*layer, dtype, tokens=70, out=150)
    given["weight"] = in_lines(given["weight"])
    results = list(results_everywhere(given, threads=(1, 2, 3), tokens=(1, 5, 19)))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_more_tokens_than_fit_into_a_batch(instruction_set: str) -> None:
    given = layer_tensors(InputSplit(144, 16), InputQuantization(4), torch.float32, tokens=1100, out=30)
    given["weight"] = in_lines(given["weight"])
    whole = quad_linear(**given, backend="native")
    parts = [quad_linear(**(given | {"x": part}), backend="native") for part in given["x"].split(100)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(70, 576), (5, 33), (129, 96), (16, 4)])
def test_the_head_multiplies_rows_of_bytes(instruction_set: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    from quad_kernels.packing import pack_int32

    generator = torch.Generator().manual_seed(rows)
    integers = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).to(dtype)
    words = pack_int32(integers, 8)
    one = []
    for tokens in (1, 2, 5):
        x = torch.randn(5, columns, generator=generator.manual_seed(1)).to(dtype)[:tokens]
        y = torch.ops.quad_native.head(x, words, scale)
        truth = (x.double() @ integers.double().T) * scale.double().T
        torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-3)
        one.append(y[0])
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], one[2])


@pytest.mark.parametrize("count", [1, 15, 16, 1023, 1041])
def test_silu_is_that_of_float64_and_keeps_what_is_not_finite(instruction_set: str, count: int) -> None:
    x = torch.linspace(-120, 95, count) if count > 1 else torch.tensor([0.7])
    got = torch.ops.quad_native.silu(x)
    torch.testing.assert_close(got.double(), torch.nn.functional.silu(x.double()), rtol=5e-7, atol=1e-35)
    for value in (torch.nan, torch.inf):
        x[count // 2] = value
        got = torch.ops.quad_native.silu(x)
        torch.testing.assert_close(got[count // 2], x[count // 2], equal_nan=True)
        assert got.isfinite().sum() == count - 1


def test_operators_are_declared_rightly() -> None:
    """Shapes, dtypes and strides for torch.compile."""
    given = layer_tensors(InputSplit(80, 16), InputQuantization(4), torch.bfloat16, tokens=3)
    weight, x = in_lines(given["weight"]), given["x"]
    settings = lines.settings(given["quantization"], given["split"])
    ops = torch.ops.quad_native
    calls = {
        ops.linear: (x, *settings, *lines.operands(weight), given["outlier_weight"], given["bias"]),
        ops.norm: (x, torch.ones(80).bfloat16(), 1e-6),
        ops.silu: (x.T,),
        ops.dense_head: (x[:, None], torch.randn(33, 80).bfloat16()),
    }
    for op, arguments in calls.items():
        checked = torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["avx2", "sse"])
def test_an_instruction_set_can_be_asked_for(name: str) -> None:
    with pytest.raises(library.InstructionSetError, match="there are no kernels for the instruction set 'sse'"):
        library.choose_instruction_set("sse")
    text = "from quad_kernels import choose_backend; from quad_kernels.native import library;"
    text += "print(choose_backend('cpu').name, library.instruction_set())"
    environment = os.environ | {"QUAD_KERNELS_ISA": name}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=False)
    if name == "avx2":
        assert done.stdout.split() == ["native", "avx2"]
    else:
        assert "InstructionSetError: there are no kernels for the instruction set 'sse' here" in done.stderr


def test_weights_lie_in_pages_that_are_freed_with_the_last_of_them() -> None:
    first = in_large_pages(torch.arange(1000, dtype=torch.uint8).view(10, 100))
    second = in_large_pages(torch.arange(300, dtype=torch.int8))
    large = in_large_pages(torch.arange(pages.CHUNK_BYTES // 8))
    assert torch.equal(first, torch.arange(1000, dtype=torch.uint8).view(10, 100))
    assert torch.equal(second, torch.arange(300, dtype=torch.int8))
    assert torch.equal(large, torch.arange(pages.CHUNK_BYTES // 8))
    assert [tensor.data_ptr() % 64 for tensor in (first, second, large)] == [0, 0, 0]
    assert large.untyped_storage().nbytes() == pages.CHUNK_BYTES
    held = weakref.ref(large.untyped_storage())
    assert held() is not None
    del large
    assert held() is None


def test_threads_that_pack_at_once_get_memory_of_their_own() -> None:
    def pack(i: int) -> torch.Tensor:
        return in_large_pages(torch.full((4096 + i,), i, dtype=torch.uint8))

    with ThreadPoolExecutor(8) as pool:
        packed = list(pool.map(pack, range(200)))
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(packed))
