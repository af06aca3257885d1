"""The table of tensors agrees with the modules that hold them."""

import pytest
import torch

from quad_modifiers.checkpoint.tensors import tensor_problem
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_shapes import TensorSpec, packed_shapes
from quad_modifiers.nn.packed_table import BITS, PackedTable


def specs_of(module: torch.nn.Module) -> dict[str, TensorSpec]:
    def value(name: str, tensor: torch.Tensor) -> tuple[int, ...] | None:
        return tuple(tensor.tolist()) if name == "weight_shape" else None

    return {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype, value(name, tensor))
        for name, tensor in module.named_buffers()
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_linear(bits: int, group_size: int | None, symmetric: bool) -> None:
    module = PackedLinear(56, 30, bits, group_size, symmetric, torch.bfloat16)
    assert specs_of(module) == packed_shapes(30, 56, bits, group_size, symmetric, torch.bfloat16)


def test_a_packed_table() -> None:
    assert specs_of(PackedTable(321, 50, torch.float16)) == packed_shapes(321, 50, BITS, None, True, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("int64", "I64"), ("int8", "I8"), ("uint8", "U8"), ("uint16", "U16"), ("bool", "BOOL")]
)
def test_every_kind_of_number_has_the_name_that_files_give_it(dtype: str, stored: str) -> None:
    spec = TensorSpec((2,), getattr(torch, dtype))
    assert tensor_problem("x", (2,), stored, spec) is None
    for other in {"I64", "I8", "U8", "U16", "BOOL", "F32"} - {stored}:
        assert tensor_problem("x", (2,), other, spec) == f"x has dtype {other}, needed is torch.{dtype}"
