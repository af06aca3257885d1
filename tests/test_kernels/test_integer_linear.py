"""Linear layer on integers."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import QuantizedWeight
from quad_kernels import integer_linear as public_integer_linear

LAYOUTS = [
    ("reference", "int8"),
    ("reference", "nibbles"),
    ("onednn", "int8"),
    ("onednn", "nibbles"),
    ("onednn", "onednn"),
    ("native", "lines4"),
    ("native", "lines8"),
    ("onednn", "lines4"),
    ("reference", "lines8"),
]


@pytest.fixture(params=LAYOUTS, ids="-".join, autouse=True)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QUAD_KERNELS", request.param[0])
    return request.param[1]


def integer_linear(
    layout: str,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    plain = QuantizedWeight(weight, scale, zero_point, weight.shape[1], weight.shape[0], bits)
    return public_integer_linear(x, x_scale, plain.to_layout(layout))


def integers(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


@pytest.mark.parametrize(("x_bits", "w_bits"), [(4, 4), (8, 4), (8, 8), (4, 2)])
@pytest.mark.parametrize("k", [1, 63, 576, 4096])
def test_integer_sum_is_exact(layout: str, x_bits: int, w_bits: int, k: int) -> None:
    x, weight = integers((2, 3, k), x_bits), integers((5, k), w_bits, seed=2)
    ones = torch.ones(2, 3, 1), torch.ones(5, 1)
    got = integer_linear(layout, x, ones[0], weight, ones[1], bits=w_bits)
    assert got.dtype == torch.float32
    assert torch.equal(got, (x.long() @ weight.long().T).float())


@pytest.mark.parametrize(("x_bits", "w_bits", "zero"), [(4, 4, None), (8, 4, -8), (8, 8, None), (8, 8, -128)])
@pytest.mark.parametrize("k", [4096, 16384])
def test_integer_sum_is_exact_where_float32_is_not(
    layout: str, x_bits: int, w_bits: int, zero: int | None, k: int
) -> None:
    """Large products of both signs that cancel but for a rest of one: no partial sum may be rounded."""
    x = torch.full((1, k + 1), 2 ** (x_bits - 1) - 1, dtype=torch.int8)
    x[0, k // 2 : k] *= -1
    x[0, k] = 1
    weight = torch.full((2, k + 1), 2 ** (w_bits - 1) - 1, dtype=torch.int8)
    zero_point = None if zero is None else torch.full((2, 1), zero, dtype=torch.int8)
    got = integer_linear(layout, x, torch.ones(1, 1), weight, torch.ones(2, 1), zero_point, w_bits)
    rest = 2 ** (w_bits - 1) - 1 - (zero or 0)
    assert got.tolist() == [[rest, rest]]


@pytest.mark.parametrize(
    ("bits", "k", "exact"), [(4, 16384, torch.float32), (8, 1024, torch.float32), (8, 1025, torch.float64)]
)
def test_float64_is_used_exactly_where_float32_could_round(
    bits: int, k: int, exact: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUAD_KERNELS", "reference")
    used: list[torch.dtype] = []
    product = torch.Tensor.__matmul__

    def spy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        used.append(left.dtype)
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    x = torch.full((1, k), -(2 ** (bits - 1)), dtype=torch.int8)
    integer_linear(layout, x, torch.ones(1, 1), x, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8), bits)
    assert used == [exact]


@pytest.mark.parametrize(
    ("operand", "shape", "reason"),
    [
        ("x", (2, 3, 63), "x has 63 columns, a weight of 64 inputs needs 64"),
        ("x_scale", (1, 1), r"x_scale \[1, 1\] does not fit x \[2, 3, 64\] and 64 inputs"),
        ("x_scale", (6, 1), r"x_scale \[6, 1\] does not fit x \[2, 3, 64\] and 64 inputs"),
        ("x_scale", (2, 3, 3), r"x_scale \[2, 3, 3\] does not fit x \[2, 3, 64\] and 64 inputs"),
        ("x_scale", (2, 3, 0), r"x_scale \[2, 3, 0\] does not fit x \[2, 3, 64\] and 64 inputs"),
        ("outlier", (1, 8), r"outlier \[1, 8\] does not fit x \[2, 3, 64\]"),
        ("outlier", (2, 3, 7), r"7 outliers do not fit an outlier weight \[5, 8\]"),
        ("outlier_weight", (1, 8), r"outlier_weight \[1, 8\] does not fit 5 output channels"),
        ("bias", (1,), r"bias \[1\] does not fit 5 output channels"),
        ("bias", (5, 1), r"bias \[5, 1\] does not fit 5 output channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(layout: str, operand: str, shape: tuple[int, ...], reason: str) -> None:
    weight = QuantizedWeight(integers((5, 64), 4), scales((5, 1)), None, 64, 5, 4).to_layout(layout)
    operands = {
        "x": integers((2, 3, 64), 4),
        "x_scale": scales((2, 3, 1)),
        "outlier": scales((2, 3, 8)),
        "outlier_weight": scales((5, 8)),
        "bias": scales((5,)),
    }
    assert public_integer_linear(weight=weight, **operands).shape == (2, 3, 5)
    operands[operand] = operands[operand].new_zeros(shape)
    with pytest.raises(ValueError, match=reason):
        public_integer_linear(weight=weight, **operands)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("x_groups", "w_groups"), [(1, 1), (4, 1), (1, 4), (4, 4), (2, 8)])
def test_scales_groups_and_zero_points(layout: str, x_groups: int, w_groups: int, zero_points: bool) -> None:
    k = 64
    x, weight = integers((3, 5, k), 8), integers((7, k), 4, seed=2)
    x_scale, w_scale = scales((3, 5, x_groups)), scales((7, w_groups), seed=3)
    zero = integers((7, w_groups), 4, seed=4) if zero_points else None
    wide_x = x.double() * x_scale.double().repeat_interleave(k // x_groups, -1)
    shifted = weight.double() - (0 if zero is None else zero.double().repeat_interleave(k // w_groups, -1))
    wide_w = shifted * w_scale.double().repeat_interleave(k // w_groups, -1)
    got = integer_linear(layout, x, x_scale, weight, w_scale, zero)
    torch.testing.assert_close(got.double(), wide_x @ wide_w.T, rtol=1e-5, atol=1e-3)


def test_scales_in_bfloat16_are_widened_first(layout: str) -> None:
    x, weight = integers((4, 32), 4), integers((3, 32), 4, seed=2)
    w_scale = scales((3, 1)).bfloat16()
    assert torch.equal(
        integer_linear(layout, x, scales((4, 1)), weight, w_scale),
        integer_linear(layout, x, scales((4, 1)), weight, w_scale.float()),
    )


@pytest.mark.parametrize(("x_groups", "w_groups"), [(1, 1), (2, 4)])
def test_many_tokens_are_computed_in_parts(layout: str, x_groups: int, w_groups: int) -> None:
    """Each token's result is that of the token alone, with everything that a layer can have."""
    tokens, k, out, rank = 300, 64, 24, 8
    x, x_scale = integers((tokens, k), 8), scales((tokens, x_groups))
    plain = QuantizedWeight(integers((out, k), 4, seed=2), scales((out, w_groups), seed=3), None, k, out, 4)
    weight = plain.to_layout(layout)
    outlier, outlier_weight, bias = scales((tokens, rank), 4), scales((out, rank), 5), scales((out,), 6)
    whole = public_integer_linear(x, x_scale, weight, outlier=outlier, outlier_weight=outlier_weight, bias=bias)
    for token in (0, 127, 128, 255, 299):
        alone = public_integer_linear(
            x[token], x_scale[token], weight, outlier=outlier[token], outlier_weight=outlier_weight, bias=bias
        )
        torch.testing.assert_close(whole[token], alone, rtol=1e-5, atol=1e-2)
