"""The native CPU kernels, with every instruction set of this processor: exact sums, and the references' numbers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from quad_kernels import (
    InputQuantization,
    InputSplit,
    QuantizedWeight,
    apply_hadamard,
    choose_backend,
    integer_linear,
    quad_linear,
    quantize_activations,
)
from quad_kernels.hadamard import hadamard_matrix, plan_hadamard
from quad_kernels.native import library, lines, pages
from quad_kernels.native.pages import in_large_pages
from quad_kernels.quantize_activations.reference import quantize_activations as quantize_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 2, 3, 5, 8, 9, 13, 33, 64)

_missing: str | None = None
try:
    library.load()
except library.NativeLibraryError as error:
    _missing = str(error)
pytestmark = pytest.mark.skipif(_missing is not None, reason=f"no native kernels: {_missing}")


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in library.supported():
        pytest.skip(f"the processor has no {request.param}")
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield request.param
    library.choose_instruction_set(before)


def random_weight(
    out: int, width: int, bits: int, groups: int = 1, zero_points: bool = False, seed: int = 0, unit: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    integers = torch.randint(-half, half, (out, width), generator=generator, dtype=torch.int8)
    scale = torch.ones(out, groups) if unit else torch.rand(out, groups, generator=generator) + 0.5
    zero_point = torch.randint(-half, half, (out, groups), generator=generator, dtype=torch.int8)
    return QuantizedWeight(integers, scale, zero_point if zero_points else None, width, out, bits)


def random_sub_scaled(out: int, width: int, group_size: int, bits: int = 4, unit: bool = False) -> QuantizedWeight:
    """A weight of two levels; the sub-scales of its first channel are all 15."""
    weight = random_weight(out, width, bits, seed=group_size, unit=unit)
    generator = torch.Generator().manual_seed(width)
    sub_scale = torch.randint(1, 16, (width // group_size, out), generator=generator, dtype=torch.int8)
    sub_scale[:, 0] = 15
    return replace(weight, sub_scale=sub_scale)


def in_lines(weight: QuantizedWeight) -> QuantizedWeight:
    stored = weight.to_layout("lines4" if weight.bits <= 4 else "lines8")
    assert stored.layout.startswith("lines")
    return stored


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The sums of the integers, int64."""
    wide = weight.unpacked().long()
    if weight.zero_point is not None:
        wide = wide - weight.zero_point.long().repeat_interleave(weight.in_features // weight.scale.shape[1], 1)
    return x.long() @ wide.T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("out", "width"), [(16, 64), (1, 8), (33, 200), (48, 1024), (17, 1), (70, 4100)])
def test_layouts_hold_the_integers_at_half_a_byte_or_one(bits: int, out: int, width: int) -> None:
    weight = random_weight(out, width, bits)
    stored = in_lines(weight)
    assert torch.equal(stored.unpacked(), weight.integers)
    padded = (out + 15) // 16 * 16 * ((width + 63) // 64 * 64)
    assert stored.integers.numel() == (padded // 2 if bits <= 4 else padded)
    assert torch.equal(stored.to_layout("nibbles").unpacked(), weight.integers)


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(("out", "width"), [(48, 512), (33, 200), (1, 7), (16, 2600), (50, 64)])
def test_sums_are_exact(instruction_set: str, weight_bits: int, x_bits: int, out: int, width: int) -> None:
    half = 2 ** (x_bits - 1)
    generator = torch.Generator().manual_seed(width)
    for zero_points in (False, True):
        weight = random_weight(out, width, weight_bits, zero_points=zero_points, unit=True)
        for tokens in TOKENS:
            x = torch.randint(-half, half, (tokens, width), generator=generator, dtype=torch.int8)
            y = integer_linear(x, torch.ones(tokens, 1), in_lines(weight), backend="native")
            assert torch.equal(y, exact(x, weight).float()), tokens


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("x_bits", [4, 8])
def test_sums_of_the_largest_integers_are_exact(instruction_set: str, weight_bits: int, x_bits: int) -> None:
    width = 1536
    for w in (-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1):
        for value in (-(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1):
            integers = torch.full((20, width), w, dtype=torch.int8)
            weight = in_lines(QuantizedWeight(integers, torch.ones(20, 1), None, width, 20, weight_bits))
            for tokens in (1, 4, 40):
                x = torch.full((tokens, width), value, dtype=torch.int8)
                y = integer_linear(x, torch.ones(tokens, 1), weight, backend="native")
                assert (y == w * value * width).all()


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("weight_groups", [1, 2, 8])
@pytest.mark.parametrize("x_groups", [1, 4, 16])
@pytest.mark.parametrize("zero_points", [False, True])
def test_groups_are_those_of_the_reference(
    instruction_set: str, weight_bits: int, weight_groups: int, x_groups: int, zero_points: bool
) -> None:
    width, out = 512, 40
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(out, width, weight_bits, weight_groups, zero_points)
    for tokens in (1, 3, 37):
        x = torch.randint(-8, 8, (tokens, width), generator=generator, dtype=torch.int8)
        scale = torch.rand(tokens, x_groups, generator=generator) + 0.5
        y = integer_linear(x, scale, in_lines(weight), backend="native")
        wide = QuantizedWeight(
            weight.integers, weight.scale.double(), weight.zero_point, width, out, weight.bits
        ).dequantized(torch.float64)
        truth = (x.double() * scale.double().repeat_interleave(width // x_groups, 1)) @ wide.T
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize(
    ("out", "width", "group_size"),
    [
        (48, 512, 32),
        (33, 192, 64),
        (1, 8, 8),
        (16, 2592, 96),
        (50, 576, 192),
        (20, 160, 16),
        (17, 120, 24),
        (70, 1088, 32),
    ],
)
def test_sums_of_two_levels_are_exact(instruction_set: str, x_bits: int, out: int, width: int, group_size: int) -> None:
    half = 2 ** (x_bits - 1)
    generator = torch.Generator().manual_seed(width)
    weight = random_sub_scaled(out, width, group_size, unit=True)
    stored = in_lines(weight)
    assert stored.layout == "lines4"
    for tokens in TOKENS:
        x = torch.randint(-half, half, (tokens, width), generator=generator, dtype=torch.int8)
        y = integer_linear(x, torch.ones(tokens, 1), stored, backend="native")
        assert torch.equal(y, exact(x, weight).float()), tokens


def test_sums_of_the_largest_products_are_exact(instruction_set: str) -> None:
    width = 512
    for w in (-8, 7):
        for first, second in itertools.product((-128, 127), repeat=2):
            integers = torch.full((20, width), w, dtype=torch.int8)
            integers[:, 2::4] = integers[:, 3::4] = -1 - w  # of each four inputs two are summed apart
            sub_scale = torch.full((width // 32, 20), 15, dtype=torch.int8)
            weight = QuantizedWeight(integers, torch.ones(20, 1), None, width, 20, 4, sub_scale=sub_scale)
            for tokens in (1, 4, 40):
                x = torch.full((tokens, width), first, dtype=torch.int8)
                x[:, 2::4] = x[:, 3::4] = second
                y = integer_linear(x, torch.ones(tokens, 1), in_lines(weight), backend="native")
                assert torch.equal(y, exact(x, weight).float())


@pytest.mark.parametrize("group_size", [20, 4])
def test_groups_that_are_no_whole_lines_become_products(group_size: int) -> None:
    weight = random_sub_scaled(12, 80, group_size)
    x = torch.randint(-8, 8, (5, 80), dtype=torch.int8)
    native = choose_backend("cpu", "native").prepare_weight(weight, InputQuantization(4))
    assert (native.layout, native.bits, native.folded_bits) == ("lines8", 8, 4)
    y = integer_linear(x, torch.ones(5, 1), native, backend="native")
    torch.testing.assert_close(y, integer_linear(x, torch.ones(5, 1), weight, backend="reference"))
    assert torch.equal(native.to_words(), weight.to_words())


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
    x[2, 5], x[3, 7] = float("nan"), float("inf")
    integers, scale = quantize_activations(x, sub_scaled, backend="native")[1:]
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
    "two levels": (InputSplit(576, 64), InputQuantization(4, 0.92, 32, 4)),
    "two levels behind a Hadamard": (
        InputSplit(1536, 16, keep_width=True, hadamard=True),
        InputQuantization(4, 1.0, 32, 4),
    ),
    "two levels of the weight": (InputSplit(576, 64), InputQuantization(8)),
}


def layer_tensors(
    split: InputSplit, quantization: InputQuantization, dtype: torch.dtype, tokens: int, out: int = 50, bits: int = 4
) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    width = split.residual_width
    if bits == 4 and (quantization.sub_scale_bits or quantization == InputQuantization(8)):
        weight = random_sub_scaled(out, width, 32)
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
    before, threads = library.instruction_set(), torch.get_num_threads()
    results = []
    try:
        for name in library.supported():
            library.choose_instruction_set(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(quad_linear(**given, backend="native"))
                for tokens in (1, 5, 19):
                    parts = [
                        quad_linear(**(given | {"x": part}), backend="native") for part in given["x"].split(tokens)
                    ]
                    results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
        library.choose_instruction_set(before)
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


def test_layouts_that_the_kernels_do_not_read_fall_back() -> None:
    weight = random_weight(12, 24, 4, groups=8)  # groups of 3
    x = torch.randint(-8, 8, (5, 24), dtype=torch.int8)
    native = choose_backend("cpu", "native").prepare_weight(weight, InputQuantization(4))
    assert native.layout == "int8"
    y = integer_linear(x, torch.ones(5, 1), native, backend="native")
    torch.testing.assert_close(y, integer_linear(x, torch.ones(5, 1), weight, backend="reference"))


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


def test_lines_have_the_documented_order() -> None:
    weight = random_weight(20, 100, 4)
    stored = lines.LAYOUTS["lines4"].pack(weight.integers)
    assert stored.shape == (2, 16, 64)
    byte = int(stored[1, 3, 4 * 2 + 1])  # channel 16 + 2, inputs 24 + 1 and 24 + 5
    assert byte & 15 == int(weight.integers[18, 25]) + 8
    assert byte >> 4 == int(weight.integers[18, 29]) + 8


# --- attention ---


def attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`[batch, 1, heads * head_dim]`, float64, of keys and values `[batch, cached heads, positions, head_dim]`."""
    query = query.double().unflatten(-1, (-1, keys.shape[-1])).transpose(1, 2)
    shared = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(shared, 1) for x in (keys, values))
    scores = query @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "cached_heads", "head_dim", "positions"),
    [(1, 9, 3, 64, 100), (2, 14, 2, 64, 1), (3, 8, 8, 128, 700), (2, 4, 2, 24, 257), (1, 3, 1, 7, 17)],
)
def test_attention_is_the_reference_in_every_dtype(
    instruction_set: str, dtype: torch.dtype, batch: int, heads: int, cached_heads: int, head_dim: int, positions: int
) -> None:
    generator = torch.Generator().manual_seed(positions)
    query = torch.randn(batch, 1, heads * head_dim, generator=generator).to(dtype)
    shape = (batch, cached_heads, positions + 5, head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    keys[:, :, positions:] = values[:, :, positions:] = torch.nan  # nobody may look there
    mask = torch.rand(batch, positions, generator=generator) < 0.7
    mask[:, -1] = True
    for seen in (None, mask):
        output = torch.ops.quad_native.attend(query, keys, values, positions, seen, 0.3)
        assert output.dtype == dtype
        filled = keys[:, :, :positions], values[:, :, :positions]
        wanted = attention_reference(query, *filled, seen, 0.3)
        error = (output.double() - wanted).abs().max() / wanted.abs().max()
        assert error < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        each = [
            torch.ops.quad_native.attend(
                query[i : i + 1], keys[i : i + 1], values[i : i + 1], positions, None if seen is None else mask[i], 0.3
            )
            for i in range(batch)
        ]
        assert torch.equal(output, torch.cat(each))


def test_attention_gives_the_same_bits_on_every_instruction_set_and_thread_count() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 1, 6 * 64, generator=generator).bfloat16()
    keys, values = (torch.randn(2, 2, 900, 64, generator=generator).bfloat16() for _ in range(2))
    before, threads = library.instruction_set(), torch.get_num_threads()
    outputs = []
    try:
        for name in library.supported():
            library.choose_instruction_set(name)
            for count in (1, 2):
                torch.set_num_threads(count)
                outputs.append(torch.ops.quad_native.attend(query, keys, values, 900, None, 0.125))
    finally:
        library.choose_instruction_set(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_attention_far_apart_scores_stay_finite(instruction_set: str) -> None:
    keys = torch.zeros(1, 1, 600, 32)
    keys[0, 0, :, 0] = torch.linspace(-3000, 3000, 600)
    values = torch.arange(600.0).view(1, 1, 600, 1).expand(1, 1, 600, 32).contiguous()
    query = torch.zeros(1, 1, 32)
    query[..., 0] = 1
    output = torch.ops.quad_native.attend(query, keys, values, 600, None, 1.0)
    torch.testing.assert_close(output, torch.full_like(output, 599.0), rtol=0, atol=0.01)


# --- memory ---


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
