"""Layers that are called again: their parts stay with the library, and what happens to them is seen all the same."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, LowRank, QuantizedWeight, quad_linear
from quad_kernels.native import library, lines
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .native_weights import MISSING, in_lines, random_weight

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")

SPLIT, QUANTIZATION = InputSplit(48, outliers=8), InputQuantization(4, 0.9)


class Operators(TorchDispatchMode):
    """The native operators of layers that ran inside it, and the numbers of plans."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "quad_native" and func._opname != "plan_linear":
            self.names.append(func._opname)
            if func._opname == "planned_linear":
                self.numbers.append(args[1])
        return func(*args, **(kwargs or {}))


def layer(weight: QuantizedWeight, x: torch.Tensor, **parts: Any) -> torch.Tensor:
    return quad_linear(x, weight, SPLIT, QUANTIZATION, **parts)


def reference(weight: QuantizedWeight, x: torch.Tensor, **parts: Any) -> torch.Tensor:
    return layer(weight.to_layout("int8"), x, backend="reference", **parts)


def operands() -> tuple[QuantizedWeight, torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weight = in_lines(random_weight(33, 40, 4))
    parts = {
        "outlier_weight": torch.randn(33, 8, generator=generator),
        "bias": torch.randn(33, generator=generator),
        "branch": LowRank(torch.randn(3, 48, generator=generator), torch.randn(33, 3, generator=generator)),
    }
    return weight, torch.randn(2, 3, 48, generator=generator), parts


def planned(weight: QuantizedWeight, x: torch.Tensor, **parts: Any) -> tuple[torch.Tensor, int]:
    """The output of a layer with a plan, and its number."""
    layer(weight, x, **parts)
    with Operators() as operators:
        y = layer(weight, x, **parts)
    assert operators.names == ["planned_linear"]
    return y, operators.numbers[0]


def outputs_of(number: int) -> int:
    """Of a plan that is kept, -1 of one that is not."""
    return int(library.load().quad_planned_outputs(ctypes.c_int64(number)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_that_is_called_again_gives_the_same_bits(instruction_set: str, dtype: torch.dtype) -> None:
    weight, x, parts = operands()
    x = x.to(dtype)
    with Operators() as operators:
        outputs = [layer(weight, x, **parts) for _ in range(4)]
    assert operators.names == ["linear", "planned_linear", "planned_linear", "planned_linear"]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert torch.equal(layer(weight, x[1], **parts), outputs[0][1])
    assert torch.equal(layer(weight, x.to(torch.float32), **parts), layer(replace(weight), x.float(), **parts))


def test_parts_may_change_their_content_and_their_storage() -> None:
    weight, x, parts = operands()
    planned(weight, x, **parts)
    down, up = parts["branch"]
    for part in (parts["outlier_weight"], parts["bias"], down, up, weight.scale):
        part.mul_(2)  # in place
        torch.testing.assert_close(layer(weight, x, **parts), reference(weight, x, **parts))
        part.data = part * 0.3
        torch.testing.assert_close(layer(weight, x, **parts), reference(weight, x, **parts))
        part.data = torch.stack([part, part], dim=-1)[..., 0]  # no longer dense
        torch.testing.assert_close(layer(weight, x, **parts), reference(weight, x, **parts))
        part.data = part.contiguous()
    with Operators() as operators:
        layer(weight, x, **parts)
    assert operators.names == ["planned_linear"]


@pytest.mark.parametrize("name", ["outlier_weight", "bias", "scale"])
def test_other_data_at_the_same_address_is_seen(name: str) -> None:
    weight, x, parts = operands()
    part = weight.scale if name == "scale" else parts[name]
    for view in (
        part.view(torch.bfloat16).flatten()[: part.numel()].view(part.shape),  # another dtype
        part.flatten()[:1].expand(part.shape),  # other strides
    ):
        part.data = torch.randint(1, 9, part.shape).float()
        planned(weight, x, **parts)
        address = part.data_ptr()
        part.data = torch.as_strided(part.view(view.dtype), part.shape, view.stride())
        assert part.data_ptr() == address
        assert torch.equal(layer(weight, x, **parts), layer(replace(weight), x, **parts))  # which has no plan
        part.data = part.float().contiguous()


def test_other_parts_are_not_taken_for_those_of_the_plan() -> None:
    weight, x, parts = operands()
    y, number = planned(weight, x, **parts)
    for name, part in parts.items():
        other = LowRank(part.down, part.up.clone() + 1) if name == "branch" else part.clone() + 1
        with Operators() as operators:
            changed = [layer(weight, x, **{**parts, name: other}) for _ in range(2)]
        assert operators.names == ["linear", "planned_linear"]
        assert torch.equal(*changed)
        torch.testing.assert_close(changed[0], reference(weight, x, **{**parts, name: other}))
        assert not torch.equal(changed[0], y)
        if name != "outlier_weight":  # it cannot be missing
            without = {each: value for each, value in parts.items() if each != name}
            torch.testing.assert_close(layer(weight, x, **without), reference(weight, x, **without))
        assert torch.equal(layer(weight, x, **parts), y)
    assert outputs_of(number) == -1
    finer = InputQuantization(6)
    with Operators() as operators:
        quad_linear(x, weight, SPLIT, finer, **parts)
    assert operators.names == ["linear"]


def test_a_plan_goes_with_its_weight() -> None:
    weight, x, parts = operands()
    y, number = planned(weight, x, **parts)
    assert outputs_of(number) == 33
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        with Operators() as operators:
            assert torch.equal(layer(other, x, **parts), y)
        assert operators.names == ["linear"]
    assert outputs_of(number) == 33
    del weight, other
    gc.collect()
    assert outputs_of(number) == -1
    with pytest.raises(RuntimeError, match="there is no plan"):
        torch.ops.quad_native.planned_linear(x, number)


def test_an_input_of_another_width_is_refused() -> None:
    weight, x, parts = operands()
    _, number = planned(weight, x, **parts)
    with pytest.raises(ValueError, match="the input has 47 coordinates, its split is for 48"):
        layer(weight, x[..., 1:], **parts)
    with pytest.raises(RuntimeError, match="the split does not fit x"):
        torch.ops.quad_native.planned_linear(x[..., 1:], number)
    with pytest.raises(RuntimeError, match="the weight does not fit the residual"):
        torch.ops.quad_native.planned_linear(torch.cat([x, x], -1), number)
    assert torch.equal(layer(weight, x, **parts), torch.ops.quad_native.planned_linear(x, number))
    with pytest.raises(RuntimeError, match="the outlier coordinates have no weight"):
        lines.linear(x, weight, SPLIT, QUANTIZATION, None, None, None)
    with pytest.raises(ValueError, match="outlier and outlier_weight go together; the split has 8 outliers"):
        layer(weight, x)


def test_no_graph_holds_the_number_of_a_plan() -> None:
    weight, x, parts = operands()
    y, number = planned(weight, x, **parts)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: layer(weight, x, **parts), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), y)
    assert any("quad_native.linear" in target for target in targets)
    assert not any("planned" in target for target in targets)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert torch.ops.quad_native.planned_linear(mode.from_tensor(x), number).shape == y.shape
