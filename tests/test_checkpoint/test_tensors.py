"""The table of tensors agrees with the modules that hold them."""

import math

import pytest
import torch
from quad_kernels import FloatGrid, IntegerGrid, NumberFormat

from quad_modifiers.checkpoint.tensors import tensor_problem, value_problem
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_shapes import TensorSpec, packed_shapes
from quad_modifiers.nn.packed_table import BITS, PackedTable


def specs_of(module: torch.nn.Module) -> dict[str, TensorSpec]:
    def value(name: str, tensor: torch.Tensor) -> tuple[int, ...] | None:
        return tuple(tensor.tolist()) if name == "weight_shape" else None

    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype, value(name, tensor))
        for name, tensor in module.named_buffers()
        if not name.startswith("_")  # what no checkpoint holds
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_linear(bits: int, group_size: int | None, symmetric: bool) -> None:
    grid = IntegerGrid(bits, group_size, symmetric)
    assert specs_of(PackedLinear(56, 30, grid, torch.bfloat16)) == packed_shapes(30, 56, grid, torch.bfloat16)


def test_a_packed_linear_of_two_levels() -> None:
    grid = IntegerGrid(4, 8, sub_scale_bits=4)
    specs = packed_shapes(30, 56, grid, torch.bfloat16)
    assert specs["weight_scale"].shape == (30, 1)
    assert specs["weight_sub_scale"].shape == (4, 7)
    assert specs_of(PackedLinear(56, 30, grid, torch.bfloat16)) == specs


@pytest.mark.parametrize("number_format", ["nvfp4", "mxfp4"])
def test_a_packed_linear_of_floating_point_numbers(number_format: NumberFormat) -> None:
    grid = FloatGrid(number_format)
    specs = packed_shapes(30, 64, grid, torch.bfloat16)
    assert specs["weight_packed"] == TensorSpec((30, 32), torch.uint8)
    scales = {"nvfp4": ((30, 4), torch.float8_e4m3fn), "mxfp4": ((30, 2), torch.uint8)}
    assert specs["weight_scale"] == TensorSpec(*scales[number_format])
    assert ("weight_global_scale" in specs) == (number_format == "nvfp4")
    assert specs_of(PackedLinear(64, 30, grid, torch.bfloat16)) == specs


@pytest.mark.parametrize(
    ("leaf", "values", "dtype", "problem"),
    [
        ("weight_scale", [0, 254], torch.uint8, None),
        ("weight_scale", [3, 255], torch.uint8, "x.weight_scale holds NaN, infinite or negative values"),
        ("weight_scale", [0.0, 448.0], torch.float8_e4m3fn, None),
        ("weight_scale", [1.0, math.nan], torch.float8_e4m3fn, "x.weight_scale holds NaN, infinite or negative values"),
        ("weight_scale", [1.0, -1.0], torch.float8_e4m3fn, "x.weight_scale holds NaN, infinite or negative values"),
        ("weight_global_scale", [16.0], torch.float32, None),
        ("weight_global_scale", [0.0], torch.float32, "x.weight_global_scale is no positive number"),
        ("weight_global_scale", [math.nan], torch.float32, "x.weight_global_scale is no positive number"),
    ],
)
def test_scales_of_floating_point_numbers(leaf: str, values: list, dtype: torch.dtype, problem: str | None) -> None:
    tensor = torch.tensor(values).to(dtype)
    assert value_problem(f"x.{leaf}", tensor, TensorSpec(tuple(tensor.shape), dtype)) == problem


def test_a_packed_table() -> None:
    assert specs_of(PackedTable(321, 50, torch.float16)) == packed_shapes(321, 50, IntegerGrid(BITS), torch.float16)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("int64", "I64"), ("int8", "I8"), ("uint8", "U8"), ("uint16", "U16"), ("bool", "BOOL")]
)
def test_every_kind_of_number_has_the_name_that_files_give_it(dtype: str, stored: str) -> None:
    spec = TensorSpec((2,), getattr(torch, dtype))
    assert tensor_problem("x", (2,), stored, spec) is None
    for other in {"I64", "I8", "U8", "U16", "BOOL", "F32"} - {stored}:
        assert tensor_problem("x", (2,), other, spec) == f"x has dtype {other}, needed is torch.{dtype}"
