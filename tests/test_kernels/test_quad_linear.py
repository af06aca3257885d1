"""The complete layer: values, gradients, compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from quad_kernels import (
    Backend,
    InputQuantization,
    InputSplit,
    QuantizedWeight,
    RMSNorm,
    choose_backend,
    quad_linear,
    quantize_activations,
    quantize_input,
    register_backend,
)
from quad_kernels.backends import temporary_registrations
from quad_kernels.hadamard import hadamard_matrix
from quad_kernels.quad_linear import dequantized
from quad_kernels.quad_linear.memo import remembered

OUT = 24
SPLITS = {
    "U-type": InputSplit(80, 16),
    "per head": InputSplit(96, 4, 24, keep_width=True),
    "Hadamard": InputSplit(96, 8, 48, keep_width=True, hadamard=True),
    "Paley Hadamard": InputSplit(44, hadamard=True),
    "plain": InputSplit(64),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_weight(width: int, groups: int = 1, zero_points: bool = False) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-8, 8, (OUT, width), dtype=torch.int8, generator=generator)
    scale = torch.rand(OUT, groups, generator=generator) / 10 + 0.01
    zero = torch.randint(-8, 8, (OUT, groups), dtype=torch.int8, generator=generator) if zero_points else None
    return QuantizedWeight(integers, scale, zero, width, OUT, 4)


def plain_layer(
    x: torch.Tensor,
    weight: QuantizedWeight,
    scale: torch.Tensor,
    split: InputSplit,
    quantization: InputQuantization,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The layer in differentiable PyTorch, written down independently: rounding by the detach trick."""
    index = split.outlier_index()
    rest = torch.ones(split.width)
    rest[index] = 0
    keep = torch.eye(split.width)
    if not split.keep_width:
        keep = keep[:, rest.bool()]
    residual = (x * rest) @ keep
    if split.hadamard:
        residual = residual @ hadamard_matrix(split.residual_width).float()
    integers, grid = quantize_input(residual.detach(), quantization)
    repeat = residual.shape[-1] // grid.shape[-1]
    steps = grid.repeat_interleave(repeat, -1)
    levels = 2**quantization.bits - 1
    if quantization.symmetric:
        below = torch.full_like(grid, (levels + 1) / 2)
    else:
        below = (residual.detach().amin(-1, keepdim=True).clamp(max=0) * -quantization.clip_ratio / grid).round()
    beyond = steps * (1 + 1e-6)  # at clip ratio 1 the largest value lies on the limit
    clamped = residual.clamp(-(below + 0.5) * beyond, (levels - below + 0.5) * beyond)
    rounded = clamped + (integers * steps - clamped).detach()
    shifted = weight.unpacked().float()
    columns = shifted.shape[1]
    if weight.zero_point is not None:
        shifted = shifted - weight.zero_point.float().repeat_interleave(columns // weight.zero_point.shape[1], 1)
    y = rounded @ (shifted * scale.repeat_interleave(columns // scale.shape[1], 1)).T
    if outlier_weight is not None:
        y = y + x[..., index] @ outlier_weight.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(("groups", "zero_points"), [(1, False), (2, True)])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_and_gradients(name: str, groups: int, zero_points: bool, clip_ratio: float, symmetric: bool) -> None:
    split = SPLITS[name]
    weight = make_weight(split.residual_width, groups, zero_points)
    quantization = InputQuantization(4, clip_ratio, symmetric=symmetric)
    x, bias = draw(2, 3, split.width), draw(OUT, seed=2)
    outlier_weight = draw(OUT, split.rank, seed=3) if split.rank else None
    results = []
    for layer in ("ours", "plain"):
        leaves = [x.clone(), weight.scale.clone(), bias.clone()]
        if outlier_weight is not None:
            leaves.append(outlier_weight.clone())
        for leaf in leaves:
            leaf.requires_grad_()
        outliers = leaves[3] if outlier_weight is not None else None
        if layer == "ours":
            y = quad_linear(
                leaves[0],
                replace(weight, scale=leaves[1]),
                split,
                quantization,
                outlier_weight=outliers,
                bias=leaves[2],
            )
        else:
            y = plain_layer(leaves[0], weight, leaves[1], split, quantization, outliers, leaves[2])
        y.backward(draw(2, 3, OUT, seed=4))
        results.append([y.detach()] + [leaf.grad for leaf in leaves])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "groups", "zero points", "sub-scales"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_the_integers_is_that_of_real_numbers(kind: str, bits: int) -> None:
    """Central differences of the layer with real numbers for integers, in float64; at an end none points outwards."""
    if kind == "sub-scales" and bits == 8:
        pytest.skip("8 bits take no sub-scales")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(3)
    integers = torch.randint(low, high + 1, (OUT, 64), dtype=torch.int8, generator=generator)
    integers[0], integers[1] = low, high
    groups = 1 if kind == "plain" else 4
    scale = torch.rand(OUT, 1 if kind == "sub-scales" else groups, generator=generator) / 10 + 0.01
    zero = torch.randint(low, high, (OUT, groups), dtype=torch.int8) if kind == "zero points" else None
    sub = torch.randint(1, 9, (groups, OUT), dtype=torch.int8, generator=generator) if kind == "sub-scales" else None
    weight = QuantizedWeight(integers, scale, zero, 64, OUT, bits, sub_scale=sub)
    quantization = InputQuantization(4, 0.9)
    x, direction = draw(5, 64), draw(5, OUT, seed=2)
    like = torch.zeros(OUT, 64, requires_grad=True)
    prepared = choose_backend(torch.device("cpu")).prepare_weight(weight, quantization)
    (quad_linear(x, prepared, InputSplit(64), quantization, integers_like=like) * direction).sum().backward()

    rounded, step = quantize_input(x, quantization)
    inputs = (rounded * step).double()

    def loss(real: torch.Tensor) -> torch.Tensor:
        real = real if zero is None else real - zero.double().repeat_interleave(64 // groups, 1)
        dense = real * scale.double().repeat_interleave(64 // scale.shape[1], 1)
        dense = dense if sub is None else dense * sub.T.double().repeat_interleave(64 // groups, 1)
        return ((inputs @ dense.T) * direction).sum()

    assert like.grad is not None
    free = 0
    for row, column in [(0, 3), (1, 5), (0, 40), (1, 50), (2, 0), (7, 63), (OUT - 1, 31), (9, 17)]:
        nudge = torch.zeros(OUT, 64, dtype=torch.float64)
        nudge[row, column] = 0.5
        wanted = (loss(integers.double() + nudge) - loss(integers.double() - nudge)).float()
        value = int(integers[row, column])
        if (value == low and wanted > 0) or (value == high and wanted < 0):
            wanted = torch.zeros(())
        free += bool(wanted)
        torch.testing.assert_close(like.grad[row, column], wanted, rtol=1e-4, atol=1e-4)
    assert free >= 3
    rows = like.grad[:2]
    assert bool((rows == 0).any())
    assert bool((rows != 0).any())


def test_a_dense_weight_passes_the_same_gradients() -> None:
    """For layers whose inputs are not quantized."""
    weight = make_weight(64, groups=2)
    scale = weight.scale.clone().requires_grad_()
    like = torch.zeros(OUT, 64, requires_grad=True)
    direction = draw(OUT, 64)
    dense = dequantized(replace(weight, scale=scale), like, torch.float32)
    assert torch.equal(dense, weight.dequantized(torch.float32))
    (dense * direction).sum().backward()
    expanded = weight.scale.repeat_interleave(32, 1)
    integers = weight.integers
    outward = ((integers == 7) & (direction < 0)) | ((integers == -8) & (direction > 0))
    torch.testing.assert_close(like.grad, (direction * expanded).masked_fill(outward, 0.0))
    torch.testing.assert_close(scale.grad, (direction * integers).unflatten(1, (2, 32)).sum(-1))


def test_clipped_values_have_no_gradient() -> None:
    split = SPLITS["plain"]
    x = draw(1, split.width).requires_grad_()
    quad_linear(x, make_weight(split.width), split, InputQuantization(4, 0.5)).sum().backward()
    _, _, scale = quantize_activations(x.detach(), InputQuantization(4, 0.5))
    clipped = (x > 7.5 * scale) | (x < -8.5 * scale)
    assert 0 < int(clipped.sum()) < split.width
    assert x.grad is not None
    assert torch.equal(x.grad == 0, clipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPLITS)
def test_the_result_has_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    split = SPLITS[name]
    weight = make_weight(split.residual_width)
    x = draw(5, split.width).to(dtype)
    outlier_weight = draw(OUT, split.rank, seed=3).to(dtype) if split.rank else None
    y = quad_linear(x, weight, split, InputQuantization(8), outlier_weight=outlier_weight)
    assert y.dtype == dtype
    assert y.is_contiguous()
    wide = None if outlier_weight is None else outlier_weight.float()
    wanted = plain_layer(x.float(), weight, weight.scale, split, InputQuantization(8), wide, None)
    rounding = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    assert float((y.float() - wanted).norm() / wanted.norm()) < rounding


def test_fused_norm_equals_the_norm_before() -> None:
    split = SPLITS["Hadamard"]
    norm = RMSNorm(draw(split.width, seed=5).bfloat16(), 1e-5)
    x = draw(3, split.width).bfloat16()
    weight, outliers = make_weight(split.residual_width), draw(OUT, split.rank, seed=3).bfloat16()
    fused = quad_linear(x, weight, split, InputQuantization(), outlier_weight=outliers, norm=norm)
    assert torch.equal(fused, quad_linear(norm(x), weight, split, InputQuantization(), outlier_weight=outliers))


@pytest.mark.parametrize("layout", ["int8", "nibbles", "onednn", "lines4", "lines8"])
@pytest.mark.parametrize("name", ["U-type", "Hadamard"])
def test_compiled_without_a_graph_break(name: str, layout: str) -> None:
    split = SPLITS[name]
    weight = make_weight(split.residual_width).to_layout(layout)
    outliers, bias = draw(OUT, split.rank, seed=3), draw(OUT, seed=2)

    torch._dynamo.reset()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return quad_linear(x, weight, split, InputQuantization(), outlier_weight=outliers, bias=bias) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 7):
        x = draw(2, tokens, split.width)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_ops_are_declared_rightly(name: str, packed: bool, tokens: int) -> None:
    """Shapes, dtypes and strides of the fake kernels, and that no output is a view of an input."""
    split = SPLITS[name]
    x = draw(tokens, split.width)
    ops = torch.ops.quad_kernels
    how = (split.outliers, split.block, split.keep_width, split.hadamard)
    arguments = (x, 4, 0.9, 0, 0, True, *how, None, -1.0, packed, "")
    checked = torch.library.opcheck(ops.quantize_activations.default, arguments)
    assert set(checked.values()) == {"SUCCESS"}
    outlier, integers, scale = ops.quantize_activations(*arguments)
    weight = make_weight(split.residual_width)
    outlier_weight = draw(OUT, split.rank)
    sizes, dtype = (split.residual_width, OUT, 4, weight.layout), torch.bfloat16
    checked = torch.library.opcheck(
        ops.integer_linear.default,
        (integers, scale, weight.integers, weight.scale, None, None, *sizes, outlier, outlier_weight, None, dtype, ""),
    )
    assert set(checked.values()) == {"SUCCESS"}
    for x in (draw(tokens, split.width), draw(split.width, tokens).T):
        assert set(torch.library.opcheck(ops.hadamard.default, (x, "")).values()) == {"SUCCESS"}


def test_parts_that_do_not_fit_are_refused() -> None:
    split = SPLITS["U-type"]
    weight = make_weight(split.residual_width)
    with pytest.raises(ValueError, match="the input has 79 coordinates, its split is for 80"):
        quad_linear(draw(2, 79), weight, split, InputQuantization(), outlier_weight=draw(OUT, 16))
    with pytest.raises(ValueError, match="the weight has 64 inputs, the split's residual 96"):
        quad_linear(draw(2, 96), weight, SPLITS["Hadamard"], InputQuantization())
    with pytest.raises(ValueError, match=r"16 outliers do not fit an outlier weight \[24, 8\]"):
        quad_linear(draw(2, 80), weight, split, InputQuantization(), outlier_weight=draw(OUT, 8))
    with pytest.raises(ValueError, match="outlier and outlier_weight go together"):
        quad_linear(draw(2, 80), weight, split, InputQuantization())
    with pytest.raises(NotImplementedError, match="apply the norm before the layer"):
        quad_linear(
            draw(2, 80).requires_grad_(),
            weight,
            split,
            InputQuantization(),
            outlier_weight=draw(OUT, 16),
            norm=RMSNorm(None, 1e-5),
        )


class Counting(Backend):
    """The reference, with a note of every input that it quantizes."""

    name = "counting"
    priority = 99

    def __init__(self) -> None:
        self.calls: list[int] = []

    def quantize_activations(self, x, quantization, split, norm, packed):
        self.calls.append(x.shape[0])
        return super().quantize_activations(x, quantization, split, norm, packed)


class TestSharedInput:
    """q, k and v quantize their common input once."""

    split = SPLITS["plain"]

    @pytest.fixture
    def calls(self) -> Iterator[list[int]]:
        counting = Counting()
        with temporary_registrations():
            register_backend(counting)
            yield counting.calls

    def run(self, x: torch.Tensor, bits: int = 4) -> torch.Tensor:
        with torch.no_grad():
            return quad_linear(x, make_weight(64), self.split, InputQuantization(bits))

    def test_the_same_tensor_is_quantized_once(self, calls: list[int]) -> None:
        x = draw(3, 64)
        assert torch.equal(self.run(x), self.run(x))
        assert len(calls) == 1

    def test_another_setting_or_tensor_is_not_mistaken_for_it(self, calls: list[int]) -> None:
        x = draw(3, 64)
        self.run(x)
        assert not torch.equal(self.run(x, bits=8), self.run(x.clone()))
        assert len(calls) == 3

    def test_a_tensor_that_was_written_to_is_quantized_again(self, calls: list[int]) -> None:
        x = draw(3, 64)
        before = self.run(x)
        x.mul_(2)
        torch.testing.assert_close(self.run(x), 2 * before)
        assert len(calls) == 2

    def test_inference_tensors_are_always_quantized(self, calls: list[int]) -> None:
        with torch.inference_mode():
            x = draw(3, 64)
            self.run(x)
            x.mul_(2)
            self.run(x)
        assert len(calls) == 2

    def test_nothing_is_kept_longer_than_the_input(self) -> None:
        x = draw(3, 64)
        self.run(x)
        assert remembered() is not None
        del x
        assert remembered() is None
