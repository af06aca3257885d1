"""A linear is a sum of parts: the one forward that every runtime calls."""

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, QuantizedWeight, split_input
from torch import nn

from quad_modifiers.nn.forward import LinearParts, linear_forward
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.nn.term import LinearTerm

WIDTH, RANK, OUT = 64, 8, 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(columns: int) -> QuantizedWeight:
    integers = torch.randint(-8, 8, (OUT, columns), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    return QuantizedWeight(integers, draw(OUT, 1, seed=2).abs() / 50, None, columns, OUT, 4)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ways_to_hold_the_weight_agree(dtype: torch.dtype, hadamard: bool) -> None:
    """Fused integers, and the same numbers as floating point behind a function, with rounded inputs."""
    split = InputSplit(WIDTH, RANK, keep_width=hadamard, hadamard=hadamard)
    weight = quantized(split.residual_width)
    x, outlier, bias = draw(5, WIDTH).to(dtype), draw(OUT, RANK, seed=3).to(dtype), draw(OUT, seed=4).to(dtype)
    fused = LinearParts(split, weight, InputQuantization(8), outlier, bias)
    dense = fused._replace(residual=lambda residual: nn.functional.linear(residual, weight.dequantized(dtype)))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(linear_forward(x, fused), linear_forward(x, dense), rtol=bound, atol=bound)
    plain = fused._replace(input_quantization=None)
    outlier_x, residual_x = split_input(x.float(), split)
    wanted = residual_x @ weight.dequantized(torch.float32).T + outlier_x @ outlier.float().T + bias.float()
    torch.testing.assert_close(linear_forward(x, plain).float(), wanted, rtol=bound, atol=4 * bound)


def test_terms_are_added_to_the_rounded_sum_in_order() -> None:
    x = draw(3, WIDTH).bfloat16()
    parts = LinearParts(InputSplit(WIDTH), quantized(WIDTH), InputQuantization(4))
    first, second = draw(3, OUT, seed=5), draw(3, OUT, seed=6).bfloat16()
    for without in (parts, parts._replace(input_quantization=None)):
        y = linear_forward(x, without)
        got = linear_forward(x, without._replace(terms=(lambda _: first, lambda _: second)))
        assert torch.equal(got, (y.float() + first + second.float()).bfloat16())


def test_an_adapter_changes_parts_and_leaves_the_layer() -> None:
    split = InputSplit(WIDTH, RANK)
    parts = LinearParts(split, quantized(WIDTH - RANK), InputQuantization(4), draw(OUT, RANK, seed=3))
    changed = parts.with_change(torch.ones(OUT, RANK), -10 * torch.ones(OUT, 1))
    assert torch.equal(changed.outlier_weight, parts.outlier_weight + 1)
    assert float(changed.residual.scale.abs().max()) == 0, "scales are never negative"
    assert float(parts.residual.scale.min()) > 0
    assert parts.with_change(None, None) is parts


class Zero(LinearTerm):
    kind = "zero"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], OUT)


def test_names_of_parts_are_no_kinds() -> None:
    linear = QuadLinear(nn.Linear(WIDTH, OUT), "q_proj")
    linear.add_term(Zero())
    assert [term.kind for term in linear.terms()] == ["zero"]
    taken = type("Taken", (Zero,), {"kind": "outlier"})
    with pytest.raises(ValueError, match="a term cannot be of the kind 'outlier'"):
        linear.add_term(taken())
